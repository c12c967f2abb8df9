"""The children of a sweep, trained in processes of their own, as many at once as fit.

What is finished is not run again, and what is half-done resumes from its checkpoint: so it is with each run,
and a sweep has no state of its own.  Signals are handed on to the children, which save and end; one whose
sweep is gone does so too, and is waited for when the sweep is started again.
"""

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Literal, Protocol

from lowbit_dist import cluster, compare, naming, runs, tracking
from lowbit_dist.cluster.checks import finished, gpus_per_worker, how_many_fit
from lowbit_dist.cluster.following import Follower
from lowbit_dist.cluster.session import STOPPING, free_in_cluster, signals_handled
from lowbit_dist.config import ConfigError, RunConfig
from lowbit_dist.files import atomic_write
from lowbit_dist.machine import processors
from lowbit_dist.network import ray_address
from lowbit_dist.sweep.definition import Child, Sweep

POLL = 0.2  # seconds

ChildState = Literal["finished", "failed", "stopped", "waiting"]


class SweepProgress(Protocol):
    """Who is told of the sweep's progress."""

    def say(self, text: str) -> None:
        """An event, in one line."""

    def begins(self, child: Child) -> None:
        """A child's process is started."""

    def row(self, child: Child, row: Mapping[str, Any]) -> None:
        """A line of its `metrics.jsonl`, as it has just been written."""

    def ends(self, child: Child, state: ChildState, why: str) -> None:
        """Its process has ended; `why` is empty for a finished one."""


@dataclass
class SweepResult:
    """How a sweep ended."""

    states: dict[str, ChildState]  # of each child, by its name
    why: dict[str, str]  # of those that failed
    signum: int | None  # that stopped the sweep
    comparison: dict[str, Any]
    files: list[Path]  # of the comparison
    mlflow_run_id: str | None
    diverged: frozenset[str] = frozenset()  # of those that failed: they would do so again

    @property
    def is_decided(self) -> bool:
        """Whether nothing is left to train but what would fail again."""
        return all(state == "finished" or name in self.diverged for name, state in self.states.items())

    @property
    def is_complete(self) -> bool:
        """Whether all is trained and compared."""
        return all(state == "finished" for state in self.states.values()) and bool(self.files)


@dataclass
class _Running:
    child: Child
    process: "subprocess.Popen[bytes]"
    follower: Follower


@dataclass
class _Signals:
    received: list[int] = field(default_factory=list)
    passed_on: int = 0

    def handle(self, signum: int, frame: FrameType | None) -> None:
        self.received.append(signum)


def run(sweep: Sweep, progress: SweepProgress) -> SweepResult:
    """Train what is not finished, compare all, and hand it to MLflow.

    Every child is checked before the first one starts.
    """
    _check(sweep)
    with _alone(sweep), _noting_signals() as signals:
        n = _at_once(sweep, progress)
        parent = _parent(sweep)
        states, why = _train_all(sweep, n, signals, parent, progress)
        signum = signals.received[0] if signals.received else None
        if signum is None:
            _catch_up(sweep)  # not before training, which a store that hangs would hold up
        comparison = compare.compare(
            [runs.read(child.config.run_dir) for child in sweep.children if _began(child)]
        )
        files = _written(comparison, sweep.folder / "comparison", progress)
        if parent is not None:
            _adopt(sweep, parent)
            is_done = all(state == "finished" for state in states.values())
            status = "KILLED" if signum is not None else "FINISHED" if is_done else "FAILED"
            parent.finish(status, [sweep.file, *files], compare.markdown(comparison))
        run_id = None if parent is None else parent.run_id
        diverged = (child for child in sweep.children if runs.failure_recurs(child.config.run_dir))
        names = frozenset(child.name for child in diverged if states[child.name] == "failed")
        return SweepResult(states, why, signum, comparison, files, run_id, names)


def _written(comparison: Mapping[str, Any], folder: Path, progress: SweepProgress) -> list[Path]:
    try:
        return compare.write(comparison, folder)
    except OSError as error:
        progress.say(f"the comparison cannot be written into {folder} ({error.strerror})")
        return []


def _check(sweep: Sweep) -> None:
    """ConfigError if one of the children cannot start; then nothing is left behind."""
    if naming.is_run(sweep.folder):
        raise ConfigError(f"sweep.name ({sweep.name}) is a run's: {sweep.folder}; write another name")
    for child in sweep.children:
        try:
            cluster.check(child.config)
        except ConfigError as error:
            for folder in (*(other.config.run_dir for other in sweep.children), sweep.folder):
                with contextlib.suppress(OSError):  # all that is not empty stays
                    folder.rmdir()
            # A sweep's file names no run: it has another sweep, or a folder the less.
            other = f"write another sweep.name, delete {child.config.run_dir}"
            raise ConfigError(f"{child.name}: {error}".replace("write another run.name", other)) from None


def _began(child: Child) -> bool:
    return naming.is_run(child.config.run_dir)


def _alone(sweep: Sweep) -> contextlib.AbstractContextManager[None]:
    """ConfigError if this sweep is being run already."""
    return runs.locked(
        sweep.folder,
        f"sweep.name ({sweep.name}) is being run by another process; wait for it, or write another name",
    )


@contextlib.contextmanager
def _noting_signals() -> Iterator[_Signals]:
    """Inside, signals that ask for an end are only noted."""
    signals = _Signals()
    with signals_handled(signals.handle):
        yield signals


def _at_once(sweep: Sweep, progress: SweepProgress) -> int:
    if sweep.options.at_once != "auto":
        return sweep.options.at_once
    waiting = [child.config for child in sweep.children if finished(child.config) is None]
    if len(waiting) < 2:
        return 1
    if ray_address():
        cpus, gpus = free_in_cluster(progress.say)
        return max(1, min(_how_many_at_once(config, cpus, gpus) for config in waiting))
    import torch

    n = min(_how_many_at_once(config, processors(), torch.cuda.device_count()) for config in waiting)
    return max(1, min(n, _in_memory(waiting)) if n > 1 else n)


def _how_many_at_once(config: RunConfig, cpus: float, gpus: float) -> int:
    """How many such runs find processors."""
    needs = [(cpus, config.cluster.cpus_per_worker), (gpus, gpus_per_worker(config, gpus))]
    return int(min(how_many_fit(have, config.workers * per_worker) for have, per_worker in needs))


def _in_memory(configs: list[RunConfig]) -> int:
    """How many of the largest of these runs find memory on this machine, each with a Ray of its own."""
    from lowbit_dist import data, memory
    from lowbit_dist.memory.machine import RAY

    counts = []
    for config in {repr({**config.to_dict(), "run": None}): config for config in configs}.values():
        fit = memory.fits_here(config, data.read_manifest(config.data.path).vocab_size)
        need = fit["needed_bytes_per_worker"] * config.workers
        spare = fit["available_bytes_per_worker"] * config.workers - need
        counts.append(1 + max(0, spare // (need + RAY)))
    return min(counts)


def _train_all(
    sweep: Sweep, n: int, signals: _Signals, parent: "tracking.Parent | None", progress: SweepProgress
) -> tuple[dict[str, ChildState], dict[str, str]]:
    """The state of each child once no process is left, and why some failed."""
    states: dict[str, ChildState] = {
        child.name: "waiting" if finished(child.config) is None else "finished" for child in sweep.children
    }
    why: dict[str, str] = {}
    waiting = [child for child in sweep.children if states[child.name] == "waiting"]
    running: list[_Running] = []
    n_done = len(sweep.children) - len(waiting)
    for remark in sweep.remarks:
        progress.say(remark)
    progress.say(
        f"{sweep.name}: {len(waiting)} runs to do, {n_done} finished, at most {n} at once, in {sweep.folder}"
    )
    told: set[str] = set()
    try:
        while running or (waiting and not signals.received):
            for child in list(waiting):
                if signals.received or len(running) >= n:
                    break
                if not runs.is_running(child.config.run_dir):
                    waiting.remove(child)
                    running.append(_start(sweep, child, progress))
                elif child.name not in told:
                    told.add(child.name)
                    progress.say(f"{child.name} is still being trained by another process: it is waited for")
            for training in list(running):
                training.follower.read()
                if (code := training.process.poll()) is not None:
                    running.remove(training)
                    state, reason = _ended(sweep, training.child, code)
                    states[training.child.name] = state
                    if state == "failed":
                        why[training.child.name] = reason
                    progress.ends(training.child, state, reason)
            for signum in signals.received[signals.passed_on :]:
                signals.passed_on += 1
                n = len(running)
                words = "1 run saves and ends" if n == 1 else f"{n} runs save and end"
                progress.say(f"{signal.Signals(signum).name}: {words}; again ends at once")
                for training in running:
                    training.process.send_signal(signum)
            if parent is not None:
                _adopt(sweep, parent)
            time.sleep(POLL)
    finally:
        for training in running:  # after an error of our own: their input ends, and they do
            training.process.stdin.close()  # type: ignore[union-attr]
    return states, why


def _start(sweep: Sweep, child: Child, progress: SweepProgress) -> _Running:
    place = sweep.folder / naming.CHILDREN
    place.mkdir(exist_ok=True)
    config = place / f"{child.name}.yaml"
    with atomic_write(config) as draft:
        draft.write_text(child.config.to_yaml())
    progress.begins(child)
    follower = Follower(child.config.run_dir, _Rows(child, progress))
    with _said(sweep, child).open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "lowbit_dist.sweep.child", str(config)],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            start_new_session=True,  # Ctrl-C in a terminal is for the sweep, which hands it on
        )
    return _Running(child, process, follower)


def _said(sweep: Sweep, child: Child) -> Path:
    return sweep.folder / naming.CHILDREN / f"{child.name}.txt"


@dataclass
class _Rows:
    """Hands on a child's rows; its events are in its log."""

    child: Child
    progress: SweepProgress

    def say(self, text: str) -> None:
        pass

    def row(self, row: Mapping[str, Any]) -> None:
        self.progress.row(self.child, row)


def _ended(sweep: Sweep, child: Child, code: int) -> tuple[ChildState, str]:
    if code == 0:
        return "finished", ""
    if code - 128 in STOPPING or -code in STOPPING:
        return "stopped", "stopped by a signal"
    lines = _said(sweep, child).read_text(errors="replace").splitlines()
    if code < 0:
        return "failed", f"its process died ({signal.Signals(-code).name}); see {_said(sweep, child)}"
    return "failed", lines[-1].partition(" ")[2] if lines else f"exit code {code}"


def _parent(sweep: Sweep) -> "tracking.Parent | None":
    """The sweep's own run, where its children's runs are; None if they are nowhere, or in several stores."""
    stores = {(child.config.tracking.mlflow, child.config.tracking.experiment) for child in sweep.children}
    if len(stores) > 1:
        return None
    ((uri, experiment),) = stores
    return None if uri is None else tracking.Parent(uri, experiment, sweep.name, sweep.folder)


def _catch_up(sweep: Sweep) -> None:
    """What MLflow did not get of children that are finished; a store that does not answer is asked once."""
    for child in sweep.children:
        summary = finished(child.config)
        if summary is not None and not tracking.catch_up(child.config, summary):
            return


def _adopt(sweep: Sweep, parent: "tracking.Parent") -> None:
    for child in sweep.children:
        if (run_id := tracking.noted_run_id(child.config.run_dir)) is not None:
            tags = {"sweep": sweep.name, "label": child.label, "seed": str(child.seed)}
            parent.adopt(run_id, tags)
