"""What a worker keeps allocated between steps: arithmetic on the shapes of a model's parameters."""

from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lowbit_dist import model as models
from lowbit_dist import ops
from lowbit_dist.config import RunConfig
from lowbit_dist.grid import BLOCK, Grid
from lowbit_dist.memory.report import RESIDENT, Parameters

META = torch.device("meta")


class Storage(NamedTuple):
    """How a method stores its low-bit weights."""

    grid: Grid
    scale_per_row: bool


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


def storage(config: RunConfig) -> Storage:
    """Found by packing two rows of zeros."""
    sample = config.method.quantize(torch.zeros(2, BLOCK))
    return Storage(sample.grid, scale_per_row=len(sample.scale) == 2)


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
        return _resident_stock(config, model, workers, stage)
    low_bit = set(low_bit_names(config, model))
    stored = storage(config) if low_bit else None
    dtype, accumulation = compute_dtype(config), accumulation_dtype(config, workers)
    found = dict.fromkeys(RESIDENT, 0)
    for name, p in model.named_parameters():
        part = shard_numel(p.numel(), workers)
        if stored is not None and name in low_bit:
            copies = workers if config.zero.residency == "replicated" else 1
            found["low_bit_weights"] += copies * part // BLOCK * stored.grid.bytes_per_block
            found["scales"] += 4 * (p.numel() // p.shape[-1] if stored.scale_per_row else 1)
        else:
            # In float32 the shard itself is updated; in bf16 a float32 shard stands behind it.
            found["other_weights"] += part * (dtype.itemsize + (4 if dtype != torch.float32 else 0))
        found["gradients"] += part * accumulation.itemsize
        mine = min(part, p.numel())
        found["optimizer_states"] += ops.Moments.zeros(mine, config.optimizer.states, META).nbytes
    found["buffers"] = _bytes_of(model.buffers())
    return found


def shard_numel(numel: int, workers: int) -> int:
    """Elements of the first worker's shard under packed ZeRO-3: whole blocks, as many on every worker."""
    return numel if workers == 1 else -(-numel // (BLOCK * workers)) * BLOCK


def _resident_stock(config: RunConfig, model: nn.Module, workers: int, stage: int) -> dict[str, int]:
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
    states = config.optimizer.states
    found["optimizer_states"] = sum(ops.Moments.zeros(n, states, META).nbytes for n in parts)
    return found


def flat_numel(numel: int, workers: int) -> int:
    """Elements of DeepSpeed's flat buffer under stages 1 and 2, padded to two for each worker."""
    return -(-numel // (2 * workers)) * 2 * workers


def _bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())
