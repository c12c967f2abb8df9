"""DeepSpeed ZeRO with packed low-bit shards: the only file that knows DeepSpeed.

Under stage 3 a low-bit weight is an ordinary `nn.Parameter` whose shard (`ds_tensor`) IS its packed codes.  DeepSpeed's hooks
gather, release, bucket and accumulate; overridden here is only what a shard is made of:

* `_Partitioner` (DeepSpeed's `zero.Init`) turns each parameter into its shard as soon as it has a value, cuts shards on
  borders of 256 elements, and gathers packed bytes, decoded when the layer that needs them runs.
* `_Zero3` (DeepSpeed's stage-3 optimizer) keeps no full-precision partition for low-bit parameters, sums gradients
  instead of averaging them, and updates every shard in place with `lowbit_dist.ops`.

Latent-weight methods run on the same stage 3 (without a packed parameter) or on DeepSpeed's own stages 0 to 2.

What makes a run independent of the number of workers: shards end on block borders, gradients are summed over micro-batches
and workers and divided once, the gradient norm is a sum of integers, and random bits are a function of position.
"""

import importlib
import inspect
import os
from collections import UserDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lowbit_dist import ops
from lowbit_dist.config import RunConfig
from lowbit_dist.grid import BLOCK, Grid
from lowbit_dist.methods import Method
from lowbit_dist.packed import PackedTensor

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

import deepspeed  # noqa: E402  (reads DS_ACCELERATOR when imported)
from deepspeed.runtime.config import DeepSpeedConfig  # noqa: E402
from deepspeed.runtime.engine import DeepSpeedEngine  # noqa: E402
from deepspeed.runtime.zero import partition_parameters, stage3  # noqa: E402
from deepspeed.runtime.zero.partition_parameters import (  # noqa: E402
    Init,
    MultipleAllGatherHandles,
    PartitionedParamStatus,
    ZeroParamStatus,
    free_param,
)

DEEPSPEED_VERSION = "0.19.8"
_Stage3 = stage3.DeepSpeedZeroOptimizer_Stage3

# Private methods overridden or called below, with the parameters they must have ("args, kwargs": DeepSpeed's own
# tracing decorator hides them).
_CONTRACT: tuple[tuple[type, str, str], ...] = (
    (Init, "_padding_size", "self, param"),
    (Init, "_aligned_size", "self, param"),
    (Init, "_convert_to_deepspeed_param", "self, param"),
    (Init, "_all_gather", "args, kwargs"),
    (Init, "_partition_param", "args, kwargs"),
    (_Stage3, "_get_parameter_partitions", "self"),
    (_Stage3, "_set_fp16_partitioned_groups_flat", "self"),
    (_Stage3, "_create_fp32_partitions", "self"),
    (_Stage3, "initialize_optimizer_states", "self"),
    (_Stage3, "_DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads", "args, kwargs"),
    (_Stage3, "_pre_step", "self"),
    (_Stage3, "_partition_all_parameters", "args, kwargs"),
    (_Stage3, "zero_grad", "args, kwargs"),
    (_Stage3, "step", "args, kwargs"),
    (DeepSpeedEngine, "_configure_zero_optimizer", "self, optimizer"),
)


def check_deepspeed() -> None:
    """RuntimeError naming what moved, unless DeepSpeed is the version this file was written against."""
    if deepspeed.__version__ != DEEPSPEED_VERSION:
        raise RuntimeError(
            f"DeepSpeed {deepspeed.__version__} is installed; packed ZeRO-3 overrides private methods of "
            f"{DEEPSPEED_VERSION}: pip install deepspeed=={DEEPSPEED_VERSION}"
        )
    for owner, name, expected in _CONTRACT:
        method = getattr(owner, name, None)
        found = None if method is None else ", ".join(inspect.signature(method).parameters)
        if found != expected:
            raise RuntimeError(
                f"DeepSpeed's {owner.__name__}.{name} takes ({found}), packed ZeRO-3 expects ({expected})"
            )


@dataclass
class Shard:
    """One worker's part of one parameter: elements [start, start + numel) of the flattened tensor, and their moments.

    A low-bit shard has `codes` (and the whole tensor's `scale`), any other the float32 `weight` that the optimizer updates.
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
    after_load: Callable[[], None] = lambda: None  # tells the engine that the weights were changed from outside

    @property
    def blocks_per_scale(self) -> int:
        assert self.scale is not None, f"{self.name} is not low-bit"
        return _numel(self.shape) // BLOCK // len(self.scale)


@dataclass(frozen=True)
class Update:
    """What one optimizer step did, over all workers."""

    grad_norm: float  # before clipping, of the mean gradient of the step
    flips: int  # codes that changed
    skipped: bool  # the gradient was not finite: nothing was changed


class Engine:
    """A model under ZeRO: `backward` on each micro-batch, then `update` once a step."""

    def __init__(
        self,
        config: RunConfig,
        model: nn.Module,
        method: Method,
        initial: Callable[[str, torch.Size], Tensor],
        low_bit: Sequence[str],
    ):
        check_deepspeed()
        _init_comm()
        self.config = config
        self.world, self.rank = dist.get_world_size(), dist.get_rank()
        self.micro_batches = config.micro_batches
        if config.train.activation_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
        self.numels = {name: p.numel() for name, p in model.named_parameters()}
        self.tensor_ids = {name: i for i, name in enumerate(sorted(self.numels))}
        stage = 3 if config.zero.stage is None else config.zero.stage
        settings = _deepspeed_settings(config, model, stage, self.world)
        dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        if stage == 3:
            self._partitioner = _Partitioner(settings, dtype, replicated=config.zero.residency == "replicated")
            model = self._partitioner.adopt(model, initial, dict.fromkeys(low_bit, method))
            model.ds_inflight_param_registry = _InflightGathers()  # type: ignore[assignment]
        else:
            _materialize(model, initial, dtype, _device())
        packed, ordinary = [], []
        for name, parameter in model.named_parameters():
            parameter.lowbit_name = name  # type: ignore[attr-defined]
            (packed if name in set(low_bit) else ordinary).append(parameter)
        groups = [{"params": group} for group in (ordinary, packed) if group]
        optimizer = _AdamW(groups, config) if stage < 3 else _Unused(groups)
        self._engine = _DeepSpeedEngine(
            model,
            optimizer,
            settings,
            stage3_class=partial(_Zero3, accumulation=_accumulation_dtype(config, self.world)),
        )
        self.module: nn.Module = self._engine.module
        self._optimizer = self._engine.optimizer
        self._stock = optimizer if stage < 3 else None
        if stage == 3:
            self.shards = self._optimizer.make_shards(config, self.tensor_ids)
        else:
            self.shards = _stock_shards(self._engine, optimizer, stage)

    # ---- the step

    def forward(self, tokens: Tensor) -> Tensor:  # [micro_batch, seq_len] int64 -> mean negative log-likelihood, nats
        """Loss without gradients, in evaluation mode."""
        self._engine.eval()
        with torch.no_grad():
            loss = self._engine(input_ids=tokens, labels=tokens).loss
        self._engine.train()
        return loss.detach()

    def backward(self, tokens: Tensor) -> Tensor:  # [micro_batch, seq_len] int64 -> mean negative log-likelihood, nats
        """Forward and backward of one micro-batch; gradients are added to the step's sum."""
        loss = self._engine(input_ids=tokens, labels=tokens).loss
        if self._stock is None:
            self._engine.backward(loss, scale_wrt_gas=False)
        else:
            self._engine.backward(loss)
        self._last = loss.detach()
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()  # counts the micro-batch
        return self._last

    def update(self, *, step: int, lr: float, weight_decay: float) -> Update:
        """One AdamW step with the mean gradient of the step's micro-batches, clipped to `train.clip_norm`."""
        optimizer = self.config.optimizer
        now = ops.AdamWStep(
            lr=lr,
            beta1=optimizer.betas[0],
            beta2=optimizer.betas[1],
            eps=optimizer.eps,
            weight_decay=weight_decay,
            step=step,
            seed=self.config.run.seed,
        )
        if self._stock is None:
            self._optimizer.now = now
            self._engine.step()
            return self._optimizer.last_update
        self._stock.now = now
        self._engine.step()
        norm = float(self._engine.get_global_grad_norm() or 0.0)
        return Update(norm, 0, skipped=self._stock.skipped)

    # ---- what is resident

    def gradients(self) -> list[Tensor]:
        """Buffers that hold gradients between steps."""
        if self._stock is None:
            return [self._optimizer.grad_partitions_flat_buffer]
        return _stock_gradients(self._engine)

    def forward_weights(self) -> list[Tensor]:
        """Resident weights of the compute precision, beside the float32 ones that `shards` holds."""
        if self._stock is None:
            return [p.ds_tensor for p in self.module.parameters() if not hasattr(p, "packed")]
        return [p.data for p in self.module.parameters()]

    def resident_codes(self) -> list[Tensor]:
        """The packed bytes this worker keeps between steps."""
        return [p.packed.resident for p in self.module.parameters() if hasattr(p, "packed")]  # type: ignore[union-attr]

    @property
    def gathered_bytes(self) -> int:
        """Packed bytes this worker received in gathers since the start."""
        return self._partitioner.gathered_bytes if self._stock is None else 0

    def close(self) -> None:
        """Remove DeepSpeed's hooks, so that another engine can be made in this process."""
        self._engine.destroy()


# ------------------------------------------------------------------ parameters to shards


@dataclass
class _Packed:
    """The packed side of a low-bit parameter: `param.packed`."""

    grid: Grid
    scale: Tensor  # [1] or [rows] float32
    resident: Tensor  # uint8: this worker's shard, or in replicated mode every worker's, in order
    replicated: bool
    complete: bool = False  # replicated mode: `resident` holds every worker's shard of this step


class _Partitioner(Init):
    """DeepSpeed's `zero.Init` for parameters whose shard may be packed codes."""

    def __init__(self, settings: dict[str, Any], dtype: torch.dtype, *, replicated: bool):
        # DeepSpeed would otherwise patch nn.functional.linear for the whole process; lowbit_dist.linear needs no patch.
        super().__init__(dtype=dtype, mem_efficient_linear=False, config_dict_or_path=settings)
        self.compute_dtype = dtype
        self.replicated = replicated
        self.gathered_bytes = 0

    def adopt(
        self, model: nn.Module, initial: Callable[[str, torch.Size], Tensor], low_bit: dict[str, Method]
    ) -> nn.Module:
        """Give each parameter its initial value and cut it into shards, one parameter at a time."""
        for name, modules in _owners(model):
            shape = modules[0][0]._parameters[modules[0][1]].shape  # type: ignore[union-attr]
            value = initial(name, shape)
            parameter = nn.Parameter(value.to(self.local_device, self.compute_dtype))
            self._convert_to_deepspeed_param(parameter)
            if name in low_bit:
                self._pack(parameter, low_bit[name].quantize(value))  # type: ignore[union-attr]
            else:
                parameter.partition()  # type: ignore[attr-defined]
            for module, key in modules:
                module._parameters[key] = parameter
        for module in model.modules():
            for key, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[key] = buffer.to(self.local_device)
        return model

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
        parameter.packed = _Packed(whole.grid, scale, resident, self.replicated, complete=self.replicated)  # type: ignore[attr-defined]
        parameter.ds_tensor = shard  # type: ignore[attr-defined]
        parameter.ds_numel_aligned = aligned  # type: ignore[attr-defined]
        free_param(parameter)
        parameter.ds_status = ZeroParamStatus.NOT_AVAILABLE  # type: ignore[attr-defined]

    def _padding_size(self, param: Any) -> int:
        """Shards end on block borders, whatever the number of workers.  A single worker's needs no padding."""
        world = dist.get_world_size()
        return 0 if world == 1 else -param.ds_numel % (BLOCK * world)

    def _convert_to_deepspeed_param(self, param: Any) -> None:
        super()._convert_to_deepspeed_param(param)
        param.all_gather_coalesced = self._gather

    def _all_gather(self, param_list: list[Any], async_op: bool = False, hierarchy: int | None = None) -> None:
        self._gather([p for p in param_list if p.ds_status == ZeroParamStatus.NOT_AVAILABLE]).wait()

    def _partition_param(
        self, param: Any, buffer: Any = None, has_been_updated: bool = False, free_data: bool = True
    ) -> None:
        if has_been_updated and hasattr(param, "packed"):
            raise RuntimeError("a low-bit parameter has no dense value to write back; load codes into its shard instead")
        super()._partition_param(param, buffer, has_been_updated=has_been_updated, free_data=free_data)

    def _gather(self, params: Sequence[Any], safe_mode: bool = False, quantize: bool = False) -> "_Gathers":
        """Start gathering shards; a low-bit parameter is decoded when it is waited for, not before."""
        params = sorted(params, key=lambda p: p.ds_id)
        for p in params:
            p.ds_status = ZeroParamStatus.INFLIGHT
        return _Gathers({p: self._gather_one(p) for p in params})

    def _gather_one(self, param: Any) -> "_Gather":
        world, shard = dist.get_world_size(), param.ds_tensor
        packed: _Packed | None = getattr(param, "packed", None)
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

    def _decoded(self, packed: _Packed) -> Tensor:
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


class _InflightGathers(UserDict):
    """DeepSpeed's registry of started gathers: waiting for one parameter must not decode those fetched ahead with it."""

    def __setitem__(self, param: Any, handle: Any) -> None:
        super().__setitem__(param, handle.of[param])


def _owners(model: nn.Module) -> Iterator[tuple[str, list[tuple[nn.Module, str]]]]:
    """Each parameter's canonical name and every (module, attribute) that holds it (tied weights have several)."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((module, key))
    for name, parameter in list(model.named_parameters()):
        yield name, places[id(parameter)]


# ------------------------------------------------------------------ gradients and the update


class _Zero3(_Stage3):
    """DeepSpeed's stage-3 optimizer without full-precision partitions for low-bit parameters."""

    now: ops.AdamWStep
    last_update: Update
    shards: list[Shard]

    def __init__(self, *args: Any, accumulation: torch.dtype, **kwargs: Any):
        kwargs["gradient_accumulation_dtype"] = accumulation
        super().__init__(*args, **kwargs)

    # ---- shards instead of partitions

    def _get_parameter_partitions(self) -> list[Tensor]:
        ordinary = [p.ds_tensor for group in self.fp16_groups for p in group if not hasattr(p, "packed")]
        return ordinary or [torch.empty(0, dtype=self.dtype, device=self.device)]  # method.tensors: all

    def _set_fp16_partitioned_groups_flat(self) -> None:
        offset = 0
        for group in self.fp16_groups:
            n = sum(p.partition_numel() for p in group)
            if hasattr(group[0], "packed"):
                self.fp16_partitioned_groups_flat.append(torch.zeros(1, dtype=torch.uint8).expand(n))
            else:
                self.fp16_partitioned_groups_flat.append(self.lp_param_buffer.narrow(0, offset, n))
                offset += n

    def _create_fp32_partitions(self) -> None:
        for i, flat in enumerate(self.fp16_partitioned_groups_flat):
            if hasattr(self.fp16_groups[i][0], "packed"):
                # DeepSpeed needs a tensor of this shape as a key; one element of storage stands for all of them.
                whole = torch.zeros(1, dtype=torch.float32, device=self.device).expand(flat.numel())
            else:  # in float32 the shard is its own master copy
                whole = flat.detach() if flat.dtype == torch.float32 else flat.float()
            whole.ds_id = str(self.fp16_partitioned_groups_flat_id[i][0])  # type: ignore[attr-defined]
            whole.requires_grad = True
            self.fp32_partitioned_groups_flat.append(whole)
        for group in self.optimizer.param_groups:
            group["params"] = []

    def initialize_optimizer_states(self) -> None:
        """Moments belong to `shards`; DeepSpeed would make gradients of full precision here."""

    def make_shards(self, config: RunConfig, tensor_ids: dict[str, int]) -> list[Shard]:
        """Every parameter's shard on this worker, in DeepSpeed's order."""
        self.clip_norm = config.train.clip_norm
        self.micro_batches = config.micro_batches
        self.tensor_ids = tensor_ids
        self.shards, self.params = [], []
        for group, master in zip(self.fp16_groups, self.fp32_partitioned_groups_flat, strict=True):
            offset = 0
            for p in group:
                self.shards.append(_shard(p, master, offset, config.optimizer.states))
                self.params.append(p)
                offset += p.partition_numel()
        return self.shards

    # ---- gradients

    def _DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads(
        self, params_to_reduce: list[Any], communication_data_type: torch.dtype
    ) -> list[Tensor]:
        """This worker's part of the SUM over workers of each gradient (division comes once, in `step`).

        DeepSpeed divides by the number of workers first and cuts at ceil(numel / workers): the first leaves residues where
        the exact sum is zero, the second misses the block borders.
        """
        world = dist.get_world_size()
        if world == 1:
            return [p.grad.reshape(-1).to(self.gradient_accumulation_dtype) for p in params_to_reduce]
        # Reproducible sums travel as float64 too; otherwise the wire carries the compute precision.
        wire = torch.float64 if self.gradient_accumulation_dtype == torch.float64 else params_to_reduce[0].grad.dtype
        sizes = [p.partition_numel() for p in params_to_reduce]
        rows = torch.empty(world, sum(sizes), dtype=wire, device=params_to_reduce[0].grad.device)
        offset = 0
        for p, size in zip(params_to_reduce, sizes, strict=True):
            rows[:, offset : offset + size] = nn.functional.pad(
                p.grad.reshape(-1), (0, world * size - p.ds_numel)
            ).view(world, size)
            offset += size
        mine = torch.empty_like(rows[0])
        dist.reduce_scatter_tensor(mine, rows.view(-1))
        return list(mine.to(self.gradient_accumulation_dtype).split(sizes))

    def _gradients(self) -> list[Tensor]:
        """Each shard's summed gradient, without padding."""
        partitions = [g for i in range(len(self.fp16_groups)) for g in self.averaged_gradients[i]]
        return [g[: shard.numel] for g, shard in zip(partitions, self.shards, strict=True)]

    # ---- the step

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Clip, then update every shard in place; a gradient that is not finite changes nothing."""
        self._pre_step()
        self._partition_all_parameters()
        gradients = self._gradients()
        norm = global_norm(gradients) / self.micro_batches
        self.overflow = not torch.isfinite(norm).item()
        self._global_grad_norm = norm
        flips = torch.zeros(1, dtype=torch.int64, device=self.device)
        if not self.overflow:
            clip = min(1.0, self.clip_norm / (norm.item() + 1e-6)) if self.clip_norm else 1.0
            now = self._with_scale(clip / self.micro_batches)
            for param, shard, gradient in zip(self.params, self.shards, gradients, strict=True):
                if shard.numel:
                    flips += self._update_shard(param, shard, gradient, now)
                if hasattr(param, "packed"):
                    param.packed.complete = False
        dist.all_reduce(flips)
        self.zero_grad(set_to_none=True)
        self.averaged_gradients = {}
        self.last_update = Update(norm.item(), int(flips), self.overflow)

    def _with_scale(self, grad_scale: float) -> ops.AdamWStep:
        from dataclasses import replace

        return replace(self.now, grad_scale=grad_scale)

    def _update_shard(self, param: Any, shard: Shard, gradient: Tensor, now: ops.AdamWStep) -> Tensor | int:
        if gradient.dtype == torch.float64:
            gradient = gradient.float()
        if shard.codes is None:
            assert shard.weight is not None, f"{shard.name} has neither codes nor a weight"
            ops.adamw_weights_(shard.weight, gradient, shard.moments, now=now)
            shard.after_load()
            return 0
        assert shard.scale is not None and shard.grid is not None, f"{shard.name} has codes without scale or grid"
        return ops.adamw_codes_(
            shard.codes,
            shard.scale,
            gradient,
            shard.moments,
            grid=shard.grid,
            now=now,
            tensor=self.tensor_ids[shard.name],
            first_block=shard.start // BLOCK,
            blocks_per_scale=shard.blocks_per_scale,
        )


def _shard(param: Any, master: Tensor, offset: int, states: str) -> Shard:
    n = param.partition_numel()
    start = n * dist.get_rank()
    numel = max(0, min(n, param.ds_numel - start))
    shape = tuple(param.ds_shape)
    moments = ops.Moments.zeros(numel, states, param.ds_tensor.device)
    if hasattr(param, "packed"):
        packed = param.packed
        size = numel // BLOCK * packed.grid.bytes_per_block

        def codes_changed() -> None:
            packed.complete = False

        return Shard(
            param.lowbit_name, shape, start, numel, moments,
            grid=packed.grid, codes=param.ds_tensor[:size], scale=packed.scale, after_load=codes_changed,
        )  # fmt: skip
    weight = master.detach()[offset : offset + numel]

    def to_compute_precision() -> None:
        if param.ds_tensor.dtype != torch.float32:
            param.ds_tensor[:numel].copy_(weight)

    return Shard(param.lowbit_name, shape, start, numel, moments, weight=weight, after_load=to_compute_precision)


def global_norm(gradients: Sequence[Tensor]) -> Tensor:
    """L2 norm over all workers' gradients, float64 [1]: the same bits however the elements are spread over workers.

    Squares are rounded to integers in units of max^2 / 2^k, whose sum does not depend on its order; k leaves room for
    as many elements as there are, so the relative error is below 2^-30 for up to 2^32 elements.
    """
    device = gradients[0].device
    largest = torch.zeros(1, dtype=torch.float64, device=device)
    count = torch.zeros(1, dtype=torch.int64, device=device)
    for g in gradients:
        if g.numel():
            low, high = torch.aminmax(g)
            # maximum, unlike max(), keeps a NaN
            largest = torch.maximum(largest, torch.maximum(-low, high).double())
            count += g.numel()
    # gloo's MAX drops NaN; infinity survives it
    largest = torch.where(torch.isfinite(largest), largest, torch.inf)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    dist.all_reduce(count)
    if not torch.isfinite(largest).item() or largest.item() == 0.0:
        return largest
    unit = 2.0 ** (62 - max(1, int(count.item()) - 1).bit_length())
    total = torch.zeros(1, dtype=torch.int64, device=device)
    for g in gradients:
        for chunk in g.split(1 << 20):  # bounds the float64 copies
            total += (chunk.double() / largest).square_().mul_(unit).round_().long().sum()
    dist.all_reduce(total)
    return (total.double() / unit).sqrt() * largest


# ------------------------------------------------------------------ DeepSpeed's own stages 0 to 2


class _AdamW(torch.optim.Optimizer):
    """AdamW in float32 on whatever flat tensors DeepSpeed hands over, with the moments' precision that was asked for."""

    now: ops.AdamWStep
    skipped = False

    def __init__(self, groups: list[dict[str, Any]], config: RunConfig):
        super().__init__(groups, {"lr": config.optimizer.lr})
        self.states = config.optimizer.states

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    ops.adamw_weights_(
                        p.data.view(-1), p.grad.float().view(-1), self.moments(p), now=self.now
                    )

    def moments(self, p: Tensor) -> ops.Moments:
        state = self.state[p]
        if "moments" not in state:
            state["moments"] = ops.Moments.zeros(p.numel(), self.states, p.device)
        return state["moments"]


class _Unused(torch.optim.Optimizer):
    """Carries the parameter groups that DeepSpeed reads; `_Zero3` updates shards itself."""

    def __init__(self, groups: list[dict[str, Any]]):
        super().__init__(groups, {"lr": 0.0})

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        raise RuntimeError("packed ZeRO-3 updates its shards without a torch optimizer")


def _materialize(
    model: nn.Module, initial: Callable[[str, torch.Size], Tensor], dtype: torch.dtype, device: torch.device
) -> None:
    for name, modules in _owners(model):
        shape = modules[0][0]._parameters[modules[0][1]].shape  # type: ignore[union-attr]
        parameter = nn.Parameter(initial(name, shape).to(device, dtype))
        for module, key in modules:
            module._parameters[key] = parameter
    model.to(device)


# ------------------------------------------------------------------ the engine and its settings


class _DeepSpeedEngine(DeepSpeedEngine):
    """DeepSpeed's engine, with our class in the place of its stage-3 optimizer."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        settings: dict[str, Any],
        stage3_class: Callable[..., Any],
    ):
        object.__setattr__(self, "_stage3_class", stage3_class)  # nn.Module.__init__ has not run yet
        super().__init__(
            args=None,
            model=model,
            optimizer=optimizer,
            config=settings,
            config_class=DeepSpeedConfig(settings),
            dont_change_device=False,
        )

    def _configure_zero_optimizer(self, optimizer: Any) -> Any:
        # It is imported beside the class replaced here and derives from it, so it must be imported before.
        importlib.import_module("deepspeed.runtime.superoffload.superoffload_stage3")
        with patch.object(stage3, "DeepSpeedZeroOptimizer_Stage3", self._stage3_class):
            return super()._configure_zero_optimizer(optimizer)


def _deepspeed_settings(config: RunConfig, model: nn.Module, stage: int, world: int) -> dict[str, Any]:
    """DeepSpeed's configuration, derived from the model, so that a user never meets it."""
    largest = max(p.numel() for p in model.parameters())
    block = block_numel(model)
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": torch.cuda.is_available() and world > 1}
    if stage == 3:
        zero |= {
            "stage3_param_persistence_threshold": 0,  # every parameter is a shard
            "stage3_max_reuse_distance": 0,  # else decoded weights stay alive from forward to backward
            "stage3_max_live_parameters": 2 * block,
            "stage3_prefetch_bucket_size": block,  # packed bytes only: decoding waits for the layer
            "reduce_bucket_size": block,
            "contiguous_gradients": False,  # else a dense bucket is allocated for good
            "sub_group_size": 10**15,  # shards are updated one by one anyway
        }
    elif stage > 0:
        zero |= {"reduce_bucket_size": max(block, largest), "allgather_bucket_size": max(block, largest)}
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.train.micro_batch,
        "gradient_accumulation_steps": config.micro_batches // world,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**12,
        "gradient_clipping": 0.0 if stage == 3 else config.train.clip_norm,
    }
    if config.precision == "bf16":
        settings["bf16"] = {"enabled": True}
    return settings


def block_numel(model: nn.Module) -> int:
    """Parameters of the largest transformer block: the unit in which dense weights are alive."""
    blocks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m)]
    return max((sum(p.numel() for p in layer.parameters()) for m in blocks for layer in m), default=1)


def _accumulation_dtype(config: RunConfig, world: int) -> torch.dtype:
    """float64 sums of float32 gradients are exact in practice, hence the same in any order; bf16 gradients are summed in
    float32, and kept as they are when a worker sees one micro-batch a step."""
    if config.train.reproducible:
        return torch.float64
    one_each = config.micro_batches == world
    return torch.bfloat16 if config.precision == "bf16" and one_each else torch.float32


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _init_comm() -> None:
    """Attach DeepSpeed to the process group that the launcher made."""
    if not dist.is_initialized():
        raise RuntimeError("the process group must be initialised before the engine")
    os.environ.setdefault("LOCAL_RANK", "0")
    # An optional shared-memory collective that DeepSpeed would compile for a minute; gloo needs no help.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)


def _numel(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


__all__ = ["Engine", "Shard", "Update", "block_numel", "check_deepspeed", "global_norm", "partition_parameters"]
