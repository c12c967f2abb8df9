"""Gathers: of a transformer block one collective, whatever it is made of.

What a gather moves of the shards of a block's parameters, packed or not, lies end to end in one buffer of
bytes (`lay_out`), in the order of the parameters.  So do the shards of what stands before the blocks and
after them.

    worker 0   | q_proj | k_proj | ... | down_proj | norm | norm |       one buffer: codes, and bf16 of norms
    worker 1   | q_proj | k_proj | ... | down_proj | norm | norm |
    gathered   | worker 0's                        | worker 1's  |       on each worker, in one collective
    q_proj     | =====                             | =====       |       [workers, bytes]: a view of it

Neighbours are gathered together (`Gathers`).  Codes stay in that buffer until the block is released, and a
layer that decodes a weight reads its columns; ordinary parameters are copied out of it.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import Tensor, nn

from lowbit_dist.model import blocks_of


def packed_of(param: Any) -> Any:  # -> shards.Packed | None
    """The packed side of a parameter; None of an ordinary one."""
    return getattr(param, "packed", None)


def units(model: nn.Module) -> list[list[Any]]:
    """The parameters that are gathered together: those of a block, and what stands between blocks."""
    block_of = {p: i for i, block in enumerate(blocks_of(model)) for p in block.parameters()}
    parameters = list(model.parameters())
    if not block_of:
        return [[p] for p in parameters]
    return [list(unit) for _, unit in groupby(parameters, lambda p: block_of.get(p))]


def lay_out(model: nn.Module) -> None:
    """Let the shards of a unit, which are gathered together, lie end to end; a parameter knows its unit."""
    world, rank = dist.get_world_size(), dist.get_rank()
    for unit in units(model):
        for param in unit:
            param.unit = unit
        if world == 1:
            continue
        # A worker's codes lie among those of the others, which it keeps.
        replicated = [p for p in unit if _is_replicated(p)]
        if replicated:
            sizes = [wire_of(p).numel() for p in replicated]
            replicas = wire_of(replicated[0]).new_empty(world, sum(sizes)).split(sizes, dim=1)
            for p, replica in zip(replicated, replicas, strict=True):
                p.packed.replica = replica.copy_(p.packed.replica)
                p.packed.move(replica[rank])
        _lay_end_to_end([p for p in unit if not _is_replicated(p)])


def _is_replicated(param: Any) -> bool:
    packed = packed_of(param)
    return packed is not None and packed.replica is not None and packed.wire is packed.own


def _lay_end_to_end(params: Sequence[Any]) -> None:
    """Move what gathers move of some parameters into one buffer."""
    sizes = [wire_of(p).numel() for p in params]
    if sizes:
        places = wire_of(params[0]).new_empty(sum(sizes)).split(sizes)
        for p, place in zip(params, places, strict=True):
            if (packed := packed_of(p)) is not None:
                packed.move(place)
            else:
                p.ds_tensor.data = place.copy_(wire_of(p)).view(p.ds_tensor.dtype)


def lay_wires(model: nn.Module) -> None:
    """The same of the codes that have been made to be sent, which are others than before."""
    if dist.get_world_size() > 1:
        for unit in units(model):
            packed = [(p, packed_of(p)) for p in unit]
            _lay_end_to_end([p for p, side in packed if side is not None and side.wire is not side.own])


def wire_of(param: Any) -> Tensor:  # [bytes] uint8
    """What a gather moves of a worker's shard."""
    packed = packed_of(param)
    moved: Tensor = param.ds_tensor.detach().view(torch.uint8) if packed is None else packed.wire
    return moved


def _runs(params: Sequence[Any]) -> list[list[Any]]:
    """Parameters, of which what is sent of each begins where that of the one before it ends."""
    neighbours: list[list[Any]] = []
    end = None
    for p in params:
        shard = wire_of(p)
        storage, start = shard.untyped_storage()._cdata, shard.storage_offset()
        if (storage, start) == end:
            neighbours[-1].append(p)
        else:
            neighbours.append([p])
        end = (storage, start + shard.numel())
    return neighbours


class Gathers:
    """The gathers of several parameters, started together; a low-bit one that no layer decodes is decoded
    when it is waited for, not before.
    """

    def __init__(self, params: Sequence[Any]):
        # What every worker sent of a parameter [workers, bytes], and the collective that brings it, if any.
        self.of: dict[Any, tuple[Tensor, _Work | None]] = {}
        self.packed_bytes = 0  # that this worker receives
        world, missing = dist.get_world_size(), []
        for p in sorted(params, key=lambda p: p.ds_id):
            p.ds_status = ZeroParamStatus.INFLIGHT
            packed = packed_of(p)
            if packed is not None and packed.replica is not None and packed.complete:
                self.of[p] = packed.replica, None
            elif world == 1:
                self.of[p] = wire_of(p)[None], None
            else:
                missing.append(p)
        for run in _runs(missing):
            work = _Work([wire_of(p) for p in run])
            self.of |= {p: (part, work) for p, part in zip(run, work.parts, strict=True)}
            packed_bytes = sum(wire_of(p).numel() for p in run if packed_of(p) is not None)
            self.packed_bytes += (world - 1) * packed_bytes

    @torch.no_grad()
    def wait(self, params: Iterable[Any] | None = None) -> None:
        """Some of the parameters are there, by default all; in the stream that reads them.

        The allocator is not told of that stream (`record_stream`): what reuses this memory is a later gather,
        which waits for it (coordinator.py).
        """
        for p in self.of if params is None else params:
            if p.ds_status is not ZeroParamStatus.INFLIGHT:
                continue
            whole, work = self.of[p]
            if work is not None:
                work.wait()
            _unpack(p, packed_of(p), whole)
            p.ds_status = ZeroParamStatus.AVAILABLE

    def drop(self, params: Iterable[Any]) -> None:
        """Some of the parameters are not wanted; other workers wait for what this one sends."""
        for p in params:
            _, work = self.of[p]
            if work is not None:
                work.wait()
            p.ds_status = ZeroParamStatus.NOT_AVAILABLE


@contextmanager
def gathered_alone(param: Any) -> Iterator[None]:
    """Inside, a parameter is there, between passes; on every worker at once."""
    param.all_gather()
    try:
        yield
    finally:
        param.partition()


def _unpack(param: Any, packed: Any, whole: Tensor) -> None:
    if packed is None:
        param.data = whole.reshape(-1).view(param.dtype)[: param.ds_numel].view(param.ds_shape)
        return
    packed.whole = packed.arrived(whole)
    if packed.in_layer:
        # One element of storage stands for the weight: autograd wants its shape alone.
        param.data = packed.stub.expand(param.ds_shape)
    else:
        param.data = packed.dense(param.ds_shape, param.dtype)
        packed.whole = None


class _Work:
    """One collective: what every worker sends of some parameters whose shards lie end to end."""

    def __init__(self, shards: Sequence[Tensor]):
        sizes = [shard.numel() for shard in shards]
        own = shards[0].as_strided((sum(sizes),), (1,))
        whole = own.new_empty(dist.get_world_size() * sum(sizes))
        self.work: Any = dist.all_gather_into_tensor(whole, own, async_op=True)
        self.parts = whole.view(-1, sum(sizes)).split(sizes, dim=1)

    def wait(self) -> None:
        """Once: what it brings is there for all of its parameters."""
        if self.work is not None:
            self.work.wait()
            self.work = None
