"""DeepSpeed's own ZeRO stages 0 to 2, for methods with latent weights."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lowbit_dist import ops
from lowbit_dist.config import RunConfig
from lowbit_dist.zero.shards import Initial, Shard, owners
from lowbit_dist.zero.stage3 import Update, clip_factor, global_norm

# DeepSpeed itself leaves out a step whose gradient is not finite.
LEFT_OUT = Update(math.inf, flips=0, skipped=True)


class AdamW(torch.optim.Optimizer):
    """AdamW in float32 on the tensors that DeepSpeed hands over, its moments in the precision asked for."""

    now: ops.AdamWStep | None = None  # set before each step
    max_norm = math.inf  # set before each step
    last_update = LEFT_OUT  # set by each step

    def __init__(self, groups: list[dict[str, Any]], config: RunConfig, stage: int):
        super().__init__(groups, {"lr": config.optimizer.lr})
        self.states = config.optimizer.states
        self.clip_norm = config.train.clip_norm
        self.copies = 1 if stage else dist.get_world_size()  # stage 0: every worker has every gradient

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        if self.now is None:  # DeepSpeed's bf16 wrapper steps once while it sets up
            return
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = global_norm([p.grad.view(-1) for p in params], copies=self.copies).item()
        apply = math.isfinite(norm) and norm <= self.max_norm
        if apply:
            now = replace(self.now, grad_scale=clip_factor(norm, self.clip_norm))
            for p in params:
                ops.adamw_weights_(p.data.view(-1), p.grad.float().view(-1), self.moments(p), now=now)
        self.last_update = Update(norm, flips=0, skipped=not apply)

    def moments(self, p: Tensor) -> ops.Moments:
        state = self.state[p]
        if "moments" not in state:
            state["moments"] = ops.Moments.zeros(p.numel(), self.states, p.device)
        return state["moments"]


def materialize(model: nn.Module, initial: Initial, device: torch.device, dtype: torch.dtype) -> None:
    """Give each parameter its initial value."""
    for name, shape, modules in owners(model):
        parameter = nn.Parameter(initial(name, shape).to(device, dtype))
        parameter.lowbit_name = name  # type: ignore[attr-defined]
        for module, key in modules:
            module._parameters[key] = parameter
    model.to(device)


class Stock:
    """The optimizer that DeepSpeed made of `AdamW` under stage 0, 1 or 2, seen as shards."""

    def __init__(self, engine: Any, optimizer: AdamW, stage: int):
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
            moments = self.optimizer.moments(p if self.zero is self.optimizer else weight)
            yield Shard(p.lowbit_name, tuple(p.shape), 0, p.numel(), moments, weight=weight.detach().view(-1))

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
            moments = self.optimizer.moments(master)
            for p, offset in zip(params, offsets, strict=True):
                start = max(0, first - offset)
                numel = max(0, min(p.numel(), first + master.numel() - offset) - start)
                here = slice(offset + start - first, offset + start - first + numel) if numel else slice(0, 0)
                part = ops.Moments(moments.m[here], moments.v[here], None, None)
                yield Shard(
                    p.lowbit_name, tuple(p.shape), start, numel, part, weight=master.detach()[here]
                )  # fmt: skip

    def refresh(self) -> None:
        """Make the forward pass see what `shards` now hold."""
        if self.stage:
            self.zero.update_lp_params()
        elif self.zero is not self.optimizer:
            for group, masters in zip(self.zero.fp16_groups, self.zero.fp32_groups, strict=True):
                for p, master in zip(group, masters, strict=True):
                    p.data.copy_(master)

    def step(self, now: ops.AdamWStep, max_norm: float) -> Update:
        self.optimizer.now, self.optimizer.max_norm = now, max_norm
        self.optimizer.last_update = LEFT_OUT
        self.engine.step()
        return self.optimizer.last_update

    def gradients(self) -> list[Tensor]:
        """Gradients that are alive now; DeepSpeed frees them at each step."""
        own = [p.grad for p in self.engine.module.parameters() if p.grad is not None]
        averaged = getattr(self.zero, "averaged_gradients", {}).values()
        return own + [g for group in averaged if group is not None for g in group]
