"""The first values of all weights: each tensor is made by one worker, and handed out in parts.

To draw a tensor, or to read it from a pretrained folder, and to round it takes the whole of it: its random
numbers come one after another, and its scale is that of all its elements.  So tensors are dealt out, the
largest first, and those of a round are about as large as each other:

    worker 0     draws A, rounds and packs it                       parts of A, B, C     draws D ...
    worker 1     draws B, rounds and packs it       hands out       parts of A, B, C     draws E ...
    worker 2     draws C, rounds and packs it                       parts of A, B, C     draws F ...

No worker holds more than one tensor in full precision, and the values are the same on any number of them.
"""

from collections.abc import Callable, Sequence
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from lowbit_dist.grid import BLOCK
from lowbit_dist.methods.method import Method
from lowbit_dist.packed import PackedTensor
from lowbit_dist.zero.shards import Initial, Shard


def fill(
    shards: Sequence[Shard],  # of every parameter, in the same order on every worker
    initial: Initial,
    method: Method,
    dtype: torch.dtype,  # of the passes, to which first weights are rounded
    *,
    is_cut: bool,  # into equal parts, on block borders
    heartbeat: Callable[[], object],
) -> None:
    """Give a worker's shards their first values; then `engine.refresh`."""
    world, rank = dist.get_world_size(), dist.get_rank()
    ordered = sorted(shards, key=lambda shard: (-prod(shard.shape), shard.name))
    for start in range(0, len(ordered), world):
        few = ordered[start : start + world]
        made = _made(few[rank], initial, method, dtype) if rank < len(few) else None
        heartbeat()
        for maker, shard in enumerate(few):
            _hand_out(shard, made if maker == rank else None, dtype, maker, is_cut=is_cut)
        del made  # before the next one is there
        heartbeat()


def _made(shard: Shard, initial: Initial, method: Method, dtype: torch.dtype) -> PackedTensor | Tensor:
    value = initial(shard.name, torch.Size(shard.shape))
    return value.to(dtype) if shard.codes is None else method.quantize(value)


def _hand_out(
    shard: Shard, made: PackedTensor | Tensor | None, dtype: torch.dtype, maker: int, *, is_cut: bool
) -> None:
    """What one worker has made of a tensor, as bytes: to each worker its part, and all scales."""
    world, numel, grid = dist.get_world_size(), prod(shard.shape), shard.grid
    own, travels = (shard.weight, dtype) if grid is None else (shard.codes, torch.uint8)

    def bytes_of(n: int) -> int:
        return n * dtype.itemsize if grid is None else n // BLOCK * grid.bytes_per_block

    assert own is not None, f"{shard.name} has neither codes nor a weight"
    whole = None
    if made is not None:
        values = made.codes if isinstance(made, PackedTensor) else made.reshape(-1)
        whole = values.view(torch.uint8).to(own.device)
    if is_cut and world > 1:
        size = bytes_of(-(-numel // (BLOCK * world)) * BLOCK)
        parts = None if whole is None else list(pad(whole, (0, world * size - len(whole))).split(size))
        received = torch.empty(size, dtype=torch.uint8, device=own.device)
        dist.scatter(received, parts, src=maker)
        received = received[: bytes_of(shard.numel)]
    else:
        received = whole if whole is not None else own.new_empty(bytes_of(numel), dtype=torch.uint8)
        dist.broadcast(received, src=maker)
        received = received[bytes_of(shard.start) : bytes_of(shard.start + shard.numel)]
    own.copy_(received.view(travels))
    if shard.scale is not None:
        if isinstance(made, PackedTensor):
            shard.scale.copy_(made.scale)
        dist.broadcast(shard.scale, src=maker)
