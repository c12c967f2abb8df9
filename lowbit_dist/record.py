"""The pen of a run: worker 0 writes rows of numbers into the run's folder, and whoever wants them reads them.

    metrics.jsonl   {"step": 10, "time": 1790000000.0, "loss": 6.93, "lr": 0.001, ...}
    layers.jsonl    {"step": 10, "time": 1790000000.0, "layers": {NAME: {"flip_rate": 0.002, ...}, ...}}

Rows are in order, each step once, and no line stays torn, whatever happens to the disk or the process.
"""

import contextlib
import json
import logging
import math
import os
import time
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lowbit_dist.files import atomic_write

METRICS = "metrics.jsonl"
LAYERS = "layers.jsonl"
log = logging.getLogger(__name__)


def layer_name(weight: str) -> str:
    """The name of a weight as people read it."""
    return weight.removeprefix("model.").removesuffix(".weight")


class Record:
    """What worker 0 writes of a run as it trains; the other workers have one that writes nothing."""

    def __init__(self, folder: Path, *, step: int, writes: bool):
        """Resume after `step`: later rows of a stopped run are cut, since they will be measured again."""
        self._files = {name: _RowFile(folder / name) for name in (METRICS, LAYERS)} if writes else {}
        self.rewind(step)

    def log(
        self, step: int, metrics: Mapping[str, float | None], layers: Mapping[str, Mapping[str, float]]
    ) -> None:
        """A row of each file that has something to say, on the disk when this returns if there is room."""
        head = {"step": step, "time": time.time()}
        numbers = {key: value for key, value in metrics.items() if value is not None}
        for name, row in ((METRICS, numbers), (LAYERS, {"layers": layers} if layers else {})):
            if row and name in self._files:
                self._files[name].add(head | row)

    def rewind(self, step: int) -> None:
        """Forget the rows after `step`, which will be measured again."""
        for file in self._files.values():
            file.cut(step)

    def close(self) -> None:
        """Write what waits for room, and tell of what found none."""
        for file in self._files.values():
            file.close()


class _RowFile:
    """A file of rows, in order; those that find no room wait, and no line of it stays torn."""

    def __init__(self, file: Path):
        self.file = file
        self.waiting: deque[dict[str, Any]] = deque()
        self.problem: str | None = None  # why rows wait
        self.torn_at: int | None = None  # where a line begins that was not written to its end

    def cut(self, step: int) -> None:
        """Keep the rows up to `step`."""
        self.waiting = deque(row for row in self.waiting if row["step"] <= step)
        cut(self.file, step)

    def add(self, row: dict[str, Any]) -> None:
        self.waiting.append(row)
        self.write()

    def write(self) -> None:
        """Append the rows that wait; an error is reported once, until it is over."""
        try:
            while self.waiting:
                self._append((json.dumps(self.waiting[0]) + "\n").encode())
                self.waiting.popleft()
        except OSError as error:
            if self.problem is None:
                log.warning(
                    "%s cannot be written (%s); training continues, its rows wait in memory and are written "
                    "when there is room", self.file, error.strerror or error,
                )  # fmt: skip
            self.problem = error.strerror or str(error)
        else:
            if self.problem is not None:
                log.warning("%s is written again, with every row that waited", self.file)
            self.problem = None

    def close(self) -> None:
        self.write()
        if self.waiting:
            log.warning(
                "%s lacks the last %d rows, from step %d on: it could not be written (%s); they are lost",
                self.file, len(self.waiting), self.waiting[0]["step"], self.problem,
            )  # fmt: skip

    def _append(self, line: bytes) -> None:
        """The line at the end of the file, or an OSError and nothing of it."""
        with self.file.open("ab", buffering=0) as file:
            if self.torn_at is not None:
                file.truncate(min(self.torn_at, file.tell()))
            self.torn_at = end = file.seek(0, os.SEEK_END)
            try:
                while line:
                    line = line[os.write(file.fileno(), line) :]
            except OSError:
                with contextlib.suppress(OSError):
                    file.truncate(end)
                raise
        # Only now: some file systems tell on closing that there was no room.
        self.torn_at = None


class Tail:
    """The lines that are appended to a file, as its readers see them: complete ones only.

    A file that was replaced, as when a run resumes and rows after its checkpoint are cut, is read from its
    start again: its reader knows by their steps the rows that it had.  With `from_end`, only what comes
    behind the present end is read, and of a replaced file what comes behind what was read, in whole lines.
    """

    def __init__(self, path: Path, *, from_end: bool = False):
        self.path, self.from_end = path, from_end
        self.position = 0
        self._last = b""  # the line before the position, by which a file that was replaced is told
        if from_end:
            self.lines()

    def lines(self) -> list[str]:
        """Those that are new; what has no newline yet is left for the next time."""
        try:
            with self.path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, min(self.position, size) - len(self._last)))
                if size < self.position or file.read(len(self._last)) != self._last:
                    file.seek(0)  # replaced: rows that were measured again are not as long as they were
                    self.position = file.read(self.position).rfind(b"\n") + 1 if self.from_end else 0
                file.seek(self.position)
                new = file.read()
        except OSError:  # not there yet; or a shared file system is away, and what is new comes later
            return []
        complete = new[: new.rfind(b"\n") + 1]
        self.position += len(complete)
        lines = complete.splitlines(keepends=True)
        self._last = lines[-1] if lines else self._last
        return [line.decode(errors="replace").rstrip("\r\n") for line in lines]

    def newest(self) -> dict[str, Any] | None:
        """The newest of the rows that are new; the others are not looked at."""
        return next(filter(None, map(_row, reversed(self.lines()))), None)

    def rows(self) -> list[dict[str, Any]]:
        """The same as rows; a line that a kill or a crash tore is none."""
        return [row for line in self.lines() if (row := _row(line)) is not None]


def rows_of(file: Path) -> list[dict[str, Any]]:
    """Every complete row, each step once; a line that a kill or a crash tore is none."""
    return [row for row, _, _ in _kept(file)]


def _kept(file: Path, step: float = math.inf) -> Iterator[tuple[dict[str, Any], bytes, int]]:
    """Rows up to `step`, their lines, and where in the file these end."""
    if not file.exists():
        return
    last, end = -1, 0
    with file.open("rb") as lines:
        for line in lines:
            end += len(line)
            row = _row(line) if line.endswith(b"\n") else None
            if row is not None and last < row["step"] <= step:
                last = row["step"]
                yield row, line, end


def _row(line: str | bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:  # of JSON or of UTF-8
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def cut(file: Path, step: int) -> None:
    """Keep the rows up to `step`."""
    kept = [(len(line), end) for _, line, end in _kept(file, step)]
    if not file.exists() or file.stat().st_size == sum(length for length, _ in kept):
        return
    try:
        with atomic_write(file) as draft, draft.open("wb") as out:
            out.writelines(line for _, line, _ in _kept(file, step))
    except OSError:
        # No room for a draft: the file is cut where it stands.
        os.truncate(file, kept[-1][1] if kept else 0)
