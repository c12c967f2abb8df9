"""Parameters as shards: cut on block borders, low-bit ones packed, gathered as bytes and decoded where
they are used.
"""

from collections import UserDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import (
    Init,
    MultipleAllGatherHandles,
    PartitionedParamStatus,
    ZeroParamStatus,
    free_param,
)
from torch import Tensor, nn

from lowbit_dist import ops
from lowbit_dist.grid import BLOCK, Grid
from lowbit_dist.packed import PackedTensor

Initial = Callable[[str, torch.Size], Tensor]  # a parameter's first value, float32 on the CPU


@dataclass
class Shard:
    """One worker's part of one parameter: elements [start, start + numel) of the flattened tensor, and their
    moments.

    A low-bit shard has `codes` (and the whole tensor's `scale`), any other the float32 `weight` that the
    optimizer updates.
    """

    name: str
    shape: tuple[int, ...]
    start: int  # a multiple of 256
    numel: int  # without padding; 0 on a worker that holds none of this tensor
    moments: ops.Moments  # of `numel` elements
    grid: Grid | None = None
    codes: Tensor | None = None  # [numel / 256 * bytes_per_block] uint8
    scale: Tensor | None = None  # [1] or [rows] float32
    weight: Tensor | None = None  # [numel] float32

    @property
    def blocks_per_scale(self) -> int:
        assert self.scale is not None, f"{self.name} is not low-bit"
        return prod(self.shape) // BLOCK // len(self.scale)

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


@dataclass
class Packed:
    """The packed side of a low-bit parameter: `param.packed`."""

    grid: Grid
    scale: Tensor  # [1] or [rows] float32
    resident: Tensor  # uint8: this worker's shard, or in replicated mode every worker's, in order
    replicated: bool
    complete: bool = False  # replicated mode: `resident` holds every worker's shard of this step


class Partitioner(Init):
    """DeepSpeed's `zero.Init` for parameters whose shard may be packed codes."""

    def __init__(self, settings: dict[str, Any], dtype: torch.dtype, *, replicated: bool):
        # DeepSpeed would otherwise patch nn.functional.linear for the whole process; lowbit_dist.linear
        # needs no patch.
        super().__init__(dtype=dtype, mem_efficient_linear=False, config_dict_or_path=settings)
        self.compute_dtype = dtype
        self.replicated = replicated
        self.gathered_bytes = 0

    def adopt(
        self, model: nn.Module, initial: Initial, quantize: dict[str, Callable[[Tensor], PackedTensor]]
    ) -> None:
        """Give each parameter its initial value and cut it into shards, one parameter at a time.

        `quantize` has an entry for each low-bit parameter.
        """
        for name, shape, modules in owners(model):
            value = initial(name, shape)
            parameter = nn.Parameter(value.to(self.local_device, self.compute_dtype))
            self._convert_to_deepspeed_param(parameter)
            parameter.lowbit_name = name  # type: ignore[attr-defined]
            if name in quantize:
                self._pack(parameter, quantize[name](value))
            else:
                parameter.partition()  # type: ignore[attr-defined]
            for module, key in modules:
                module._parameters[key] = parameter
        for module in model.modules():
            for key, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[key] = buffer.to(self.local_device)
        # DeepSpeed adopts a registry that is already there.
        model.ds_inflight_param_registry = InflightGathers()  # type: ignore[assignment]

    def _pack(self, parameter: nn.Parameter, whole: PackedTensor) -> None:
        world, rank = dist.get_world_size(), dist.get_rank()
        aligned = self._aligned_size(parameter)
        n = aligned // world
        size = n // BLOCK * whole.grid.bytes_per_block
        codes = torch.zeros(world * size, dtype=torch.uint8)
        codes[: whole.codes.numel()] = whole.codes
        if self.replicated:
            resident = codes.to(self.local_device)
            shard = resident[rank * size : (rank + 1) * size]
        else:
            resident = shard = codes[rank * size : (rank + 1) * size].to(self.local_device, copy=True)
        shard.ds_numel, shard.status, shard.final_location = n, PartitionedParamStatus.AVAILABLE, None  # type: ignore[attr-defined]
        # DeepSpeed's own marker of a shard that is not made of weights: such parameters are gathered apart.
        shard.ds_quant_scale = scale = whole.scale.to(self.local_device)  # type: ignore[attr-defined]
        parameter.packed = Packed(whole.grid, scale, resident, self.replicated, complete=self.replicated)  # type: ignore[attr-defined]
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
        if has_been_updated and hasattr(param, "packed"):
            raise RuntimeError(
                "a low-bit parameter has no dense value to write back; load codes into its shard instead"
            )
        super()._partition_param(param, buffer, has_been_updated=has_been_updated, free_data=free_data)

    def _gather(self, params: Sequence[Any], safe_mode: bool = False, quantize: bool = False) -> "_Gathers":
        """Start gathering shards; a low-bit parameter is decoded when it is waited for, not before."""
        params = sorted(params, key=lambda p: p.ds_id)
        for p in params:
            p.ds_status = ZeroParamStatus.INFLIGHT
        return _Gathers({p: self._gather_one(p) for p in params})

    def _gather_one(self, param: Any) -> "_Gather":
        world, shard = dist.get_world_size(), param.ds_tensor
        packed: Packed | None = getattr(param, "packed", None)
        if world == 1:
            return _Gather(param, shard, None)
        if packed is None or not packed.replicated:
            whole = shard.new_empty(world * shard.numel())
            work = dist.all_gather_into_tensor(whole, shard, async_op=True)
        elif packed.complete:
            return _Gather(param, packed.resident, None)
        else:
            whole = packed.resident
            work = dist.all_gather_into_tensor(whole, shard.clone(), async_op=True)
            packed.complete = True
        if packed is not None:
            self.gathered_bytes += (world - 1) * shard.numel()
        return _Gather(param, whole, work)


class _Gather:
    """The gather of one parameter: every worker's shard, in order."""

    def __init__(self, param: Any, whole: Tensor, work: Any):
        self.param, self.whole, self.work = param, whole, work

    @torch.no_grad()
    def wait(self, handle_dependency: bool = True) -> None:
        param = self.param
        if param.ds_status != ZeroParamStatus.INFLIGHT:
            return
        if self.work is not None:
            self.work.wait()
        weight = self.whole if not hasattr(param, "packed") else self._decoded(param.packed)
        param.data = weight[: param.ds_numel].view(param.ds_shape)
        param.ds_status = ZeroParamStatus.AVAILABLE

    def _decoded(self, packed: Packed) -> Tensor:
        blocks = self.param.ds_numel // BLOCK
        return ops.decode(
            self.whole[: blocks * packed.grid.bytes_per_block],
            packed.scale,
            grid=packed.grid,
            first_block=0,
            blocks_per_scale=blocks // len(packed.scale),
            out=torch.empty(self.param.ds_numel, dtype=self.param.dtype, device=self.whole.device),
        )


class _Gathers(MultipleAllGatherHandles):
    """The gathers of several parameters, started together, each waited for by itself."""

    def __init__(self, gathers: dict[Any, _Gather]):
        super().__init__(list(gathers.values()))
        self.of = gathers


class InflightGathers(UserDict):
    """DeepSpeed's registry of started gathers: waiting for one parameter must not decode those fetched
    ahead with it.
    """

    def __setitem__(self, param: Any, handle: Any) -> None:
        super().__setitem__(param, handle.of[param])


def owners(model: nn.Module) -> Iterator[tuple[str, torch.Size, list[tuple[nn.Module, str]]]]:
    """Each parameter's canonical name, its shape and every (module, attribute) that holds it (tied:
    several).
    """
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((module, key))
    for name, parameter in list(model.named_parameters()):
        yield name, parameter.shape, places[id(parameter)]
