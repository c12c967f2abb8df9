"""Memory of a live worker: storages, each counted once, between steps and at the highest moment of one."""

import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lowbit_dist import machine
from lowbit_dist.memory.report import Parameters, Peak, report

if TYPE_CHECKING:
    from lowbit_dist.zero import Engine


def measure(engine: "Engine", peak: dict[str, int] | None = None) -> dict[str, Any]:
    """This worker's memory now, between two steps.

    `peak` is what `track_peak` found; empty or None: no step was sampled, and the peak is not known.
    Bytes are those of storages: padding counts, a view of something counted does not.
    """
    shards = engine.shards
    resident = _divided(
        {
            "low_bit_weights": [*engine.resident_codes(), *(shard.codes for shard in shards)],
            "scales": [*engine.sent_scales(), *(shard.scale for shard in shards)],
            "other_weights": [*(shard.weight for shard in shards), *engine.forward_weights()],
            "gradients": engine.gradients(),
            "optimizer_states": [t for shard in shards for slot in shard.state for t in slot.tensors],
            "buffers": engine.module.buffers(),
        }
    )
    low_bit = sum(engine.numels[name] for name in engine.low_bit)
    measured = report(
        resident,
        Peak(peak["transient"], peak["activations"]) if peak else None,
        parameters=Parameters(low_bit, sum(engine.numels.values()) - low_bit),
        workers=engine.world,
    )
    # Of the whole process since it started: Python, libraries and buffers of other kinds included.
    measured["peak_rss_bytes"] = machine.peak_memory()
    return measured


def _divided(components: dict[str, Iterable[Tensor | None]]) -> dict[str, int]:
    """Bytes of the storages of these tensors, which are dense.  One in which several components have some is
    divided among them; what is nobody's is the first one's.
    """
    sizes = dict.fromkeys(components, 0)
    spans: defaultdict[tuple[Any, ...], dict[str, list[tuple[int, int]]]] = defaultdict(dict)
    bytes_of = {}
    for name, tensors in components.items():
        for t in (t for t in tensors if t is not None):
            start = int(t.storage_offset()) * t.itemsize
            spans[_identity(t)].setdefault(name, []).append((start, start + t.nbytes))
            bytes_of[_identity(t)] = t.untyped_storage().nbytes()
    for key, of_component in spans.items():
        taken: list[tuple[int, int]] = []
        covered = 0
        for name, own in of_component.items():
            taken += own
            before, covered = covered, _covered(taken)
            sizes[name] += covered - before
        sizes[next(iter(of_component))] += bytes_of[key] - covered
    return sizes


def _covered(spans: list[tuple[int, int]]) -> int:
    total = end = 0
    for start, stop in sorted(spans):
        total += max(0, stop - max(start, end))
        end = max(end, stop)
    return total


@contextmanager
def track_peak(
    engine: "Engine", meter: "StorageMeter | _Allocator | None" = None
) -> Iterator[dict[str, int]]:
    """Sample one step (its passes and its update): the dictionary is filled when the block ends.

    On a GPU the allocator is asked; on a CPU every operation's results are watched, which slows that step by
    some microseconds an operation. Memory that an operation takes for itself and gives back is seen by the
    first only, that of the communication library by neither.  Compiled code cannot be watched: PyTorch would
    run it uncompiled, with other bits.
    """
    sample: dict[str, int] = {}
    if meter is None and engine.is_compiled and engine.device.type == "cpu":
        yield sample
        return
    if meter is None:
        meter = _Allocator(engine.device) if engine.device.type == "cuda" else StorageMeter()
    resident = {_identity(t) for t in [*engine.forward_weights(), *engine.resident_codes()]}
    after_forward: list[int] = []

    def note(*_: Any) -> None:
        held = {_identity(t): t.untyped_storage().nbytes() for t in engine.gathered()}
        weights = sum(n for key, n in held.items() if key not in resident)
        after_forward.append(meter.now - weights)

    hook = engine.module.register_forward_hook(note)
    try:
        with meter:
            yield sample
    finally:
        hook.remove()
    # Later passes of a step may stand on gradients of the first.
    activations = after_forward[0] if after_forward else 0
    sample |= {"activations": activations, "transient": meter.peak - activations}


class StorageMeter(TorchDispatchMode):
    """Bytes of the storages that operations make while it is entered: `now`, and `peak` since the start.

    A storage counts from the operation that returns it until the last reference to it is gone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._live: dict[int, weakref.ref[Any]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else each operation passes two functions that keep a compiler away, which is not here

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # C++ asks a fake tensor more often than it computes
            return args[0].device
        out = func(*args, **(kwargs or {}))
        known: set[int] | None = None
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in self._live:
                continue
            if known is None:  # an argument's storage that is not ours was there before
                known = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
            if key not in known:
                n = storage.nbytes()
                self._live[key] = weakref.ref(storage, partial(self._freed, key, n))
                self.now += n
                self.peak = max(self.peak, self.now)
        return out

    def _freed(self, key: int, n: int, _: Any) -> None:
        del self._live[key]
        self.now -= n


class _Allocator:
    """The same numbers from CUDA's caching allocator."""

    def __init__(self, device: torch.device):
        self.device = device

    def __enter__(self) -> "_Allocator":
        torch.cuda.reset_peak_memory_stats(self.device)
        self.start = torch.cuda.memory_allocated(self.device)
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    @property
    def now(self) -> int:
        return torch.cuda.memory_allocated(self.device) - self.start

    @property
    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self.device) - self.start


def _tensors(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):  # as most results are
        return [tree]
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.device, tensor.untyped_storage()._cdata
