"""What a worker keeps allocated between steps: arithmetic on the shapes of a model's parameters.

It is what `live.measure` finds on the engine, simulated or real, without an engine: a worker asks for the
baselines' while it trains.
"""

from collections.abc import Collection
from math import prod

from torch import nn

from lowbit_dist import model as models
from lowbit_dist.config import RunConfig
from lowbit_dist.grid import BLOCK
from lowbit_dist.memory.report import RESIDENT, Parameters


def parameters(config: RunConfig, model: nn.Module) -> Parameters:
    numels = {name: p.numel() for name, p in model.named_parameters()}
    n_low_bit = sum(numels[name] for name in models.low_bit_names(model, config.method))
    return Parameters(n_low_bit, sum(numels.values()) - n_low_bit)


def per_linear_weight(config: RunConfig, model: nn.Module, workers: int) -> dict[str, float]:
    """Bytes over all workers for each weight of a linear layer but the head: of what holds its value, and of
    that with the optimizer's states; embeddings and gradients are in neither.
    """
    linear = models.linear_weights(model)
    sizes = resident(config, model, workers, only=linear)
    n = max(1, sum(p.numel() for name, p in model.named_parameters() if name in linear))
    weights = sum(sizes[part] for part in ("low_bit_weights", "scales", "other_weights"))
    return {
        "bytes_per_linear_weight": weights * workers / n,
        "bytes_per_linear_weight_with_states": (weights + sizes["optimizer_states"]) * workers / n,
    }


def resident(
    config: RunConfig, model: nn.Module, workers: int, *, only: Collection[str] | None = None
) -> dict[str, int]:
    """Component -> bytes on worker 0, which has the most: the last ones' shards are short.

    only: of these parameters; None: of all, and of the model's buffers
    """
    named = {name: p for name, p in model.named_parameters() if only is None or name in only}
    sizes = dict.fromkeys(RESIDENT, 0)
    buffers = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in model.buffers()}
    sizes["buffers"] = sum(buffers.values()) if only is None else 0
    stage = 3 if config.zero.stage is None else config.zero.stage
    itemsize = 4 if config.precision.compute == "fp32" else 2
    # In float32 the weights themselves are updated; behind others stand float32 ones.
    master = 0 if itemsize == 4 else 4
    linear = set(models.linear_weights(model))
    rules = [config.optimizer.of(is_linear=name in linear) for name in named]
    if stage < 3:  # whole weights for the passes, gradients that are freed at each step
        whole = [tuple(p.shape) for p in named.values()]
        n = sum(map(prod, whole)) if stage == 0 else flat_numel(sum(map(prod, whole)), workers)
        parts = whole if stage == 0 else [(n // workers,)]
        sizes["other_weights"] = n * itemsize + sum(map(prod, parts)) * (master if stage == 0 else 4)
        sizes["optimizer_states"] = sum(
            rule.state_bytes(part) for rule, part in zip(rules, parts, strict=False)
        )
        return sizes
    low_bit = set(models.low_bit_names(model, config.method))
    for rule, (name, p) in zip(rules, named.items(), strict=True):
        n = p.numel()
        # Packed ZeRO-3's shards are whole blocks, as many on every worker.
        part = n if workers == 1 else -(-n // (BLOCK * workers)) * BLOCK
        if name in low_bit:
            if (kept := config.method.accumulator) is not None:
                sizes["optimizer_states"] += min(part, n) * kept.dtype.itemsize
            sizes["low_bit_weights"] += _code_bytes(config, part // BLOCK, workers)
            grids = {config.method.stored, config.method.sent_grid}
            sizes["scales"] += 4 * len(grids) * models.n_scales(config.method, tuple(p.shape))
        else:
            sizes["other_weights"] += part * itemsize + min(part, n) * master
        if not config.train.gradient_release:
            sizes["gradients"] += part * config.gradient_bytes(workers)
        sizes["optimizer_states"] += rule.state_bytes(tuple(p.shape), min(part, n))
    return sizes


def _code_bytes(config: RunConfig, n_blocks: int, workers: int) -> int:
    """Of a shard of so many blocks, what is made of it to be sent, and the replica of all that is sent."""
    stored, sent = config.method.stored, config.method.sent_grid
    assert stored is not None and sent is not None, "a low-bit parameter is stored on a grid"
    own, wire = n_blocks * stored.bytes_per_block, n_blocks * sent.bytes_per_block
    replica = workers * wire if config.zero.residency == "replicated" else 0
    return replica or own if stored == sent else own + wire + replica


def flat_numel(numel: int, workers: int) -> int:
    """Elements of DeepSpeed's flat buffer under stages 1 and 2, padded to two for each worker."""
    return -(-numel // (2 * workers)) * 2 * workers
