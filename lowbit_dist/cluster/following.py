"""What the launcher sees of its workers: the lines that they append to files in the run's folder."""

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from lowbit_dist.tracking import METRICS

LOG = "log.txt"  # what the workers log
TRACEBACK = "Traceback (most recent call last):"


class Progress(Protocol):
    """Who is told how the launch goes on."""

    def say(self, text: str) -> None:
        """An event, in one line."""

    def row(self, row: Mapping[str, Any]) -> None:
        """A line of `metrics.jsonl`, as a worker has just written it."""


class Follower:
    """Hands on what the workers append to the run's files."""

    def __init__(self, run_dir: Path, progress: Progress):
        self.progress = progress
        self.metrics = _Tail(run_dir / METRICS)
        self.log = _Tail(run_dir / LOG)

    def read(self) -> None:
        for line in self.log.lines():
            # A traceback stays in the file: its last line comes with the failure.
            if line[:2].isdigit() and not line.endswith(TRACEBACK):
                self.progress.say(line.partition(" ")[2])
        for line in self.metrics.lines():
            with contextlib.suppress(ValueError):
                self.progress.row(json.loads(line))


class _Tail:
    """The lines that are added to a file from now on."""

    def __init__(self, path: Path):
        self.path = path
        self.position = path.stat().st_size if path.exists() else 0

    def lines(self) -> list[str]:
        """Whole ones only; the rest is left for the next time."""
        try:
            with self.path.open("rb") as file:
                # Rows after the checkpoint that a run goes back to are removed, and so is a row that found no
                # room to its end.
                self.position = min(self.position, file.seek(0, os.SEEK_END))
                file.seek(self.position)
                whole, newline, _ = file.read().rpartition(b"\n")
        except OSError:  # not there yet; or a shared file system is away, and what is new comes later
            return []
        self.position += len(whole) + len(newline)
        return whole.decode(errors="replace").splitlines()
