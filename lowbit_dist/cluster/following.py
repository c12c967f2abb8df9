"""What the launcher sees of its workers: the lines that they append to files in the run's folder."""

import contextlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from lowbit_dist.record import METRICS, Tail

LOG = "log.txt"  # what the workers log
OUR_LINE = re.compile(r"\d\d:\d\d:\d\d \S")  # the time alone; Ray writes the date before it
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
            # Ray's own lines stay in the file: of every worker that ends, in an orderly stop too, they say
            # that it may have been killed for lack of memory.  So does a traceback: its last line comes with
            # the failure.
            if OUR_LINE.match(line) and not line.endswith(TRACEBACK):
                self.progress.say(line.partition(" ")[2])
        for row in self.metrics.rows():
            self.n_rows += 1
            self.progress.row(row)
