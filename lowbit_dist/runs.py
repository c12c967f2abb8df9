"""What a folder of runs holds: each run's configuration, numbers and state, read from its files alone.

While a launcher holds its lock a run is *starting* until its workers have made a step, then *running*.  It is
*finished* when its summary is of its last step, *failed* when its last launch ended with an error, and
*stopped* otherwise: by a signal, by a kill, or before it began.
"""

import contextlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lowbit_dist import files, heartbeat
from lowbit_dist.config import RunConfig
from lowbit_dist.errors import ConfigError
from lowbit_dist.naming import CONFIG, find_runs
from lowbit_dist.record import LAYERS, METRICS, rows_of

SUMMARY = "summary.json"
INPUTS = "inputs.json"  # the hashes of what the run was made from
BASELINES = ".baselines.json"  # the planned memory of what the run is compared with
LOCK = ".lock"  # held by the run's launcher
FAILURE = ".failure"  # why the last launch ended, if by an error
LOOK = 0.2  # seconds: who only looks whether a run is running has its lock for a moment

RunState = Literal["finished", "starting", "running", "stopped", "failed"]


@dataclass(frozen=True)
class RunFolder:
    """One run as its folder shows it."""

    folder: Path
    config: RunConfig
    state: RunState
    why: str | None  # of a failed run, one line
    rows: list[dict[str, Any]]
    summary: dict[str, Any] | None  # of a finished run

    @property
    def is_alive(self) -> bool:
        """Whether a launcher of this machine is at work on it."""
        return self.state in ("starting", "running")

    @property
    def step(self) -> int:
        return self.rows[-1]["step"] if self.rows else 0

    def last(self, key: str) -> Any:
        """The newest value of a column, None if there is none."""
        return next((row[key] for row in reversed(self.rows) if row.get(key) is not None), None)

    @property
    def has_diverged(self) -> bool:
        """Whether its newest validation loss is above that of guessing."""
        measured = (row for row in reversed(self.rows) if "val_loss" in row or "diverged" in row)
        newest: dict[str, Any] = next(measured, {})
        return bool(newest.get("diverged"))

    @property
    def parent(self) -> str | None:
        """The run that it started from."""
        return self.config.run.parent

    @property
    def made_from(self) -> dict[str, str | None]:
        """The hashes of its data, tokenizer and pretrained base; none of a run of an earlier version."""
        return content(self.folder / INPUTS)

    def described(self) -> str:
        """Where it stands, in words."""
        at = f"{self.state} at step {self.step:,} of {self.config.train.steps:,}"
        if self.has_diverged:
            newest = next(row for row in reversed(self.rows) if "diverged" in row).get("val_loss")
            loss = "is no number" if newest is None else f"{newest:.4g} is above that of guessing"
            at += f", diverged: its validation loss {loss}"
        return f"{at}: {self.why}" if self.why else at


def read(folder: Path) -> RunFolder:
    """ConfigError if `folder` holds no run."""
    from lowbit_dist import configfile

    config = configfile.load(folder / CONFIG)
    summary = content(folder / SUMMARY)
    is_done = summary.get("steps") == config.train.steps
    rows = rows_of(folder / METRICS)
    state: RunState = "stopped"
    failure = None
    if is_running(folder):
        state = "running" if is_done or _has_stepped(folder, rows) else "starting"
    elif is_done:
        state = "finished"
    elif (folder / FAILURE).exists():
        state, failure = "failed", content(folder / FAILURE).get("why")
    return RunFolder(
        folder=folder,
        config=config,
        state=state,
        why=failure,
        rows=rows,
        summary=summary if state == "finished" else None,
    )


def _has_stepped(folder: Path, rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the workers of the newest start have made a step; those that have ended left rows."""
    start = heartbeat.newest_start(folder)
    return heartbeat.has_stepped(folder, start.number) or (
        bool(rows) and rows[-1].get("time", 0.0) >= start.time
    )


def begin(config: RunConfig) -> None:
    """Let a run that is launched be found by those who look for it, before anything of it is started."""
    with contextlib.suppress(OSError):  # a full disk is reported elsewhere
        files.keep(config.run_dir / CONFIG, config.to_yaml())


def newest_checkpoint(folder: Path) -> tuple[int, float] | None:
    """Its step, and when it was published, in Unix time: the file that names it is as old as it is."""
    file = folder / "latest"
    try:
        return int(file.read_text().removeprefix("step-")), file.stat().st_mtime
    except (OSError, ValueError):  # there is none yet, or a shared file system is away
        return None


def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """What a finished run ended with, as `lowbit train --json` prints it."""
    with files.atomic_write(folder / SUMMARY) as draft:
        draft.write_text(json.dumps(summary, indent=2) + "\n")


def layer_flips(folder: Path) -> dict[str, list[float]]:
    """Layer -> its flip rate at each log step; layers in the order of the model."""
    rates: dict[str, list[float]] = {}
    for row in rows_of(folder / LAYERS):
        for name, numbers in row["layers"].items():
            if "flip_rate" in numbers:
                rates.setdefault(name, []).append(numbers["flip_rate"])
    return rates


def is_running(folder: Path) -> bool:
    """Whether a process of this machine is launching or training the run."""
    try:
        with files.locked(folder / LOCK, shared=True, timeout=0):
            return False
    except BlockingIOError:
        return True
    except OSError:  # never launched; or a file system without locks
        return False


def locked(folder: Path, complaint: str) -> contextlib.AbstractContextManager[Any]:
    """ConfigError with `complaint` while another process holds the lock of a run's or a sweep's folder."""
    return files.locked(folder / LOCK, timeout=LOOK, complaint=ConfigError(complaint))


def note_failure(folder: Path, error: BaseException | None) -> None:
    """Keep in the run's folder why its launch failed; None: it does not, or not yet."""
    with contextlib.suppress(OSError):  # a full disk is reported elsewhere
        if error is None:
            (folder / FAILURE).unlink(missing_ok=True)
        else:
            recurs = getattr(error, "recurs", False)
            failure = {"why": " ".join(str(error).split()), "recurs": recurs}
            (folder / FAILURE).write_text(json.dumps(failure) + "\n")


def failure_recurs(folder: Path) -> bool:
    """Whether the last launch failed for what its training does, and would do again."""
    return content(folder / FAILURE).get("recurs") is True


def named(words: Sequence[str]) -> list[RunFolder]:
    """The runs that are meant by folders or names, of runs or of whole sweeps; each of them once."""
    meant: dict[Path, Path] = {}
    for word in words:
        for folder in find_runs(word):
            meant.setdefault(folder.resolve(), folder)
    return [_read_named(folder) for folder in meant.values()]


def _read_named(folder: Path) -> RunFolder:
    try:
        return read(folder)
    except ConfigError as error:
        raise ConfigError(f"{folder / CONFIG}: {error}") from None


def age(run: RunFolder) -> float:
    """Seconds since something was measured, or since the run began."""
    newest = run.rows[-1].get("time") if run.rows else None
    return max(0.0, time.time() - (newest or (run.folder / CONFIG).stat().st_mtime))


def content(file: Path) -> dict[str, Any]:
    """A mapping that a file holds, or an empty one."""
    try:
        mapping = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return mapping if isinstance(mapping, dict) else {}
