"""The memory of a run before it starts, and of the baselines it is compared with."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from lowbit_dist import configfile
from lowbit_dist.config import ConfigError, RunConfig
from lowbit_dist.errors import first_line
from lowbit_dist.memory.report import Peak, largest, report
from lowbit_dist.memory.resident import parameters, per_linear_weight, resident
from lowbit_dist.memory.simulation import simulate_step
from lowbit_dist.model import shapes

DENSE: dict[str, Any] = {"method": {"name": "dense"}, "precision": "fp32"}
# What a run is compared with -> what differs there: like with like, and AdamW with all in float32.
BASELINES: dict[str, dict[str, Any]] = {
    "plan_dense_same_states": DENSE,
    "plan_bitnet": {"method": {"name": "bitnet"}},
    "plan_dense": DENSE | {"optimizer": {"name": "adamw", "states": "fp32"}},
}
EACH: dict[str, Any] = {
    "zero.residency": "sharded", "zero.stage": None,
    "train.reproducible": False, "train.gradient_release": False,
}  # fmt: skip


def plan(config: RunConfig, vocab_size: int, workers: int | None = None) -> dict[str, Any]:
    """Bytes per worker of this run; under the names of `BASELINES` those of the baselines.

    All on the same number of workers. `vocab_size` is the tokenizer's. A ConfigError if the batch cannot be
    divided among `workers`.
    """
    workers = config.workers if workers is None else workers
    config.accumulation(workers)
    own = planned(config, vocab_size, workers)
    return _against("planned", own, baselines(config, vocab_size, workers, with_step=True))


def compare(config: RunConfig, vocab_size: int, measured: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The largest worker of `measured` (one report a worker), against the plans of the baselines."""
    own = largest(measured) | {"states": config.optimizer.states}
    own |= per_linear_weight(config, shapes(config, vocab_size), own["workers"])
    return _against("measured", own, baselines(config, vocab_size, own["workers"]))


def baselines(
    config: RunConfig, vocab_size: int, workers: int, *, with_step: bool = False
) -> dict[str, dict[str, Any]]:
    """The same model on as many workers, trained otherwise.  No step of `plan_dense` is simulated: it differs
    from the other dense one in what is at rest.
    """
    same = {"precision": config.precision.of_latent().model_dump()}
    return {
        name: planned(
            configfile.changed(config, same | changes | EACH), vocab_size, workers,
            with_step=with_step and name != "plan_dense",
        )
        for name, changes in BASELINES.items()
    }  # fmt: skip


def _against(known: str, own: dict[str, Any], plans: dict[str, dict[str, Any]]) -> dict[str, Any]:
    key = "resident_bytes_per_worker"
    return {
        **own,
        "saved_vs_dense_same_states": 1 - own[key] / plans["plan_dense_same_states"][key],
        "saved_vs_bitnet_ste": 1 - own[key] / plans["plan_bitnet"][key],
        "saved_vs_adamw_fp32": 1 - own[key] / plans["plan_dense"][key],
        "saved_vs": f"{known} resident bytes of this run against the planned resident bytes of the baseline",
        **plans,
    }


# A sweep, and a worker that measures often, ask for the same baselines again and again.
@lru_cache(maxsize=64)
def planned(config: RunConfig, vocab_size: int, workers: int, *, with_step: bool = True) -> dict[str, Any]:
    """Bytes per worker of one run, without its baselines; `with_step`: and what lives only inside a step,
    which takes a simulated one to know.  Of a method that changes in training, when it takes the most.
    """
    stages = config.method.stages(config.train.steps)
    if len(stages) > 1:
        configs = [config.model_copy(update={"method": method}) for method in stages]
        plans = (planned(stage, vocab_size, workers, with_step=with_step) for stage in configs)
        key = "peak_bytes_per_worker" if with_step else "resident_bytes_per_worker"
        return max(plans, key=lambda plan: plan[key])
    model = shapes(config, vocab_size)
    peak = _peak(config, vocab_size, workers) if with_step else None
    at_rest = resident(config, model, workers)
    known = report(at_rest, peak, parameters=parameters(config, model), workers=workers)
    return known | {"states": config.optimizer.states}


def _peak(config: RunConfig, vocab_size: int, workers: int) -> Peak:
    """ConfigError for a pretrained architecture whose step fails without values: its code is not known."""
    try:
        return simulate_step(config, vocab_size, workers)
    except Exception as error:
        if config.model.pretrained is None or isinstance(error, ConfigError):
            raise
        architecture = type(shapes(config, vocab_size)).__name__
        raise ConfigError(
            f"model.pretrained ({config.model.pretrained}): a step of {architecture} "
            f"fails ({first_line(error)}); write the folder of a model of another architecture"
        ) from error
