"""One step of a run on a simulated worker: the bytes that it allocates above the resident ones.

Engine, model, autograd, activation checkpointing and optimizer are the real ones (`zero.fake`), and what
measures a worker's step measures this one (`live`).
"""

import copy
from contextlib import ExitStack, nullcontext
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import nn

from lowbit_dist import ops, products
from lowbit_dist.config import RunConfig
from lowbit_dist.experts import number
from lowbit_dist.memory import machine
from lowbit_dist.memory.live import StorageMeter, track_peak
from lowbit_dist.memory.report import Peak
from lowbit_dist.memory.resident import flat_numel
from lowbit_dist.model import blocks_of, linear_weights, low_bit_names, shapes
from lowbit_dist.tokenizer import Marks

LONGEST = 4  # blocks; longer models are extrapolated from so many


class Step(NamedTuple):
    """Bytes above the resident ones in a step of some number of blocks."""

    activations: int  # that the first forward pass leaves
    early: int  # the peak until a block of the lower half has a gradient: all activations are there
    late: int  # the peak of the rest of the passes: few are left, but embeddings have their gradient
    update: int
    block: int  # the activations of one block
    counters: int  # of the flips of one block, there in all of a step

    def peak(self, more: int = 0) -> Peak:
        """With so many blocks more: nothing else grows."""
        activations, early = self.activations + more * self.block, self.early + more * self.block
        highest = max(early, self.late, self.update)
        return Peak(highest - activations, activations + more * self.counters)


def simulate_step(config: RunConfig, vocab_size: int, workers: int) -> Peak:
    """Bytes above the resident ones at the highest moment of a step, on the worker that has the most."""
    model = shapes(config, vocab_size)
    blocks = blocks_of(model)
    # Only ZeRO-3 treats all blocks alike: the other stages cut the flat model anywhere.
    if len(blocks) <= LONGEST or not _alike(blocks) or config.zero.stage in (0, 1, 2):
        # The first worker's partition has its gradients last, when all others that it keeps are there.
        candidates = {0, _largest_worker(config, model, workers)}
        peaks = [simulate(config, model, workers, rank=rank).peak() for rank in sorted(candidates)]
        return max(peaks, key=lambda peak: sum(peak))
    long = simulate(config, _shortened(model, LONGEST), workers, briefly=True)
    return long.peak(len(blocks) - LONGEST)


def simulate(
    config: RunConfig, model: nn.Module, workers: int, *, rank: int = 0, briefly: bool = False
) -> Step:
    """The second step of a worker whose model, on the meta device, this is; products that are left open are
    those of a run that begins on this machine.

    `briefly`: from the second pass of its first step, if there are two.
    """
    passes = min(2, config.accumulation(workers))  # the second adds to the gradients of the first
    numel = passes * workers * config.train.micro_batch * config.data.seq_len
    train = config.train.model_copy(update={"batch_tokens": numel})
    config, model = config.model_copy(update={"train": train}), copy.deepcopy(model)
    briefly = briefly and passes == 2 and config.zero.residency == "sharded"
    from lowbit_dist.zero import Engine
    from lowbit_dist.zero.fake import fake_worker

    in_integers = products.are_faster(machine.device_of(config))
    with fake_worker(rank, workers, experts=number(model)), ExitStack() as sampled:
        for module in model.modules():
            for key, buffer in module._buffers.items():
                module._buffers[key] = None if buffer is None else torch.empty_like(buffer, device="cpu")
        marks = Marks(1, 2) if config.data.document_mask else None  # a mask is as large for any
        engine = Engine(
            config,
            model,
            lambda _, shape, room: torch.empty(shape),
            low_bit_names(model, config.method),
            marks,
        )
        for layer in engine.left_open:
            layer.in_integers = in_integers
        tokens = torch.zeros((config.train.micro_batch, config.data.seq_len), dtype=torch.long)
        meter, warm, ends, blocks = _Phases(), StorageMeter(), [], blocks_of(model)
        for p in (p for block in blocks[: len(blocks) // 2] for p in block.parameters()):
            p.register_post_accumulate_grad_hook(lambda _: meter.begin("late"))
        for block in blocks[-2:]:
            block.register_forward_hook(lambda *_: ends.append(warm.now))
        n_steps = 1 if briefly else 2  # ZeRO-3 fetches ahead in the order of its first pass
        for n in range(n_steps):
            with engine.step(ops.Now(lr=0.0, weight_decay=0.0, step=n + 1, seed=0)) as step:
                for i in range(passes):
                    if (n, i) == (n_steps - 1, int(briefly)):
                        sample = sampled.enter_context(track_peak(engine, meter))
                    meter.begin("early")
                    with warm if not n + i else nullcontext():
                        left = step.backward(tokens).nbytes
                meter.begin("update")
        meter.begin("early")
        sampled.close()
        engine.close()
    if briefly:  # the first pass's loss is there until the second has its own
        meter.peaks |= {phase: meter.peaks[phase] + left for phase in ("early", "late")}
    # Counts of flips are there before the sample begins.
    counts = 0 if config.zero.stage in (0, 1, 2) else 8 * len(engine.shards)
    meter.peaks = {phase: peak + counts for phase, peak in meter.peaks.items()}
    grows = ends[1] - ends[0] if len(blocks) > 1 else 0
    counters = 8 * len(list(blocks[0].parameters())) if len(blocks) else 0
    return Step(sample["activations"] + counts, **meter.peaks, block=grows, counters=counters)


class _Phases(StorageMeter):
    """The peak of each phase of a step."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = "early"
        self.peaks = {"early": 0, "late": 0, "update": 0}

    def begin(self, phase: str) -> None:
        self.peaks[self.phase] = max(self.peaks[self.phase], self.peak)
        self.phase, self.peak = phase, self.now


def _largest_worker(config: RunConfig, model: nn.Module, workers: int) -> int:
    """Under stages 1 and 2 a worker keeps the gradients of every parameter that its partition touches; under
    the others worker 0 has as much as any.
    """
    if config.zero.stage not in (1, 2):
        return 0
    numels = [p.numel() for p in model.parameters()]
    part = flat_numel(sum(numels), workers) // workers
    places = list(zip(numels, accumulate(numels), strict=True))

    def touched(worker: int) -> int:
        return sum(n for n, end in places if end > worker * part and end - n < (worker + 1) * part)

    return max(range(workers), key=touched)


def _alike(blocks: nn.ModuleList) -> bool:
    return len({tuple((name, p.shape) for name, p in block.named_parameters()) for block in blocks}) == 1


def _shortened(model: nn.Module, n: int) -> nn.Module:
    """A copy of the model with its first n blocks."""
    copied: dict[int, nn.Module] = {}
    blocks = blocks_of(model)
    copied[id(blocks)] = copy.deepcopy(blocks[:n], copied)
    short = copy.deepcopy(model, copied)
    present = {name for name, _ in short.named_parameters()}
    short.linear_weights = [name for name in linear_weights(model) if name in present]  # type: ignore[assignment]
    return short
