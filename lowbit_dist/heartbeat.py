"""A worker's heartbeat: a file in the run's folder that says how far its training is.

`Heartbeat.beat` is called by the training loop whenever it makes progress; a thread writes the file, so one
that grows old means a process that does not run, and one that stays the same means a loop that is stuck.  The
thread also ends a worker that has been given up: a later start of the run leaves a line in the run's folder,
which is seen even where Ray, cut off, is not.
"""

import contextlib
import json
import logging
import os
import socket
import statistics
import threading
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from lowbit_dist import machine

log = logging.getLogger(__name__)

FOLDER = ".workers"  # in a run's folder: RANK.json for each worker
STARTS = "starts.jsonl"  # in a run's folder: a line for each start
EVERY = 1.0  # seconds between writes
FILE_BYTES = 1024  # always: the file is overwritten in place, which a full disk allows
SLOW = ("start", "save", "end")  # phases in which a worker may be busy for long without a heartbeat

# Of a start: the first of a launch, of a run without a checkpoint or with one, or a further one of the same
# launch, after a failure or with other workers.
Reason = Literal["begin", "resume", "restart"]


class Start(NamedTuple):
    """One start of a run's workers, and what it and the starts before it were; by whichever launch."""

    number: int  # 1 for the first
    restarts: int  # by a launch that started workers before: after a failure, or with other workers
    resumes: int  # by the user, of a run that was stopped and had a checkpoint
    time: float = 0.0  # Unix time


FIRST = Start(number=1, restarts=0, resumes=0)


class Beat(Protocol):
    """What the training loop calls whenever it makes progress."""

    def __call__(self, phase: str, step: int, memory: Mapping[str, int] | None = None) -> None: ...


def no_heartbeat(phase: str, step: int, memory: Mapping[str, int] | None = None) -> None:
    """For training loops that nobody watches."""


def count_starts(run_dir: Path) -> int:
    """How often a run was started, by all launches together."""
    try:
        return (run_dir / STARTS).read_bytes().count(b"\n")
    except OSError:
        return 0


def newest_start(run_dir: Path) -> Start:
    """Number 0 if the run was never started."""
    try:
        content = (run_dir / STARTS).read_bytes()
    except OSError:
        content = b""
    starts = [_start(line) for line in content.splitlines()]
    reasons = [start.get("reason") for start in starts]
    # Earlier versions do not say why: all but the first were called restarts.
    restarts = sum(reason in ("restart", None) for reason in reasons[1:])
    return Start(
        number=content.count(b"\n"),
        restarts=restarts,
        resumes=reasons.count("resume"),
        time=starts[-1].get("time", 0.0) if starts else 0.0,
    )


def note_start(run_dir: Path, reason: Reason) -> Start:
    """Leave the line of a start that begins now."""
    earlier, now = newest_start(run_dir), time.time()
    with (
        contextlib.suppress(OSError),
        (run_dir / STARTS).open("a") as file,
    ):  # a full disk is reported elsewhere
        file.write(json.dumps({"time": now, "reason": reason}) + "\n")
    return Start(
        number=earlier.number + 1,
        restarts=earlier.restarts + (reason == "restart"),
        resumes=earlier.resumes + (reason == "resume"),
        time=now,
    )


def _start(line: bytes) -> dict[str, Any]:
    try:
        content = json.loads(line)
    except ValueError:  # torn by a crash
        return {}
    return content if isinstance(content, dict) else {}


def has_stepped(run_dir: Path, start: int) -> bool:
    """Whether workers of start number `start` are there and have made a step."""
    return any(worker.get("phase", "start") != "start" for worker in read(run_dir, start))


class Heartbeat:
    """Writes `.workers/RANK.json` of start number `start` until `close`."""

    def __init__(self, run_dir: Path, *, rank: int, start: int, node: str = ""):
        self._run_dir, self._start = run_dir, start
        self._file = run_dir / FOLDER / f"{rank}.json"
        self._fixed = {"rank": rank, "pid": os.getpid(), "host": socket.gethostname(), "node": node}
        self._phase, self._step, self._beats = "start", 0, 0
        self._memory: Mapping[str, int] = {}
        self._seconds: deque[float] = deque(maxlen=64)  # of the last steps
        self._step_began: float | None = None
        self._is_over = threading.Event()
        with contextlib.suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
        self._write()
        if not self._file.exists():
            log.warning("%s cannot be written: nobody will notice if this worker hangs", self._file)
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def beat(self, phase: str, step: int, memory: Mapping[str, int] | None = None) -> None:
        """The loop made progress, in `phase` (start, step, eval, save, end) of `step`.

        memory: component -> bytes of this worker, when they were measured
        """
        now = time.monotonic()
        if step != self._step:
            if self._step_began is not None:
                self._seconds.append(now - self._step_began)
            self._step_began = now
        self._phase, self._step = phase, step
        self._memory = self._memory if memory is None else memory
        self._beats += 1

    def close(self) -> None:
        self._is_over.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            self._file.unlink()

    def _run(self) -> None:
        while not self._is_over.wait(EVERY):
            if count_starts(self._run_dir) > self._start:
                os._exit(1)  # given up: another process trains this part of the run
            self._write()

    def _write(self) -> None:
        seconds = statistics.median(self._seconds) if self._seconds else None
        content = {
            **self._fixed, "start": self._start, "phase": self._phase, "step": self._step,
            "beats": self._beats, "step_seconds": seconds, "time": time.time(),
            "memory": self._memory, "machine": machine.load(),
        }  # fmt: skip
        text = json.dumps(content).encode().ljust(FILE_BYTES - 1) + b"\n"
        with contextlib.suppress(OSError):
            descriptor = os.open(self._file, os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                os.pwrite(descriptor, text, 0)
            finally:
                os.close(descriptor)


def read(run_dir: Path, start: int | None = None) -> list[dict[str, Any]]:
    """What the workers last wrote, by rank; only those of start number `start` if it is given."""
    workers = []
    for file in (run_dir / FOLDER).glob("*.json"):
        try:
            content = json.loads(file.read_bytes())
        except (OSError, ValueError):  # gone, or read while it is written
            continue
        if isinstance(content, dict) and (start is None or content.get("start") == start):
            workers.append(content)
    return sorted(workers, key=lambda worker: worker["rank"])


def newest(run_dir: Path) -> list[dict[str, Any]]:
    """The same of the newest start: a worker that was killed leaves its file behind."""
    workers = read(run_dir)
    start = max((worker.get("start", 0) for worker in workers), default=0)
    return [worker for worker in workers if worker.get("start", 0) == start]
