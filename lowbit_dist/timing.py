"""Candidates that take turns, and what their times say: median, middle half, least, ratio to a peer.

Absolute times of a shared machine mean little; ratios of candidates that take turns with their peer do.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

K = TypeVar("K")


def take_turns(
    candidates: Mapping[K, Callable[[], object]], clock: str, repetitions: int
) -> dict[K, list[float]]:
    """Seconds of each run; each candidate runs once in each round, and once before the first."""
    time_of = device_seconds if clock == "device events" else _host_seconds(clock)
    times: dict[K, list[float]] = {name: [] for name in candidates}
    for run in candidates.values():
        run()
    for _ in range(repetitions):
        for name, run in candidates.items():
            times[name].append(time_of(run))
    return times


def clock_of(threads: int, *, on_gpu: bool) -> str:
    """On a GPU the device's events, on one CPU thread the process's own CPU time, on more the wall."""
    return "device events" if on_gpu else "process time" if threads == 1 else "wall time"


def _host_seconds(clock: str) -> Callable[[Callable[[], object]], float]:
    now = time.process_time if clock == "process time" else time.perf_counter

    def seconds(run: Callable[[], object]) -> float:
        start = now()
        run()
        return now() - start

    return seconds


def device_seconds(run: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def middle_half(values: Sequence[float]) -> list[float]:
    if len(values) < 2:
        return [values[0], values[0]]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return [low, high]


def compared(own: Sequence[float], peer: Sequence[float]) -> dict[str, Any]:
    """Seconds of a candidate, and its speed as a multiple of its peer's in the same rounds."""
    ratios = [b / a for a, b in zip(own, peer, strict=True)]
    return {
        "seconds": statistics.median(own),
        "seconds_middle_half": middle_half(own),
        "seconds_least": min(own),
        "speed_to_peer": statistics.median(ratios),
        "speed_to_peer_middle_half": middle_half(ratios),
    }


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
