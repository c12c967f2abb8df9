"""DeepSpeed's stage-3 optimizer over shards: no full-precision partition of low-bit parameters, one exact
update in place.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from torch import Tensor, nn

from lowbit_dist import ops
from lowbit_dist.config import RunConfig
from lowbit_dist.methods.method import Method
from lowbit_dist.optim.clipping import clip_factor, global_norm
from lowbit_dist.optim.rule import Rule
from lowbit_dist.zero.shards import Shard, packed_of


@dataclass(frozen=True)
class Update:
    """What one optimizer step did, over all workers."""

    grad_norm: float  # before clipping, of the mean gradient; infinite or NaN if that is not finite
    flips: int  # codes that changed
    skipped: bool  # the norm was not finite or above the limit: nothing was changed
    flips_of: Mapping[str, int] = field(default_factory=dict)  # the same of each low-bit parameter, by name
    norms_of: Mapping[str, float] = field(default_factory=dict)  # of each parameter's mean gradient, if asked


class Moving(NamedTuple):
    """How a parameter is updated: by which rule, and its factors on learning rate and weight decay."""

    rule: Rule
    rates: tuple[float, float]


class PackedZero3(DeepSpeedZeroOptimizer_Stage3):
    """DeepSpeed's stage-3 optimizer without full-precision partitions for low-bit parameters."""

    now: ops.Now  # set before each step
    limit: float  # set before each step: a larger gradient norm leaves the step out
    wants_norms: bool  # set before each step: of each parameter's gradient
    last_update: Update
    method: Method  # the run's, as it is now
    shards: list[Shard]
    params: list[Any]  # the parameters of `shards`

    def __init__(self, *args: Any, accumulation: torch.dtype, **kwargs: Any):
        kwargs["gradient_accumulation_dtype"] = accumulation
        super().__init__(*args, **kwargs)
        # DeepSpeed keeps what its prefetcher will want again: when a forward pass ends, that is more than one
        # block of decoded weights, and after an evaluation it would stay. Here a weight lives while it works.
        coordinator = self._get_param_coordinator()
        coordinator._PartitionedParameterCoordinator__params_to_release = _own_parameters

    def _get_parameter_partitions(self) -> list[Tensor]:
        ordinary = [p.ds_tensor for group in self.fp16_groups for p in group if packed_of(p) is None]
        return ordinary or [torch.empty(0, dtype=self.dtype, device=self.device)]  # method.tensors: all

    def _set_fp16_partitioned_groups_flat(self) -> None:
        offset = 0
        for group in self.fp16_groups:
            n = sum(p.partition_numel() for p in group)
            if packed_of(group[0]) is not None:
                self.fp16_partitioned_groups_flat.append(torch.zeros(1, dtype=torch.uint8).expand(n))
            else:
                self.fp16_partitioned_groups_flat.append(self.lp_param_buffer.narrow(0, offset, n))
                offset += n

    def _create_fp32_partitions(self) -> None:
        for i, flat in enumerate(self.fp16_partitioned_groups_flat):
            if packed_of(self.fp16_groups[i][0]) is not None:
                # DeepSpeed needs a tensor of this shape as a key; one element of storage stands for all of
                # them.
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

    def make_shards(
        self, config: RunConfig, method: Method, names: Sequence[str], moving: Mapping[str, Moving]
    ) -> list[Shard]:
        """Every parameter's shard on this worker, in DeepSpeed's order; `method` is the first step's."""
        self.method = method
        self.clip_norm = config.train.clip_norm
        self.micro_batches = config.micro_batches
        self.tensor_ids = {name: i for i, name in enumerate(names)}  # random bits depend on it
        self.shards, self.params, self.moving = [], [], []
        for group, master in zip(self.fp16_groups, self.fp32_partitioned_groups_flat, strict=True):
            offset = 0
            for p in group:
                self.params.append(p)
                self.moving.append(moving[p.lowbit_name])
                self.shards.append(_shard(p, master, offset, self.moving[-1].rule, method.accumulator))
                offset += p.partition_numel()
        return self.shards

    def refresh(self) -> None:
        """Make the forward pass see what `shards` now hold."""
        for param, shard in zip(self.params, self.shards, strict=True):
            if (packed := packed_of(param)) is not None:
                packed.refresh(self.method)
            elif param.ds_tensor.dtype != torch.float32:
                assert shard.weight is not None, f"{shard.name} has neither codes nor a weight"
                param.ds_tensor[: shard.numel].copy_(shard.weight)

    def _DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads(
        self, params_to_reduce: list[Any], communication_data_type: torch.dtype
    ) -> list[Tensor]:
        """This worker's part of the SUM over workers of each gradient (division comes once, in `step`).

        DeepSpeed divides by the number of workers first and cuts at ceil(numel / workers): the first leaves
        residues where the exact sum is zero, the second misses the block borders.
        """
        world = dist.get_world_size()
        if world == 1:
            return [p.grad.reshape(-1).to(self.gradient_accumulation_dtype) for p in params_to_reduce]
        # Reproducible sums travel as float64 too; otherwise the wire carries the compute precision.
        wire = (
            torch.float64
            if self.gradient_accumulation_dtype == torch.float64
            else params_to_reduce[0].grad.dtype
        )
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

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Clip, then update every shard in place; a gradient that is not finite or too large changes
        nothing.
        """
        self._pre_step()
        self._partition_all_parameters()
        gradients = self._gradients()
        norm = global_norm(gradients).item() / self.micro_batches
        self.overflow = not (math.isfinite(norm) and norm <= self.limit)
        self._global_grad_norm = norm
        flips = torch.zeros(len(self.shards), dtype=torch.int64, device=self.device)
        if not self.overflow:
            grad_scale = clip_factor(norm, self.clip_norm) / self.micro_batches
            for i, gradient in enumerate(gradients):
                flips[i : i + 1] += self._update_shard(
                    i, gradient, at_rates(self.now, self.moving[i].rates, grad_scale)
                )
            self.refresh()
        dist.all_reduce(flips)
        norms_of = self._norms_of(gradients) if self.wants_norms else {}
        self.zero_grad(set_to_none=True)
        self.averaged_gradients: dict[int, Any] = {}
        of_shards = zip(self.shards, flips.tolist(), strict=True)
        flips_of = {shard.name: n for shard, n in of_shards if shard.codes is not None}
        self.last_update = Update(norm, sum(flips_of.values()), self.overflow, flips_of, norms_of)

    def _norms_of(self, gradients: list[Tensor]) -> dict[str, float]:
        squares = torch.stack([square_sum(gradient) for gradient in gradients])
        dist.all_reduce(squares)
        norms = (squares.sqrt() / self.micro_batches).tolist()
        return {shard.name: norm for shard, norm in zip(self.shards, norms, strict=True)}

    def _update_shard(self, i: int, gradient: Tensor, now: ops.Now) -> Tensor | int:
        shard, packed = self.shards[i], packed_of(self.params[i])
        scale = None if packed is None else self.method.rescaled(packed.stored)
        flips = self._move(i, shard.target(self.tensor_ids[shard.name], scale), gradient, now)
        if scale is not None and shard.scale is not None:
            shard.scale.copy_(scale)
        return flips

    def _move(self, i: int, target: ops.Codes | ops.Weights, gradient: Tensor, now: ops.Now) -> Tensor | int:
        shard, rule = self.shards[i], self.moving[i].rule
        if gradient.dtype == torch.float64:
            gradient = gradient.float()
        if rule.scope != "element":
            return self._update_whole(i, target, gradient, now)
        if not shard.numel:
            return 0
        return ops.step_(target, gradient, shard.slots, rule=rule, now=now)

    def _update_whole(
        self, i: int, target: ops.Codes | ops.Weights, gradient: Tensor, now: ops.Now
    ) -> Tensor | int:
        """A rule that must see rows or the matrix: every worker has all of it for a moment, and applies its
        own part of the direction, so the result is that of one worker.
        """

        param, shard, rule = self.params[i], self.shards[i], self.moving[i].rule

        def gathered(part: Tensor) -> Tensor:  # [numel] -> shape of the parameter, float32
            n, world = param.partition_numel(), dist.get_world_size()
            padded = nn.functional.pad(part.float(), (0, n - len(part)))
            full = padded.new_empty(world * n)
            dist.all_gather_into_tensor(full, padded)
            return full[: param.ds_numel].view(param.ds_shape)

        slots = (gathered(stored.load(0, shard.numel)) for stored in shard.slots)
        u, *moved = rule.update(gathered(gradient) * now.grad_scale, *slots, step=now.update)
        here = slice(shard.start, shard.start + shard.numel)
        if not shard.numel:
            return 0
        for stored, x in zip(shard.slots, moved, strict=True):
            stored.store(0, shard.numel, x.reshape(-1)[here])
        return ops.apply_(target, u.reshape(-1)[here].contiguous(), now=now)


def square_sum(gradient: Tensor) -> Tensor:  # [] float64
    return torch.linalg.vector_norm(gradient, dtype=torch.float64).square()


def _own_parameters(module: nn.Module, step: int) -> set[int]:
    return {p.ds_id for p in module.parameters(recurse=False)}  # type: ignore[attr-defined]


def _shard(param: Any, master: Tensor, offset: int, rule: Rule, accumulator: ops.Accumulator | None) -> Shard:
    n = param.partition_numel()
    start = n * dist.get_rank()
    numel = max(0, min(n, param.ds_numel - start))
    name, shape = param.lowbit_name, tuple(param.ds_shape)
    state = [ops.Stored.zeros(slot, numel, rule.states, param.ds_tensor.device) for slot in rule.slots]
    if (held := packed_of(param)) is None:
        return Shard(name, shape, start, numel, state, weight=master.detach()[offset : offset + numel])
    packed = held.stored
    if accumulator is not None:
        state.append(accumulator.residual(numel, param.ds_tensor.device))
    return Shard(
        name, shape, start, numel, state,
        grid=packed.grid, codes=packed.codes, scale=packed.scale, scale_every=packed.scale_every,
        accumulator=accumulator,
    )  # fmt: skip


def at_rates(now: ops.Now, rates: tuple[float, float], grad_scale: float) -> ops.Now:
    """The numbers of a step for a parameter with its own factors on learning rate and weight decay."""
    lr, weight_decay = rates
    return replace(now, lr=now.lr * lr, weight_decay=now.weight_decay * weight_decay, grad_scale=grad_scale)
