"""One step of a run on tensors with shapes but no storage: what it would allocate, and when it would free it.

The model, its autograd graph, activation checkpointing and the loss are the real ones, run under PyTorch's
`FakeTensorMode` with `lifetimes` in the place of ZeRO; the watch that measures a CPU worker's step counts.
"""

from typing import NamedTuple

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lowbit_dist.config import RunConfig
from lowbit_dist.memory.lifetimes import Standard, StandardSizes, Zero3
from lowbit_dist.memory.live import Watch
from lowbit_dist.memory.report import Peak
from lowbit_dist.memory.resident import build, low_bit_names

# Longer models are extrapolated from two numbers of blocks: one block more costs what the last one cost.
SHORT, LONG = 4, 5


class _Step(NamedTuple):
    """Bytes above the resident ones in a step of some number of blocks."""

    activations: int  # that the first forward pass leaves
    early: int  # the peak until a block of the lower half has a gradient: all activations are there
    late: int  # the peak after that: few are left, but gradients may be
    end: int  # the peak when the backward pass has ended
    update: int

    def extrapolated(self, shorter: "_Step", n: int) -> "_Step":
        """With `n` blocks more, of which `shorter` has one less.

        Each moment's bytes are linear in the number of blocks, the greatest of them is not: hence the parts.
        """
        return _Step(*(long + n * (long - short) for short, long in zip(shorter, self, strict=True)))


def rehearse(config: RunConfig, vocab_size: int, workers: int) -> Peak:
    """Bytes above the resident ones at the highest moment of a step, on the worker that has the most."""
    model = build(config, vocab_size)
    blocks = _blocks(model)
    stage = 3 if config.zero.stage is None else config.zero.stage
    sizes = StandardSizes.of(model, workers, stage) if stage < 3 else None
    if len(blocks) <= LONG or not _alike(blocks):
        step = _step(config, model, workers, sizes)
    else:
        long, short = (
            _step(config, _shortened(config, vocab_size, k), workers, sizes) for k in (LONG, SHORT)
        )
        if sizes is None:
            # Nothing but activations grows; what is gathered ahead differs a little from block to block.
            grown = long.activations - short.activations
            short = long._replace(activations=short.activations, early=long.early - grown)
        step = long.extrapolated(short, len(blocks) - LONG)
    return Peak(max(step[1:]) - step.activations, step.activations)


def _step(config: RunConfig, model: nn.Module, workers: int, sizes: StandardSizes | None) -> _Step:
    from torch._subclasses.fake_tensor import FakeTensorMode

    if config.train.activation_checkpointing:
        model.gradient_checkpointing_enable(  # type: ignore[operator]
            gradient_checkpointing_kwargs={"use_reentrant": False}
        )
    model.train()
    low_bit = set(low_bit_names(config, model))
    with FakeTensorMode(allow_non_fake_inputs=True):
        _materialize(model)
        tokens = torch.zeros((config.train.micro_batch, config.data.seq_len), dtype=torch.long)
        zero = (
            Zero3(config, model, workers, low_bit)
            if sizes is None
            else Standard(config, model, workers, config.zero.stage or 0, sizes)
        )
        for passes in zero.rounds:
            watch = _Phases()
            hooks = watch.follow(model, zero)
            with watch:
                for i in range(passes):
                    watch.begin("early")
                    loss = model(input_ids=tokens, labels=tokens).loss
                    loss.backward()
                    del loss
                    watch.begin("end")
                    zero.end_pass(is_last=i == passes - 1)
                watch.begin("early")
            for hook in hooks:
                hook.remove()
    return _Step(watch.activations[0], **watch.peaks, update=zero.update_bytes)


class _Phases(Watch):
    """The peak of each phase of a step, and the activations after each forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = "early"
        self.peaks = {"early": 0, "late": 0, "end": 0}
        self.activations: list[int] = []

    def begin(self, phase: str) -> None:
        self.peaks[self.phase] = max(self.peaks[self.phase], self.peak)
        self.phase, self.peak = phase, self.now

    def follow(self, model: nn.Module, zero: Zero3 | Standard) -> list[RemovableHandle]:
        hooks = [model.register_forward_hook(lambda *_: self.activations.append(self.now - zero.held()))]
        blocks = _blocks(model)
        for block in blocks[: len(blocks) // 2]:
            for p in block.parameters():
                hooks.append(p.register_post_accumulate_grad_hook(lambda _: self.begin("late")))
        return hooks


def _blocks(model: nn.Module) -> nn.ModuleList:
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    return max(lists, key=len, default=nn.ModuleList())


def _alike(blocks: nn.ModuleList) -> bool:
    return len({tuple((name, p.shape) for name, p in block.named_parameters()) for block in blocks}) == 1


def _shortened(config: RunConfig, vocab_size: int, n: int) -> nn.Module:
    """The model with its first n blocks."""
    model = build(config, vocab_size)
    blocks = _blocks(model)
    for module in model.modules():
        for name, child in module.named_children():
            if child is blocks:
                setattr(module, name, blocks[:n])
                return model
    raise AssertionError("the blocks belong to a module of the model")


def _materialize(model: nn.Module) -> None:
    """Replace each parameter (a tied one once) and buffer by a fake one of the same shape on the CPU."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for key, p in module._parameters.items():
            if p is not None:
                if id(p) not in made:
                    made[id(p)] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype))
                module._parameters[key] = made[id(p)]
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = torch.empty(buffer.shape, dtype=buffer.dtype)
