"""Training time, without what is beside it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Training time, without evaluations and what a save takes of it."""

    def __init__(self) -> None:
        self.tokens = self.tokens_before = 0
        self.idle = self.idle_before = 0.0
        self.started = self.last = time.monotonic()

    def count(self, tokens: int) -> None:
        self.tokens += tokens

    def rate(self) -> float:
        """Tokens per second since the last call."""
        now = time.monotonic()
        seconds = now - self.last - (self.idle - self.idle_before)
        rate = (self.tokens - self.tokens_before) / max(seconds, 1e-9)
        self.last, self.tokens_before, self.idle_before = now, self.tokens, self.idle
        return rate

    def mean_rate(self) -> float:
        """Tokens per second since the start of this process's training."""
        return self.tokens / max(time.monotonic() - self.started - self.idle, 1e-9)

    @contextmanager
    def paused(self) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.idle += time.monotonic() - began
