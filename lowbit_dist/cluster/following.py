"""What the launcher sees of its workers: the lines that they append to files in the run's folder."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from lowbit_dist.record import METRICS, Tail

LOG = "log.txt"  # what the workers log
TRACEBACK = "Traceback (most recent call last):"


class Progress(Protocol):
    """Who is told how the launch proceeds."""

    def say(self, text: str) -> None:
        """An event, in one line."""

    def row(self, row: Mapping[str, Any]) -> None:
        """A line of `metrics.jsonl`, as a worker has just written it."""


class Unbroken:
    """Progress that no error stops when it can no longer be told, as on a terminal that is closed."""

    def __init__(self, progress: Progress):
        self._progress = progress

    def say(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self._progress.say(text)

    def row(self, row: Mapping[str, Any]) -> None:
        with contextlib.suppress(OSError):
            self._progress.row(row)


class Follower:
    """Hands on what the workers append to the run's files."""

    def __init__(self, run_dir: Path, progress: Progress):
        self.progress = progress
        self.n_rows = 0  # that were handed on
        self.metrics = Tail(run_dir / METRICS, from_end=True)
        self.log = Tail(run_dir / LOG, from_end=True)

    def read(self) -> None:
        for line in self.log.lines():
            # A traceback stays in the file: its last line comes with the failure.
            if line[:2].isdigit() and not line.endswith(TRACEBACK):
                self.progress.say(line.partition(" ")[2])
        for row in self.metrics.rows():
            self.n_rows += 1
            self.progress.row(row)
