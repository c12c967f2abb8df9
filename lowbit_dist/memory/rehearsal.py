"""One step of a run on tensors with shapes but no storage: what it would allocate, and when it would free it.

The model, its autograd graph, activation checkpointing and the loss are the real ones, run under PyTorch's
`FakeTensorMode` with `lifetimes` in the place of ZeRO; the watch that measures a CPU worker's step counts.
"""

import torch
from torch import nn

from lowbit_dist.config import RunConfig
from lowbit_dist.memory.lifetimes import Stock, Zero3
from lowbit_dist.memory.live import Watch
from lowbit_dist.memory.report import Peak
from lowbit_dist.memory.resident import build, low_bit_names, storage
from lowbit_dist.methods import method_of

# Longer models are extrapolated from two numbers of blocks: one block more costs what the last one cost.
SHORT, LONG = 4, 5


def rehearse(config: RunConfig, vocab_size: int, workers: int) -> Peak:
    """Bytes above the resident ones at the highest moment of a step, on the worker that has the most."""
    model = build(config, vocab_size)
    blocks = _blocks(model)
    if len(blocks) <= LONG or not _alike(blocks):
        activations, *peaks = _step(config, model, workers)
    else:
        measured = [_step(config, _shortened(config, vocab_size, k), workers) for k in (SHORT, LONG)]
        activations, *peaks = (
            int(long + (len(blocks) - LONG) * (long - short) / (LONG - SHORT))
            for short, long in zip(*measured, strict=True)
        )
    return Peak(max(peaks) - activations, activations)


def _step(config: RunConfig, model: nn.Module, workers: int) -> tuple[int, int, int]:
    """Bytes that the first forward pass leaves, the peak of the passes, the peak of the update."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    if config.train.activation_checkpointing:
        model.gradient_checkpointing_enable(  # type: ignore[operator]
            gradient_checkpointing_kwargs={"use_reentrant": False}
        )
    model.train()
    grids = (
        dict.fromkeys(low_bit_names(config, model), storage(config).grid) if method_of(config).low_bit else {}
    )
    stage = 3 if config.zero.stage is None else config.zero.stage
    with FakeTensorMode(allow_non_fake_inputs=True):
        _materialize(model)
        tokens = torch.zeros((config.train.micro_batch, config.data.seq_len), dtype=torch.long)
        zero: Zero3 | Stock = (
            Zero3(config, model, workers, grids) if stage == 3 else Stock(config, model, workers, stage)
        )
        for passes in zero.rounds:
            watch = Watch()
            after_forward: list[int] = []

            def note(*_: object, watch: Watch = watch, found: list[int] = after_forward) -> None:
                found.append(watch.now - zero.held())

            hook = model.register_forward_hook(note)
            with watch:
                for i in range(passes):
                    loss = model(input_ids=tokens, labels=tokens).loss
                    loss.backward()
                    del loss
                    zero.end_pass(is_last=i == passes - 1)
            hook.remove()
    return after_forward[0], watch.peak, zero.update_bytes


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
