"""Parameters as shards: cut on block borders, low-bit ones packed, gathered as bytes, decoded by their layer.

A low-bit tensor is flattened and packed in blocks of 256 consecutive elements, each of four *planes* of 64
that lie side by side: byte j of a ternary block holds elements j, 64 + j, 128 + j and 192 + j.  A block is
the atom of all that is shared: its elements share bytes, Philox calls, a scale of each 8-bit optimizer slot,
and a plane shares a scale of the weight.  So shards are cut on block borders only, and a step on a shard has
the bits of the step on the tensor (`first_block` says where it begins), whatever the number of workers.

What two workers hold of a ternary weight [5, 256], which is 1,280 elements and padded to a multiple of
2 * 256, and what its layer sees between gather and release:

    element      0         256       512       768       1024      1280      1536
    tensor       | block 0 | block 1 | block 2 | block 3 | block 4 |             5 * 64 = 320 bytes of codes
    worker 0     |#########|#########|#########|                                 ds_tensor: 192 bytes
    worker 1                                   |#########|#########| zeros   |   192 bytes, 512 elements
    gathered     |#########|#########|#########|#########|#########| zeros   |   384 bytes on each worker
    weight.data  one zero, seen as [5, 256]                                      the stub: 2 bytes in bf16
    in linear    scale * level, [5, 256] in bf16                                 2,560 bytes for one matmul

1. At the start each worker has room for its own blocks (`Packed.own`, which DeepSpeed knows as `ds_tensor`)
   and for all scales, which are few.  Their first values are made by one worker for all (first.py), or come
   from a checkpoint.
2. Before a transformer block runs, its parameters are gathered, in one collective (coordinator.py).  Of a
   low-bit one the codes are gathered: each worker receives 192 bytes here, where bf16 weights would be 1,536.
   They wait in `weight.packed.whole`.
3. Autograd asks a weight for its shape and dtype, and nobody reads its values: `weight.data` is the *stub*,
   one zero that is expanded to the shape.  The layer asks `Packed.dense` inside its matmul (linear.py), and
   again in the backward pass.  A low-bit tensor that no layer decodes, as an embedding, is decoded when its
   gather is waited for.
4. Release drops the gathered codes.  The gradient, dense, is reduced into each worker's part, and the update
   changes its codes in place: 768 elements with their optimizer slots on worker 0, 512 on worker 1.

`replicated` keeps the gathered codes, so that a step gathers once.  A method whose forward grid is coarser
than its stored one sends that (`wire`, made by `Method.sent`) instead of its shard.

DeepSpeed's hooks say when, and it buckets gradients; here is only what a shard is made of.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import (
    Init,
    PartitionedParamStatus,
    ZeroParamStatus,
    free_param,
)
from torch import Tensor, nn

from lowbit_dist import ops
from lowbit_dist.grid import BLOCK, Grid
from lowbit_dist.linear import decodes
from lowbit_dist.methods.method import Method
from lowbit_dist.model import n_scales
from lowbit_dist.packed import PackedShard
from lowbit_dist.zero.gathers import Gathers, lay_out, packed_of

# A parameter's first value, float32 on the CPU: of its name and shape, and memory in which it may be made.
Initial = Callable[[str, torch.Size, Tensor | None], Tensor]


@dataclass
class Shard:
    """One worker's part of one parameter: elements [start, start + numel) of the flattened tensor, and the
    optimizer's state of them.

    A low-bit shard has `codes` (and the whole tensor's `scale`), any other the float32 `weight` that the
    optimizer updates.
    """

    name: str
    shape: tuple[int, ...]
    start: int  # a multiple of 256
    numel: int  # without padding; 0 on a worker that holds none of this tensor
    state: list[ops.Stored]  # the optimizer's slots: of `numel` elements, or of the tensor's rows or columns
    grid: Grid | None = None
    codes: Tensor | None = None  # [numel / 256 * bytes_per_block] uint8
    scale: Tensor | None = None  # [numel of the tensor / scale_every] float32
    scale_every: int = 0
    weight: Tensor | None = None  # [numel] float32
    accumulator: ops.Accumulator | None = None  # the last of `state` is then the codes' residual

    @property
    def slots(self) -> list[ops.Stored]:
        """The state that is the rule's."""
        return self.state if self.accumulator is None else self.state[:-1]

    def target(
        self, tensor: int, next_scale: Tensor | None = None, flips: Tensor | None = None
    ) -> ops.Codes | ops.Weights:
        """What an update changes; `tensor` is the parameter's number in the random counter, `next_scale` what
        the codes' scale will be if it changes, too, `flips` where they may be counted.
        """
        if self.codes is None:
            assert self.weight is not None, f"{self.name} has neither codes nor a weight"
            return ops.Weights(self.weight)
        assert self.scale is not None and self.grid is not None, (
            f"{self.name} has codes without scale or grid"
        )
        return ops.Codes(
            self.codes,
            self.scale,
            self.scale_every,
            self.grid,
            tensor=tensor,
            first_block=self.start // BLOCK,
            residual=self.accumulator and ops.Residual(self.state[-1].values, self.accumulator),
            next_scale=next_scale,
            flips=flips,
        )

    def level_counts(self) -> Tensor:  # [grid.n_levels] int64, on the device
        """How many elements are at each level, from the lowest up.

        RuntimeError if a code stands for no level, which no update makes.
        """
        assert self.codes is not None and self.grid is not None, f"{self.name} is not low-bit"
        counts = ops.code_counts(self.codes, grid=self.grid)
        if (inside := int(counts.sum())) != self.numel:
            raise RuntimeError(
                f"{self.numel - inside:,} codes of {self.name} are none of the grid {self.grid.name}: memory "
                "or a file was damaged"
            )
        return counts


class Packed:
    """The packed side of a low-bit parameter: `param.packed`."""

    def __init__(
        self,
        shape: tuple[int, ...],
        n_scales: int,
        padded: int,  # elements of all workers' shards together
        dtype: torch.dtype,  # in which its layer multiplies
        device: torch.device,
        *,
        method: Method,  # which says what a gather moves
        replicated: bool,
        in_layer: bool,  # its layer decodes it; else it is decoded when it is gathered
    ):
        world, rank = dist.get_world_size(), dist.get_rank()
        grid, self.numel = method.stored, padded // world
        assert grid is not None, "a low-bit parameter is stored on a grid"
        self.in_layer = in_layer
        self.stub = torch.zeros(
            1, dtype=dtype, device=device
        )  # of a gathered weight, in the place of its values
        size = self.numel // BLOCK * grid.bytes_per_block
        self.own = torch.zeros(size, dtype=torch.uint8, device=device)  # this worker's codes, with padding
        first, numel = rank * self.numel // BLOCK, prod(shape)
        n_blocks = max(0, min(self.numel // BLOCK, numel // BLOCK - first))
        codes, scale = self.own[: n_blocks * grid.bytes_per_block], torch.ones(n_scales, device=device)
        self.stored = PackedShard(codes, scale, numel // n_scales, grid, shape, first, over_workers=True)
        self.sent, self.wire = self.stored, self.own  # what a gather moves, without and with padding
        self.replica: Tensor | None = None  # replicated: what every worker sends [workers, bytes]
        self.whole: Tensor | None = None  # what every worker sent, from the parameter's gather to its release
        self.refresh(method)
        if replicated:
            self.replica = self.wire.new_zeros(world, self.wire.numel())
            if self.wire is self.own:
                self.move(self.replica[rank])

    def refresh(self, method: Method) -> None:
        """Let the next gather move what the codes have become; on every worker."""
        self.complete = False  # replicated: whether `replica` is of this step
        if method.sent_grid == method.stored:
            self.sent, self.wire = self.stored, self.own
            return
        sent = method.sent(self.stored)
        if sent.grid != self.sent.grid:
            self.wire = self.own.new_zeros(self.numel // BLOCK * sent.grid.bytes_per_block)
        codes = self.wire[: sent.codes.numel()].copy_(sent.codes)
        self.sent = replace(sent, codes=codes)

    def arrived(self, whole: Tensor) -> Tensor:  # [workers, bytes] uint8, both
        """What every worker sent, from where it is read."""
        if self.replica is not None and not self.complete:
            self.replica.copy_(whole)
            self.complete = True
        return whole if self.replica is None else self.replica

    def move(self, place: Tensor) -> None:
        """Let what a gather moves, and the codes with it if it moves them, lie in `place`."""
        place.copy_(self.wire)
        self.wire.data = place
        self.sent = replace(self.sent, codes=place[: self.sent.codes.numel()])
        if self.wire is self.own:
            self.stored = self.sent

    @property
    def resident(self) -> list[Tensor]:
        """All the packed bytes that this worker keeps between steps."""
        return [self.own, self.wire, *([] if self.replica is None else self.replica)]

    def levels(self, shape: torch.Size) -> tuple[Tensor, Tensor]:  # `shape` int8, [scales] float32
        """The weight's levels and scales, of what was gathered."""
        return ops.unpack(self._codes(shape), grid=self.sent.grid).view(shape), self.sent.scale

    def dense(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """The weight's values, decoded from what was gathered."""
        return ops.decode(
            self._codes(shape),
            self.sent.scale,
            grid=self.sent.grid,
            first_block=0,
            scale_every=self.sent.scale_every,
            out=torch.empty(prod(shape), dtype=dtype, device=self.own.device),
        ).view(shape)

    def _codes(self, shape: torch.Size) -> Tensor:  # [numel / 256 * bytes_per_block] uint8
        assert self.whole is not None, "a weight is decoded between its gather and its release"
        return self.whole.reshape(-1)[: prod(shape) // BLOCK * self.sent.grid.bytes_per_block]


class Partitioner(Init):
    """DeepSpeed's `zero.Init` for parameters whose shard may be packed codes."""

    def __init__(self, settings: dict[str, Any], dtype: torch.dtype, *, replicated: bool):
        # DeepSpeed would otherwise patch nn.functional.linear for the whole process; lowbit_dist.linear
        # needs no patch.
        super().__init__(dtype=dtype, mem_efficient_linear=False, config_dict_or_path=settings)
        self.compute_dtype = dtype
        self.replicated = replicated
        self.gathered_bytes = 0

    def adopt(self, model: nn.Module, method: Method, low_bit: Collection[str]) -> None:
        """Make each parameter's shard, one parameter at a time, of zeros; those that `low_bit` names are
        packed.
        """
        for name, shape, modules in owners(model):
            zeros = torch.zeros(shape, dtype=self.compute_dtype, device=self.local_device)
            parameter = nn.Parameter(zeros)
            self._convert_to_deepspeed_param(parameter)
            parameter.lowbit_name = name  # type: ignore[attr-defined]
            if name in low_bit:
                in_layer = all(decodes(module) for module, _ in modules)
                self._pack(parameter, in_layer, method)
            else:
                parameter.partition()  # type: ignore[attr-defined]
            for module, key in modules:
                module._parameters[key] = parameter
        for module in model.modules():
            for key, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[key] = buffer.to(self.local_device)
        lay_out(model)

    def _pack(self, parameter: nn.Parameter, in_layer: bool, method: Method) -> None:
        aligned, shape = self._aligned_size(parameter), tuple(parameter.shape)
        packed = Packed(
            shape,
            n_scales(method, shape),
            aligned,
            self.compute_dtype,
            self.local_device,
            method=method,
            replicated=self.replicated,
            in_layer=in_layer,
        )
        shard: Any = packed.own
        shard.ds_numel = packed.numel
        shard.status, shard.final_location = PartitionedParamStatus.AVAILABLE, None
        parameter.packed = packed  # type: ignore[attr-defined]
        parameter.ds_tensor = shard  # type: ignore[attr-defined]
        parameter.ds_numel_aligned = aligned  # type: ignore[attr-defined]
        free_param(parameter)
        parameter.ds_status = ZeroParamStatus.NOT_AVAILABLE  # type: ignore[attr-defined]

    def _padding_size(self, param: Any) -> int:
        """Shards end on block borders, whatever the number of workers.  A single worker's needs no
        padding.
        """
        world = dist.get_world_size()
        return 0 if world == 1 else -param.ds_numel % (BLOCK * world)

    def _convert_to_deepspeed_param(self, param: Any) -> None:
        super()._convert_to_deepspeed_param(param)
        param.all_gather_coalesced = self._gather

    def _all_gather(
        self, param_list: list[Any], async_op: bool = False, hierarchy: int | None = None
    ) -> None:
        self._gather([p for p in param_list if p.ds_status == ZeroParamStatus.NOT_AVAILABLE]).wait()

    def _partition_param(
        self, param: Any, buffer: Any = None, has_been_updated: bool = False, free_data: bool = True
    ) -> None:
        if has_been_updated and packed_of(param) is not None:
            raise RuntimeError(
                "a low-bit parameter has no dense value to write back; load codes into its shard instead"
            )
        super()._partition_param(param, buffer, has_been_updated=has_been_updated, free_data=free_data)
        if free_data and (packed := packed_of(param)) is not None:
            packed.whole = None

    def _gather(self, params: Sequence[Any], safe_mode: bool = False, quantize: bool = False) -> Gathers:
        started = Gathers(params)
        self.gathered_bytes += started.packed_bytes
        return started


def owners(model: nn.Module) -> Iterator[tuple[str, torch.Size, list[tuple[nn.Module, str]]]]:
    """Each parameter's canonical name, its shape and every (module, attribute) that holds it (tied:
    several).
    """
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((module, key))
    for name, parameter in list(model.named_parameters()):
        yield name, parameter.shape, owners[id(parameter)]
