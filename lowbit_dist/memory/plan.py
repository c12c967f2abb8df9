"""The memory of a run before it starts, and of the two baselines it is compared with."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from lowbit_dist import configfile
from lowbit_dist.config import RunConfig
from lowbit_dist.memory.report import Parameters, largest, report, saved
from lowbit_dist.memory.resident import parameters, resident, shapes
from lowbit_dist.memory.simulation import simulate_step


def plan(config: RunConfig, vocab_size: int, workers: int | None = None) -> dict[str, Any]:
    """Bytes per worker of this run; under `plan_dense` and `plan_bitnet` those of the baselines.

    All on the same number of workers. `vocab_size` is the tokenizer's. A ConfigError if the batch cannot be
    divided among `workers`.
    """
    workers = config.workers if workers is None else workers
    config.accumulation(workers)
    found = planned(config, vocab_size, workers)
    dense = planned(adamw_fp32(config), vocab_size, workers)
    bitnet = planned(bitnet_ste(config), vocab_size, workers)
    return {
        **found,
        "saved_vs_adamw_fp32": saved(found, dense),
        "saved_vs_bitnet_ste": saved(found, bitnet),
        "saved_vs": "planned resident bytes of this run against the planned resident bytes of the baseline",
        "plan_dense": dense,
        "plan_bitnet": bitnet,
    }


def compare(config: RunConfig, vocab_size: int, measured: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The largest worker of `measured` (one report a worker), against the plans of the baselines."""
    found = largest(measured)
    plans = baselines(config, vocab_size, found["workers"])
    return {
        **found,
        "saved_vs_adamw_fp32": saved(found, plans["plan_dense"]),
        "saved_vs_bitnet_ste": saved(found, plans["plan_bitnet"]),
        "saved_vs": "measured resident bytes of this run against the planned resident bytes of the baseline",
        **plans,
    }


def baselines(config: RunConfig, vocab_size: int, workers: int) -> dict[str, dict[str, Any]]:
    """What the baselines keep between steps, on as many workers."""
    return {
        "plan_dense": at_rest(adamw_fp32(config), vocab_size, workers),
        "plan_bitnet": at_rest(bitnet_ste(config), vocab_size, workers),
    }


def adamw_fp32(config: RunConfig) -> RunConfig:
    """The same model under AdamW, all in float32: 16 bytes per parameter, spread over the workers."""
    return _baseline(config, "dense", precision="fp32")


def bitnet_ste(config: RunConfig) -> RunConfig:
    """The same model as BitNet b1.58 in this run's precision, master copies and states in float32."""
    return _baseline(config, "bitnet", precision=config.precision)


def _baseline(config: RunConfig, method: str, precision: str) -> RunConfig:
    content = config.to_dict()
    content |= {"method": {"name": method}, "precision": precision}
    content["optimizer"] |= {"states": "fp32"}
    content["zero"] |= {"residency": "sharded", "stage": None}
    content["train"] |= {"reproducible": False}
    return configfile.from_dict(content)


def planned(config: RunConfig, vocab_size: int, workers: int) -> dict[str, Any]:
    """Bytes per worker of one run, without its baselines."""
    sizes, counts = _at_rest_numbers(config, vocab_size, workers)
    return report(sizes, _peak(config, vocab_size, workers), parameters=counts, workers=workers)


def at_rest(config: RunConfig, vocab_size: int, workers: int) -> dict[str, Any]:
    """The same without what lives only inside a step, which takes a simulated step to know."""
    sizes, counts = _at_rest_numbers(config, vocab_size, workers)
    return report(sizes, None, parameters=counts, workers=workers)


# A sweep, and a worker that measures often, ask for the same baselines again and again.
_peak = lru_cache(maxsize=64)(simulate_step)


@lru_cache(maxsize=64)
def _at_rest_numbers(config: RunConfig, vocab_size: int, workers: int) -> tuple[dict[str, int], Parameters]:
    model = shapes(config, vocab_size)
    return resident(config, model, workers), parameters(config, model)
