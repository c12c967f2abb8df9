"""The file of rows, `metrics.jsonl`: in order, each step once, no line torn, whatever happens to the disk."""

import contextlib
import json
import logging
import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lowbit_dist.files import atomic_write

METRICS = "metrics.jsonl"
log = logging.getLogger(__name__)


class Record:
    """The file of rows, in order; those that find no room wait, and no line of it stays torn."""

    def __init__(self, file: Path):
        self.file = file
        self.waiting: deque[dict[str, Any]] = deque()
        self.problem: str | None = None  # why rows wait
        self.torn_at: int | None = None  # where a line begins that was not written whole

    def cut(self, step: int) -> list[dict[str, Any]]:
        """Keep the rows up to `step`, and return those that are in the file."""
        self.waiting = deque(row for row in self.waiting if row["step"] <= step)
        return cut(self.file, step)

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
                    "%s cannot be written (%s); training goes on, its rows wait in memory and are written "
                    "when there is room", self.file, error.strerror or error,
                )  # fmt: skip
            self.problem = error.strerror or str(error)
        else:
            if self.problem is not None:
                log.warning("%s is written again, with every row that waited", self.file)
            self.problem = None

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

    def warn_of_loss(self, *, is_elsewhere: bool) -> None:
        if self.waiting:
            log.warning(
                "%s lacks the last %d rows, from step %d on: it could not be written (%s); %s",
                self.file, len(self.waiting), self.waiting[0]["step"], self.problem,
                "they go to MLflow alone" if is_elsewhere else "they are lost",
            )  # fmt: skip


def rows_of(file: Path) -> list[dict[str, Any]]:
    """Every whole row, each step once; a line that a kill or a crash tore is none."""
    return [row for row, _ in _rows_and_ends(file)]


def _rows_and_ends(file: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Rows, and where in the file their lines end."""
    last, end = -1, 0
    for line in file.read_bytes().splitlines(keepends=True) if file.exists() else []:
        end += len(line)
        try:
            row = json.loads(line)
        except ValueError:  # of JSON or of UTF-8
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int) and row["step"] > last:
            last = row["step"]
            yield row, end


def cut(file: Path, step: int) -> list[dict[str, Any]]:
    """Keep the rows up to `step`, and return them."""
    kept = [(row, end) for row, end in _rows_and_ends(file) if row["step"] <= step]
    rows = [row for row, _ in kept]
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if file.exists() and file.read_bytes() == content:
        return rows
    try:
        with atomic_write(file) as draft:
            draft.write_bytes(content)
    except OSError:
        if not file.exists():
            return rows
        # No room for a draft: the file is cut where it stands.
        os.truncate(file, kept[-1][1] if kept else 0)
    return rows
