"""DeepSpeed's stage-3 optimizer over shards: no full-precision partition of low-bit parameters, one exact
update in place.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from torch import Tensor, nn

from lowbit_dist import ops
from lowbit_dist.config import RunConfig
from lowbit_dist.methods.method import Method
from lowbit_dist.optim.clipping import clip_factor, global_norm
from lowbit_dist.optim.rule import Rule
from lowbit_dist.zero.coordinator import Coordinator, wait_for_stream
from lowbit_dist.zero.gathers import packed_of
from lowbit_dist.zero.shards import Shard
from lowbit_dist.zero.whole import Matrix, updated

# Devices whose workers hand one another their parts of gradients in pairs: gloo's own reduction takes three
# times as long, for it copies all of them, and adds up in what travels.
EXCHANGED = ("cpu",)


@dataclass(frozen=True)
class Update:
    """What one optimizer step did, over all workers."""

    grad_norm: float  # before clipping, of the mean gradient; infinite or NaN if that is not finite
    skipped: bool  # the norm was not finite or above the limit: nothing was changed, but for `n_released`
    flips: Tensor | int = 0  # [] int64: codes that changed; on the device, for which it does not wait
    # If asked for: how many changed of each low-bit parameter; the norm of each parameter's mean gradient.
    flips_of: Mapping[str, int] = field(default_factory=dict)
    norms_of: Mapping[str, float] = field(default_factory=dict)
    n_released: int = 0  # parameters that a skipped step had updated before that was known


class Moving(NamedTuple):
    """How a parameter is updated: by which rule, and its factors on learning rate and weight decay."""

    rule: Rule
    rates: tuple[float, float]


class PackedZero3(DeepSpeedZeroOptimizer_Stage3):
    """DeepSpeed's stage-3 optimizer without full-precision partitions for low-bit parameters.

    With `releases`, a bucket's parameters are updated when it is reduced, within the backward pass, and its
    gradients dropped.  The rest of the pass does not read them: autograd hands over a gradient once all uses
    of its parameter, several of a tied one, have given theirs, and a block under activation checkpointing is
    computed anew before it gives the first.
    """

    now: ops.Now  # set before each step
    limit: float  # set before each step: a larger gradient norm leaves the step out
    wants_details: bool  # set before each step: what each parameter's gradient and update were
    last_update: Update
    method: Method  # the run's, as it is now
    shards: list[Shard]
    params: list[Any]  # the parameters of `shards`

    def __init__(self, *args: Any, accumulation: torch.dtype, releases: bool, **kwargs: Any):
        self.releases = releases
        kwargs["gradient_accumulation_dtype"] = accumulation
        super().__init__(*args, **kwargs)
        if self.reduce_and_partition_stream is not None:
            # DeepSpeed waits for it after each micro-batch; here the streams that read gradients do.
            self.reduce_and_partition_stream.synchronize = lambda: None
        hooks = self.parameter_offload
        theirs = vars(hooks.param_coordinator)
        prefix = "_PartitionedParameterCoordinator__"
        hooks.param_coordinator = Coordinator(
            theirs[f"{prefix}allgather_stream"], theirs[f"{prefix}max_n_available_params"]
        )

    def create_reduce_and_remove_grad_hooks(self) -> None:
        # Of a block that is fetched as one, DeepSpeed would reduce the gradients when all are there, and take
        # those for zero that its hook comes before.
        for p in self.module.parameters():
            vars(p).pop("ds_z3_leaf_module", None)
        super().create_reduce_and_remove_grad_hooks()

    def _get_parameter_partitions(self) -> list[Tensor]:
        return [torch.empty(0, dtype=self.dtype, device=self.device)]  # shards lie where they are gathered

    def _set_fp16_partitioned_groups_flat(self) -> None:
        for group in self.fp16_groups:
            n = sum(p.partition_numel() for p in group)
            self.fp16_partitioned_groups_flat.append(torch.zeros(1, dtype=torch.uint8).expand(n))

    def _create_fp32_partitions(self) -> None:
        for i, flat in enumerate(self.fp16_partitioned_groups_flat):
            # DeepSpeed needs a tensor of this shape as a key; one element of storage stands for all of them.
            whole = torch.zeros(1, dtype=torch.float32, device=self.device).expand(flat.numel())
            whole.ds_id = str(self.fp16_partitioned_groups_flat_id[i][0])  # type: ignore[attr-defined]
            whole.requires_grad = True
            self.fp32_partitioned_groups_flat.append(whole)
        for group in self.optimizer.param_groups:
            group["params"] = []

    def _setup_for_real_optimizer(self) -> None:
        if not self.releases:
            super()._setup_for_real_optimizer()
            return
        self._create_fp32_partitions()
        # In the place of the buffer in which DeepSpeed keeps the gradients of all parameters.
        nothing = torch.empty(0, dtype=self.gradient_accumulation_dtype, device=self.device)
        parts: defaultdict[int, Tensor] = defaultdict(lambda: nothing)
        self.grad_partitions_flat_buffer = nothing
        self._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition = parts

    def initialize_optimizer_states(self) -> None:
        """Moments belong to `shards`; DeepSpeed would make gradients of full precision here."""

    def make_shards(
        self, config: RunConfig, method: Method, names: Sequence[str], moving: Mapping[str, Moving]
    ) -> list[Shard]:
        """Every parameter's shard on this worker, in DeepSpeed's order; `method` is the first step's."""
        self.method = method
        self.clip_norm = config.train.clip_norm
        self.micro_batches = config.micro_batches
        # Their bits are the same either way; one that is compared with another run's need not rely on it.
        self.matrices_at_once = 1 if config.train.reproducible else dist.get_world_size()
        self.tensor_ids = {name: i for i, name in enumerate(names)}  # random bits depend on it
        self.shards, self.params, self.moving = [], [], []
        for p in chain.from_iterable(self.fp16_groups):
            self.params.append(p)
            self.moving.append(moving[p.lowbit_name])
            self.shards.append(_shard(p, self.moving[-1].rule, method.accumulator))
        self.places = {p.ds_id: i for i, p in enumerate(self.params)}
        return self.shards

    def refresh(self) -> None:
        """Make the forward pass see what `shards` now hold."""
        self._refresh(range(len(self.shards)))

    def _refresh(self, places: Iterable[int]) -> None:
        rounded: list[Tensor] = []
        weights: list[Tensor] = []
        for i in places:
            param, shard = self.params[i], self.shards[i]
            if (packed := packed_of(param)) is not None:
                packed.refresh(self.method)
            elif param.ds_tensor.dtype != torch.float32:
                assert shard.weight is not None, f"{shard.name} has neither codes nor a weight"
                rounded.append(param.ds_tensor[: shard.numel])
                weights.append(shard.weight)
        if rounded:
            torch._foreach_copy_(rounded, weights)

    def _DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads(
        self, params_to_reduce: list[Any], communication_data_type: torch.dtype
    ) -> list[Tensor]:
        """This worker's part of the SUM over workers of each gradient (division comes once, in `step`).

        DeepSpeed divides by the number of workers first and cuts at ceil(numel / workers): the first leaves
        residues where the exact sum is zero, the second misses the block borders.  They are as they travel:
        `partition_grads` adds them up in another precision.
        """
        world = dist.get_world_size()
        if world == 1:
            return [p.grad.reshape(-1) for p in params_to_reduce]
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
            whole = p.grad.reshape(-1)
            if missing := world * size - p.ds_numel:
                whole = nn.functional.pad(whole, (0, missing))
            rows[:, offset : offset + size] = whole.view(world, size)
            offset += size
        return list(self._sum_of_rows(rows).split(sizes))

    def _sum_of_rows(self, rows: Tensor) -> Tensor:  # [workers, n] -> [n]
        """This worker's row, summed over workers."""
        mine = torch.empty_like(rows[0])
        if rows.device.type not in EXCHANGED:
            dist.reduce_scatter_tensor(mine, rows.view(-1))
            return mine
        world, rank = rows.shape[0], dist.get_rank()
        total = rows[rank].to(self.gradient_accumulation_dtype)
        for k in range(1, world):
            to, of = (rank + k) % world, (rank - k) % world
            exchange = [dist.P2POp(dist.isend, rows[to], to), dist.P2POp(dist.irecv, mine, of)]
            for work in dist.batch_isend_irecv(exchange):
                work.wait()
            total += mine
        return total

    def _gradients(self) -> list[Tensor]:
        """Each shard's summed gradient, without padding."""
        partitions = [g for i in range(len(self.fp16_groups)) for g in self.averaged_gradients[i]]
        return [g[: shard.numel] for g, shard in zip(partitions, self.shards, strict=True)]

    def begin(self, now: ops.Now, limit: float, *, details: bool, previous_norm: float) -> None:
        """Before the passes of a step: the numbers that its gradients are applied with.  Released ones are
        clipped by `previous_norm`, that of the last step that was applied.
        """
        self.now, self.limit, self.wants_details, self.previous_norm = now, limit, details, previous_norm
        self.norms: list[float] = []  # of the mean gradients that were seen, together the step's
        self.squares: dict[int, Tensor] = {}  # of the shards' gradients, if wanted
        self.flips = torch.zeros(len(self.shards), dtype=torch.int64, device=self.device)  # of each shard
        self.n_updated = 0  # shards

    def partition_grads(self, params_to_release: list[Any], grad_partitions: list[Tensor]) -> list[Tensor]:
        """A bucket is reduced: its gradients join the sums, or are applied and dropped."""
        if not self.releases:
            kept: list[Tensor] = super().partition_grads(params_to_release, grad_partitions)
            return kept
        places = [self.places[p.ds_id] for p in params_to_release]
        parts = (partition.to(self.gradient_accumulation_dtype) for partition in grad_partitions)
        gradients = {i: g[: self.shards[i].numel] for i, g in zip(places, parts, strict=True)}
        self.norms.append(self._norm_of(gradients).item())
        self._apply(gradients)
        for p in params_to_release:
            if p.grad.is_cuda:  # made by the pass's stream, read by that of the reduction
                p.grad.record_stream(torch.cuda.current_stream())
            p.grad = None
        return []

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Clip, then update every shard in place; a gradient that is not finite or too large changes
        nothing.  What was released is updated already.
        """
        self._pre_step()
        self._partition_all_parameters()
        wait_for_stream(get_accelerator().current_stream(), self.reduce_and_partition_stream)
        if not self.releases:
            if not self.norms:
                self.norms = [self.gradient_norm().item()]
            self._apply(dict(enumerate(self._gradients())))
        norm = self._norm
        self.overflow = not self._is_fit(norm)
        self._global_grad_norm = norm
        dist.all_reduce(self.flips)
        flips_of, norms_of = (self._flips_of(), self._norms_of()) if self.wants_details else ({}, {})
        self.zero_grad(set_to_none=True)
        self.averaged_gradients: dict[int, Any] = {}
        self.squares = {}
        flips = self.flips.sum()
        del self.flips  # until the next step
        n_released = self.n_updated if self.overflow else 0
        self.last_update = Update(norm, self.overflow, flips, flips_of, norms_of, n_released=n_released)

    def gradient_norm(self) -> Tensor:  # [1] float64
        """Of the step's mean gradient, when its passes are over and nothing was released."""
        wait_for_stream(get_accelerator().current_stream(), self.reduce_and_partition_stream)
        return self._norm_of(dict(enumerate(self._gradients())))

    def _norm_of(self, gradients: Mapping[int, Tensor]) -> Tensor:  # [1] float64
        count = sum(self.params[i].ds_numel for i in gradients)
        return global_norm(list(gradients.values()), count) / self.micro_batches

    def _apply(self, gradients: Mapping[int, Tensor]) -> None:
        """Update shards with their summed gradients, unless what is known of the step's norm forbids it."""
        if self.wants_details:
            self.squares |= {i: square_sum(gradient) for i, gradient in gradients.items()}
        if not self._is_fit(self._norm):
            return
        clipped_by = self.previous_norm if self.releases else self._norm
        grad_scale = clip_factor(clipped_by, self.clip_norm) / self.micro_batches
        for i, given in self._given(gradients, grad_scale):
            now = at_rates(self.now, self.moving[i].rates, grad_scale)
            self._update_shard(i, given, now)
        self._refresh(gradients)
        self.n_updated += len(gradients)

    def _given(self, gradients: Mapping[int, Tensor], grad_scale: float) -> Iterator[tuple[int, Tensor]]:
        """What each shard is updated by: its gradient, or its part of the direction that follows from it, of
        a rule that must see rows or the matrix.  Its slots have moved then.
        """
        whole = [i for i in gradients if self._sees_whole(i)]
        yield from ((i, gradient) for i, gradient in gradients.items() if i not in whole)
        whole.sort(key=lambda i: -self.params[i].ds_numel)  # of a few, the first worker has the largest
        for start in range(0, len(whole), self.matrices_at_once):
            few = whole[start : start + self.matrices_at_once]
            moved = updated([self._matrix(i, gradients[i], grad_scale) for i in few], step=self.now.update)
            for i, (u, *slots) in zip(few, moved, strict=True):
                shard = self.shards[i]
                if shard.numel:
                    for stored, x in zip(shard.slots, slots, strict=True):
                        stored.store(0, shard.numel, x)
                yield i, u

    def _sees_whole(self, i: int) -> bool:
        return self.moving[i].rule.scope in ("row", "matrix")

    def _matrix(self, i: int, gradient: Tensor, grad_scale: float) -> Matrix:
        shard, slots = self.shards[i], self.shards[i].slots
        parts = [gradient.float() * grad_scale, *(stored.load(0, shard.numel) for stored in slots)]
        return Matrix(self.moving[i].rule, shard.shape, self.params[i].partition_numel(), parts)

    @property
    def _norm(self) -> float:
        """Of the gradients that were seen: of one bucket its own, of several that of their norms."""
        return math.hypot(*self.norms)

    def _is_fit(self, norm: float) -> bool:
        return math.isfinite(norm) and norm <= self.limit

    def _flips_of(self) -> dict[str, int]:
        of_shards = zip(self.shards, self.flips.tolist(), strict=True)
        return {shard.name: n for shard, n in of_shards if shard.codes is not None}

    def _norms_of(self) -> dict[str, float]:
        none = torch.zeros((), dtype=torch.float64, device=self.device)
        squares = torch.stack([self.squares.get(i, none) for i in range(len(self.shards))])
        dist.all_reduce(squares)
        norms = (squares.sqrt() / self.micro_batches).tolist()
        return {shard.name: norm for shard, norm in zip(self.shards, norms, strict=True)}

    def _update_shard(self, i: int, given: Tensor, now: ops.Now) -> None:
        shard, packed = self.shards[i], packed_of(self.params[i])
        scale = None if packed is None else self.method.rescaled(packed.stored)
        counted = self.flips[i : i + 1]
        flips = self._move(i, shard.target(self.tensor_ids[shard.name], scale, counted), given, now)
        if shard.codes is not None and flips is not counted:
            counted += flips
        if scale is not None and shard.scale is not None:
            shard.scale.copy_(scale)

    def _move(self, i: int, target: ops.Codes | ops.Weights, given: Tensor, now: ops.Now) -> Tensor | int:
        shard, rule = self.shards[i], self.moving[i].rule
        if given.dtype == torch.float64:
            given = given.float()
        if rule.scope == "shard":
            return rule.step_(
                target, given, shard.slots,
                now=now, shape=shard.shape, start=shard.start, over_workers=True,
            )  # fmt: skip
        if not shard.numel:
            return 0
        if self._sees_whole(i):
            return ops.apply_(target, given, now=now)
        return ops.step_(target, given, shard.slots, rule=rule, now=now)


def square_sum(gradient: Tensor) -> Tensor:  # [] float64
    return torch.linalg.vector_norm(gradient, dtype=torch.float64).square()


def _shard(param: Any, rule: Rule, accumulator: ops.Accumulator | None) -> Shard:
    n = param.partition_numel()
    start = n * dist.get_rank()
    numel = max(0, min(n, param.ds_numel - start))
    name, shape = param.lowbit_name, tuple(param.ds_shape)
    state = rule.initial_state(shape, numel, device=param.ds_tensor.device)
    if (held := packed_of(param)) is None:
        # In float32 the shard is its own master copy.
        return Shard(name, shape, start, numel, state, weight=param.ds_tensor.detach()[:numel].float())
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
