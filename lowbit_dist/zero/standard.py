"""DeepSpeed's own ZeRO stages 0 to 2, for methods with latent weights."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lowbit_dist import ops
from lowbit_dist.config import RunConfig
from lowbit_dist.optim.clipping import clip_factor, global_norm
from lowbit_dist.optim.rule import Rule
from lowbit_dist.zero.shards import Shard, owners
from lowbit_dist.zero.stage3 import Moving, Update, at_rates, square_sum

# DeepSpeed itself leaves out a step whose gradient is not finite.
LEFT_OUT = Update(math.inf, skipped=True)


class RuleOptimizer(torch.optim.Optimizer):
    """The run's optimizer in float32 on the tensors that DeepSpeed hands over, its slots in the precision
    asked for.
    """

    now: ops.Now | None = None  # set before each step
    limit = math.inf  # set before each step
    wants_details = False  # set before each step
    last_update = LEFT_OUT  # set by each step

    def __init__(
        self,
        groups: list[dict[str, Any]],
        config: RunConfig,
        stage: int,
        moving: Mapping[str, Moving],  # of each parameter
    ):
        super().__init__(groups, {"lr": config.optimizer.lr})
        self.moving = moving
        # Tensor -> the runs of its elements that belong to one parameter each, and the parameter.
        self.parts: dict[Tensor, list[tuple[slice, str]]] = {}
        self.square_sums: dict[str, Tensor] = {}  # of the gradients' parts that are here, if wanted
        self.clip_norm = config.train.clip_norm
        self.copies = 1 if stage else dist.get_world_size()  # stage 0: every worker has every gradient

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        if self.now is None:  # DeepSpeed's bf16 wrapper steps once while it sets up
            return
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        gradients = [p.grad for p in params]
        count = sum(g.numel() for g in gradients) * dist.get_world_size()  # padded, of each worker as many
        norm = global_norm(gradients, count, copies=self.copies).item()
        apply = math.isfinite(norm) and norm <= self.limit
        if apply:
            for p in params:
                for here, name in self.parts[p]:
                    rule, rates = self.moving[name]
                    self._move(p, here, rule, at_rates(self.now, rates, clip_factor(norm, self.clip_norm)))
        if self.wants_details:
            self.square_sums = {
                name: square_sum(p.grad.view(-1)[here]) for p in params for here, name in self.parts[p]
            }
        self.last_update = Update(norm, skipped=not apply)

    def _move(self, p: Tensor, here: slice, rule: Rule, now: ops.Now) -> None:
        assert p.grad is not None, "parameters without a gradient are left out"
        target = ops.Weights(p.data.view(-1)[here])
        if rule.scope == "element":
            grad = p.grad.view(-1)[here].float()
            ops.step_(target, grad, part_of(self.stored(p, rule), here), rule=rule, now=now)
            return
        # Under stage 0, the only one of these that such a rule may have, a tensor is whole, with its shape.
        if rule.scope == "shard":
            rule.step_(target, p.grad.view(-1), self.stored(p, rule), now=now, shape=tuple(p.shape))
        else:
            ops.whole_step_(target, p.grad, self.stored(p, rule), rule=rule, now=now)

    def take(self, p: Tensor, here: slice, name: str) -> list[ops.Stored]:
        """Know the elements `here` of p as those of a parameter; the rule's state of them."""
        self.parts.setdefault(p, []).append((here, name))
        return part_of(self.stored(p, self.moving[name].rule), here)

    def stored(self, p: Tensor, rule: Rule) -> list[ops.Stored]:
        """The state of a tensor, all of whose parts have one rule; zeros before its first step."""
        state = self.state[p]
        if "slots" not in state:
            state["slots"] = rule.initial_state(tuple(p.shape), device=p.device)
        slots: list[ops.Stored] = state["slots"]
        return slots


def part_of(state: list[ops.Stored], here: slice) -> list[ops.Stored]:
    """A run of a tensor's slots; 8-bit ones, whose blocks cannot follow every border, only as a whole."""
    if state and len(state[0].values) == len(range(*here.indices(len(state[0].values)))):
        return state
    assert all(stored.scale is None for stored in state), (
        "configurations with parts of 8-bit slots are refused"
    )
    return [ops.Stored(stored.slot, stored.values[here]) for stored in state]


def materialize(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Make each parameter, of zeros."""
    for name, shape, modules in owners(model):
        parameter = nn.Parameter(torch.zeros(shape, dtype=dtype, device=device))
        parameter.lowbit_name = name  # type: ignore[attr-defined]
        for module, key in modules:
            module._parameters[key] = parameter
    model.to(device)


class StandardZero:
    """The optimizer that DeepSpeed made of `RuleOptimizer` under stages 0 to 2, as shards."""

    def __init__(self, engine: Any, optimizer: RuleOptimizer, stage: int):
        self.engine, self.optimizer, self.stage = engine, optimizer, stage
        self.zero = engine.optimizer
        self.shards = list(self._flat_shards() if stage else self._whole_shards())

    def _whole_shards(self) -> Iterator[Shard]:
        """Stage 0: every worker holds everything; in bf16, DeepSpeed adds the float32 copies that are
        updated.
        """
        if self.zero is self.optimizer:
            pairs = [(p, p.data) for group in self.zero.param_groups for p in group["params"]]
        else:
            pairs = [
                (p, master)
                for group, masters in zip(self.zero.fp16_groups, self.zero.fp32_groups, strict=True)
                for p, master in zip(group, masters, strict=True)
            ]
        for p, weight in pairs:
            name, shape, whole = p.lowbit_name, tuple(p.shape), slice(0, p.numel())
            state = self.optimizer.take(p if self.zero is self.optimizer else weight, whole, name)
            yield Shard(name, shape, 0, p.numel(), state, weight=weight.detach().view(-1))

    def _flat_shards(self) -> Iterator[Shard]:
        """Stages 1 and 2: a worker updates one run of each group's parameters laid end to end."""
        zero = self.zero
        groups = zip(
            zero.round_robin_bit16_groups,
            zero.round_robin_bit16_offsets,
            zero.single_partition_of_fp32_groups,
            strict=True,
        )
        for params, offsets, master in groups:
            first = master.numel() * dist.get_rank()
            for p, offset in zip(params, offsets, strict=True):
                start = max(0, first - offset)
                numel = max(0, min(p.numel(), first + master.numel() - offset) - start)
                here = slice(offset + start - first, offset + start - first + numel) if numel else slice(0, 0)
                name, shape = p.lowbit_name, tuple(p.shape)
                state = self.optimizer.take(master, here, name)
                yield Shard(name, shape, start, numel, state, weight=master.detach()[here])

    def refresh(self) -> None:
        """Make the forward pass see what `shards` now hold."""
        if self.stage:
            self.zero.update_lp_params()
        elif self.zero is not self.optimizer:
            for group, masters in zip(self.zero.fp16_groups, self.zero.fp32_groups, strict=True):
                for p, master in zip(group, masters, strict=True):
                    p.data.copy_(master)

    def step(self, now: ops.Now, limit: float, *, details: bool = False) -> Update:
        self.optimizer.now, self.optimizer.limit, self.optimizer.wants_details = now, limit, details
        self.optimizer.last_update = LEFT_OUT
        self.engine.step()
        update = self.optimizer.last_update
        return replace(update, norms_of=self._norms_of()) if details and update is not LEFT_OUT else update

    def _norms_of(self) -> dict[str, float]:
        zero = torch.zeros((), dtype=torch.float64, device=self.engine.device)
        sums = torch.stack([self.optimizer.square_sums.get(shard.name, zero) for shard in self.shards])
        if self.stage:  # under stage 0 every worker has all of each gradient
            dist.all_reduce(sums)
        norms = sums.sqrt().tolist()
        return {shard.name: norm for shard, norm in zip(self.shards, norms, strict=True)}

    def gradients(self) -> list[Tensor]:
        """Gradients that are alive now; DeepSpeed frees them at each step."""
        own = [p.grad for p in self.engine.module.parameters() if p.grad is not None]
        averaged = getattr(self.zero, "averaged_gradients", {}).values()
        return own + [g for group in averaged if group is not None for g in group]
