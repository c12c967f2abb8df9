"""What a worker keeps allocated between steps: arithmetic on the shapes of a model's parameters."""

from collections.abc import Iterable
from functools import lru_cache
from math import prod

import torch
from torch import Tensor, nn

from lowbit_dist import model as models
from lowbit_dist import ops
from lowbit_dist.config import RunConfig
from lowbit_dist.grid import BLOCK
from lowbit_dist.memory.report import RESIDENT, Parameters
from lowbit_dist.optim.rule import Rule

META = torch.device("meta")


def build(config: RunConfig, vocab_size: int) -> nn.Module:
    """The run's model on the meta device."""
    return models.build(config.model, vocab_size, config.method, compute_dtype(config))


def shapes(config: RunConfig, vocab_size: int) -> nn.Module:
    """The same model, made once for all who only read it."""
    return _shapes(config.model, vocab_size, config.method, compute_dtype(config))


_shapes = lru_cache(maxsize=8)(models.build)


def compute_dtype(config: RunConfig) -> torch.dtype:
    return torch.bfloat16 if config.precision == "bf16" else torch.float32


def low_bit_names(config: RunConfig, model: nn.Module) -> list[str]:
    return models.low_bit_names(model, config.method)


def state_bytes(rule: Rule, numel: int) -> int:
    """Of an optimizer's slots for so many elements."""
    return sum(ops.Stored.zeros(slot, numel, rule.states, META).nbytes for slot in rule.slots)


def parameters(config: RunConfig, model: nn.Module) -> Parameters:
    low_bit = set(low_bit_names(config, model))
    numels = {name: p.numel() for name, p in model.named_parameters()}
    n_low_bit = sum(n for name, n in numels.items() if name in low_bit)
    return Parameters(n_low_bit, sum(numels.values()) - n_low_bit)


def resident(config: RunConfig, model: nn.Module, workers: int) -> dict[str, int]:
    """Component -> bytes on worker 0, which has the most: the last ones' shards are short.

    `model` is on the meta device.
    """
    from lowbit_dist.zero.engine import accumulation_dtype

    stage = 3 if config.zero.stage is None else config.zero.stage
    if stage < 3:
        return _resident_standard(config, model, workers, stage)
    low_bit = set(low_bit_names(config, model))
    dtype, accumulation = compute_dtype(config), accumulation_dtype(config, workers)
    found = dict.fromkeys(RESIDENT, 0)
    for name, p in model.named_parameters():
        part = shard_numel(p.numel(), workers)
        if name in low_bit:
            found["low_bit_weights"] += _code_bytes(config, part, workers)
            found["scales"] += scale_bytes(config, tuple(p.shape))
        else:
            # In float32 the shard itself is updated; in bf16 a float32 shard stands behind it.
            found["other_weights"] += part * (dtype.itemsize + (4 if dtype != torch.float32 else 0))
        found["gradients"] += part * accumulation.itemsize
        found["optimizer_states"] += state_bytes(config.optimizer, min(part, p.numel()))
    found["buffers"] = _bytes_of(model.buffers())
    return found


def _code_bytes(config: RunConfig, part: int, workers: int) -> int:
    """Of a shard of `part` elements, what is made of it to be sent, and the replica of all that is sent."""
    stored, sent = config.method.stored, config.method.sent_grid
    assert stored is not None and sent is not None, "a low-bit parameter is stored on a grid"
    own, wire = (part // BLOCK * grid.bytes_per_block for grid in (stored, sent))
    replica = workers * wire if config.zero.residency == "replicated" else 0
    if stored == sent:
        return replica or own
    return own + wire + replica


def scale_bytes(config: RunConfig, shape: tuple[int, ...]) -> int:
    """Of a low-bit weight's float32 scales, which every worker has."""
    return 4 * (prod(shape) // models.scale_every(config.method, shape))


def shard_numel(numel: int, workers: int) -> int:
    """Elements of the first worker's shard under packed ZeRO-3: whole blocks, as many on every worker."""
    return numel if workers == 1 else -(-numel // (BLOCK * workers)) * BLOCK


def _resident_standard(config: RunConfig, model: nn.Module, workers: int, stage: int) -> dict[str, int]:
    """DeepSpeed's stages 0 to 2: whole weights for the passes, gradients that are freed at each step."""
    dtype = compute_dtype(config)
    found = dict.fromkeys(RESIDENT, 0)
    found["buffers"] = _bytes_of(model.buffers())
    numels = [p.numel() for p in model.parameters()]
    if stage == 0:  # float32 weights are updated themselves, others have float32 copies
        found["other_weights"] = sum(numels) * (dtype.itemsize + (4 if dtype != torch.float32 else 0))
        parts = numels
    else:
        n = flat_numel(sum(numels), workers)
        found["other_weights"] = n * dtype.itemsize + n // workers * 4
        parts = [n // workers]
    found["optimizer_states"] = sum(state_bytes(config.optimizer, n) for n in parts)
    return found


def flat_numel(numel: int, workers: int) -> int:
    """Elements of DeepSpeed's flat buffer under stages 1 and 2, padded to two for each worker."""
    return -(-numel // (2 * workers)) * 2 * workers


def _bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())
