"""When ZeRO makes and frees weights and gradients around a module's own work, acted out without data.

DeepSpeed gathers a module's weights before it runs, starts gathering the next ones, releases them after it,
collects gradients in a bucket and reduces it when it is full. Which of these are alive together decides the
peak, so the order is DeepSpeed's (0.19: `PartitionedParameterCoordinator`, `DeepSpeedZeroOptimizer`), with
the buffers of `lowbit_dist.zero`.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lowbit_dist.config import RunConfig
from lowbit_dist.grid import BLOCK
from lowbit_dist.linear import decodes
from lowbit_dist.memory.resident import flat_numel, shard_numel

NORM_CHUNK = 1 << 20  # elements that the gradient norm converts at once
ALLREDUCE_BUCKET = 500_000_000  # elements that DeepSpeed's stage 0 reduces at once


class Zero3:
    """Packed ZeRO-3, on the worker with the largest shards."""

    def __init__(
        self,
        config: RunConfig,
        model: nn.Module,
        workers: int,
        low_bit: Collection[str],
    ):
        from lowbit_dist.zero.engine import accumulation_dtype, block_numel

        self.workers = workers
        self.accumulation = accumulation_dtype(config, workers)
        self.block = block_numel(model)
        self.replicated = config.zero.residency == "replicated"
        # The first pass records the order of modules, by which the second fetches ahead, if from others.
        self.rounds = [1] if workers == 1 else [1, 1]
        self.of: dict[int, _Parameter] = {}
        holders: dict[int, list[nn.Module]] = defaultdict(list)
        for module in model.modules():
            for held in module._parameters.values():
                holders[id(held)].append(module)
        for name, p in model.named_parameters():
            aligned = workers * shard_numel(p.numel(), workers)
            gathered = decoded = sent = 0
            if name in low_bit:
                assert config.method.sent_grid is not None, "a low-bit parameter is sent on a grid"
                codes = aligned // BLOCK * config.method.sent_grid.bytes_per_block
                if all(decodes(module) for module in holders[id(p)]):
                    p.packed = _DecodedInLayer()  # type: ignore[attr-defined]
                else:
                    decoded = p.numel() * p.dtype.itemsize
                if workers > 1:
                    gathered, sent = (0, codes // workers) if self.replicated else (codes, 0)
            elif workers > 1:
                gathered = aligned * p.dtype.itemsize
            self.of[id(p)] = _Parameter(p.numel(), gathered=gathered, decoded=decoded, sent=sent)
            p.register_post_accumulate_grad_hook(self._collect)
        for module in model.modules():
            if any(p is not None for p in module._parameters.values()):
                module.register_forward_pre_hook(self._before_forward)
                module.register_forward_hook(self._after_forward)
        largest = max(shard_numel(p.numel(), workers) for p in model.parameters())
        # Of a float64 gradient, the update reads a float32 copy.
        copied = 4 * largest if self.accumulation == torch.float64 else 0
        self.update_bytes = max(_norm_bytes(largest), copied)
        self.order: list[tuple[_Parameter, int]] = []
        self.recorded = False
        self._reset()

    def _reset(self) -> None:
        self.queue = deque(self.order)
        # parameter -> the last use for which it was fetched
        self.latest: dict[int, int] = defaultdict(lambda: -1)
        self.step = 0
        self.n_whole = 0
        self.bucket: list[nn.Parameter] = []
        self.n_collected = 0

    def held(self) -> int:
        """Bytes of whole parameters."""
        return sum(b.nbytes for p in self.of.values() if p.status == "whole" for b in p.buffers)

    def end_pass(self, *, is_last: bool) -> None:
        for p in self.of.values():
            p.forget()
        self.recorded = True
        self._reset()

    def _before_forward(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        self._fetch(module)
        return tuple(_on_backward(x, lambda: self._release(module)) for x in inputs)

    def _after_forward(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        self._release(module)
        return _on_backward(output, lambda: self._fetch(module))

    def _own(self, module: nn.Module) -> list["_Parameter"]:
        return [self.of[id(p)] for p in module._parameters.values() if p is not None]

    def _fetch(self, module: nn.Module) -> None:
        needed = self._own(module)
        self._gather([p for p in needed if p.status == "shard"])
        for p in needed:
            p.users.add(id(module))
            if p.status == "inflight":
                p.wait()
        if self.recorded:
            self._fetch_ahead(needed)
        else:
            self.order += [(p, self.step) for p in needed]
        self.step += 1

    def _gather(self, parameters: list["_Parameter"]) -> None:
        for p in parameters:
            p.gather()
            self.n_whole += p.numel

    def _fetch_ahead(self, needed: list["_Parameter"]) -> None:
        due = {id(p) for p in needed if self.latest[id(p)] < self.step}
        while self.queue and due:
            p, step = self.queue.popleft()
            self.latest[id(p)] = step
            due.discard(id(p))
        room = min(2 * self.block - self.n_whole, self.block)
        ahead: list[_Parameter] = []
        while self.queue and sum(p.numel for p in ahead) < room:
            p, step = self.queue.popleft()
            self.latest[id(p)] = max(self.latest[id(p)], step)
            if p.status == "shard" and p not in ahead:
                ahead.append(p)
        self._gather(ahead)

    def _release(self, module: nn.Module) -> None:
        for p in self._own(module):
            p.users.discard(id(module))
            if p.status == "whole" and not p.users:
                p.release()
                self.n_whole -= p.numel

    def _collect(self, parameter: nn.Parameter) -> None:
        if self.bucket and sum(p.numel() for p in self.bucket) + parameter.numel() > self.block:
            self._reduce()
        self.bucket.append(parameter)
        self.n_collected += 1
        if self.n_collected == len(self.of):
            self._reduce()

    @torch.no_grad()
    def _reduce(self) -> None:
        """What `zero.stage3` does to a full bucket, parameters sorted or not."""
        gradients = [p.grad for p in self.bucket if p.grad is not None]
        if self.workers == 1:
            partitions = [g.reshape(-1).to(self.accumulation) for g in gradients]
        else:
            wire = torch.float64 if self.accumulation == torch.float64 else gradients[0].dtype
            sizes = [shard_numel(g.numel(), self.workers) for g in gradients]
            rows = torch.empty(self.workers, sum(sizes), dtype=wire)
            for g, size in zip(gradients, sizes, strict=True):
                nn.functional.pad(g.reshape(-1), (0, self.workers * size - g.numel()))
            mine = torch.empty_like(rows[0])
            partitions = list(mine.to(self.accumulation).split(sizes))
        del gradients, partitions
        for p in self.bucket:
            p.grad = None
        self.bucket = []


class _DecodedInLayer:
    """In the place of a gathered weight's codes: its layer makes the values that it multiplies with."""

    in_layer = True

    def dense(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype)


class _Parameter:
    """Where a parameter is: only as a shard, being gathered, or whole."""

    def __init__(self, numel: int, *, gathered: int, decoded: int, sent: int):
        self.numel = numel
        self.gathered, self.decoded, self.sent = gathered, decoded, sent  # bytes of buffers; 0: none is made
        self.users: set[int] = set()  # modules at work
        self.status = "shard"
        self.buffers: list[Tensor] = []
        self.was_sent = False

    def forget(self) -> None:
        self.release()
        self.users.clear()
        self.was_sent = False

    def gather(self) -> None:
        self.status = "inflight"
        # Replicated codes are gathered once a step, from a copy of the shard.
        sizes = (self.gathered, 0 if self.was_sent else self.sent)
        self.buffers = [torch.empty(n, dtype=torch.uint8) for n in sizes if n]
        self.was_sent = True

    def wait(self) -> None:
        self.status = "whole"
        if self.decoded:
            decoded = torch.empty(self.decoded, dtype=torch.uint8)
            self.buffers = [decoded]

    def release(self) -> None:
        self.status = "shard"
        self.buffers = []


class StandardSizes(NamedTuple):
    """What cannot be told from a few blocks of a model, for partitions are cut anywhere."""

    own_share: float  # of all elements, those of the parameters that a worker's partition touches
    update_bytes: int

    @classmethod
    def of(cls, model: nn.Module, workers: int, stage: int) -> "StandardSizes":
        numels = [p.numel() for p in model.parameters()]
        n, itemsize = sum(numels), next(model.parameters()).dtype.itemsize
        upcast = 4 if itemsize < 4 else 0
        if stage == 0:
            copied = min(n, ALLREDUCE_BUCKET)  # by a single worker too
            return cls(1.0, max((n + copied) * itemsize, n * (itemsize + upcast) + _norm_bytes(max(numels))))
        part = flat_numel(n, workers) // workers
        own = _own_numel(numels, part, workers)
        # The gradients of the passes are gone when the norm of the partition's float32 ones is taken.
        return cls(own / n, max((own + part) * itemsize + part * upcast, 4 * part + _norm_bytes(part)))


def _own_numel(numels: Sequence[int], part: int, workers: int) -> int:
    """Elements of the parameters that a worker's partition touches, on the worker where they are most."""
    found = [0] * workers
    offset = 0
    for n in numels:
        for worker in range(offset // part, (offset + n - 1) // part + 1):
            found[worker] += n
        offset += n
    return max(found)


class Standard:
    """DeepSpeed's stages 0 to 2: whole weights, and gradients that each pass adds to (0, 1) or cuts (2)."""

    def __init__(
        self,
        config: RunConfig,
        model: nn.Module,
        workers: int,
        stage: int,
        sizes: "StandardSizes",  # of the whole model, of which `model` may be a part
    ):
        from lowbit_dist.zero.engine import block_numel

        self.stage = stage
        self.parameters = list(model.parameters())
        self.bucket_numel = max(block_numel(model), *(p.numel() for p in self.parameters))
        self.own_numel = int(sizes.own_share * sum(p.numel() for p in self.parameters))
        # The second micro-batch of a step adds to the gradients of the first.
        self.rounds = [min(2, config.accumulation(workers))]
        self.update_bytes = sizes.update_bytes
        self.kept: list[Tensor] = []  # gradients of the passes before
        self.buffer: Tensor | None = None  # of the bucket
        self.own: Tensor | None = None  # this worker's part of a pass's gradients
        self.n_in_bucket = 0
        for p in self.parameters if stage else ():
            p.register_post_accumulate_grad_hook(self._collect)

    def held(self) -> int:
        return 0

    def end_pass(self, *, is_last: bool) -> None:
        if self.stage == 1 and is_last:
            for p in self.parameters:
                self._cut(p)
        if self.stage == 2 or is_last:
            self.buffer = None
        if self.own is not None and not self.kept:
            self.kept = [self.own]
        self.own = None
        self.n_in_bucket = 0

    @torch.no_grad()
    def _collect(self, parameter: nn.Parameter) -> None:
        if self.buffer is None:
            self.buffer = torch.empty(self.bucket_numel, dtype=parameter.dtype)
        if self.stage == 2:
            self._cut(parameter)

    @torch.no_grad()
    def _cut(self, parameter: nn.Parameter) -> None:
        """Move a gradient to the bucket, and a full bucket's to this worker's part."""
        if self.n_in_bucket + parameter.numel() > self.bucket_numel:
            if self.own is None:
                self.own = torch.empty(self.own_numel, dtype=parameter.dtype)
            self.n_in_bucket = 0
        self.n_in_bucket += parameter.numel()
        parameter.grad = None


def _norm_bytes(numel: int) -> int:
    """The float64 copies of the largest gradient's elements that `zero.global_norm` makes at once."""
    return 16 * min(numel, NORM_CHUNK)


class _OnBackward(torch.autograd.Function):
    """The identity, which calls back when the gradient passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: Callable[[], None]) -> Tensor:
        ctx.call = call
        return x.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        ctx.call()
        return gradient, None


def _on_backward(x: Any, call: Callable[[], None]) -> Any:
    return _OnBackward.apply(x, call) if isinstance(x, Tensor) and x.requires_grad else x
