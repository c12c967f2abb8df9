"""Watching the workers from outside: machines that are lost, training that hangs, slots for more workers.

Ray notices a dead process at once, a lost machine after a while, and a stopped or stuck worker never; gloo
and NCCL wait for half an hour.  So the workers' heartbeats and their machines are looked at here,
each second.
"""

import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import psutil

from lowbit_dist import heartbeat
from lowbit_dist.cluster.driver import Failure
from lowbit_dist.cluster.nodes import largest_worker_count, leaving_nodes, nodes, reachable, worker_slots
from lowbit_dist.cluster.stacks import stacks_of
from lowbit_dist.config import RunConfig

EVERY = 1.0  # seconds between looks
NODE_TIMEOUT = 12.0  # seconds without an answer after which a machine is lost
GROWTH_DELAY = 10.0  # seconds for which there must be slots for more workers before they are started
MEDIANS = 20  # of a step: without progress for so long, and at least LEAST, training hangs
LEAST = 60.0  # seconds
SLOW_PHASE_TIMEOUT = 600.0  # seconds, for phases in which a worker may be busy for long


class Watchdog:
    """Looks after start number `start` of a run until `close`.

    machines: ids of the workers' machines on a cluster, None on this machine alone
    gpus: all of the cluster
    end: told why the attempt is over, when Ray Train does not see it; does not return
    """

    def __init__(
        self,
        config: RunConfig,
        start: int,
        machines: list[str] | None,
        gpus: float,
        end: Callable[[Failure], None],
    ):
        self.restart_reason: str | None = None  # why the workers were asked to stop, for others to resume
        self._config, self._start, self._gpus, self._end = config, start, gpus, end
        self._machines = None if machines is None else sorted(set(machines))
        self._workers = 0 if machines is None else len(machines)
        self._addresses = {} if machines is None else {node.id: node for node in nodes(machines)}
        self._answered = dict.fromkeys(self._addresses, time.monotonic())
        self._changes = _Changes()
        self._can_grow_since: float | None = None
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._is_over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._is_over.wait(EVERY):
            failure = self._lost() or self._hang()
            if failure is not None and not self._is_over.is_set():
                self._end(failure)
            if (
                self.restart_reason is None
                and self._machines is not None
                and (restart_reason := self._change()) is not None
            ):
                self.restart_reason = restart_reason
                self._config.stop_file.touch()

    def _lost(self) -> Failure | None:
        """A machine that has not answered for too long, as one without power or network."""
        now = time.monotonic()
        for node in reachable(list(self._addresses.values())):
            self._answered[node.id] = time.monotonic()
        for id, answered in self._answered.items():
            if now - answered > NODE_TIMEOUT:
                node = self._addresses[id]
                return Failure(
                    f"machine {node.name} ({node.ip}) has not answered for {now - answered:.0f} s",
                    ray_failed=True,
                )
        return None

    def _hang(self) -> Failure | None:
        """Training that makes no progress: the stacks of all workers go to the log, and they are ended."""
        heartbeats = heartbeat.read(self._config.run_dir, self._start)
        if not heartbeats:
            return None
        self._changes.note(heartbeats)
        limit = hang_limit(self._config, heartbeats)
        culprit = next((worker for worker in heartbeats if self._changes.age(worker, "time") > limit), None)
        if culprit is not None:
            seconds = self._changes.age(culprit, "time")
            what = "died (Ray has not noticed it)" if _is_gone(culprit) else "does not run"
        else:
            patience = (
                max(limit, SLOW_PHASE_TIMEOUT)
                if any(worker["phase"] in heartbeat.SLOW for worker in heartbeats)
                else limit
            )
            seconds = min(self._changes.age(worker, "beats") for worker in heartbeats)
            if seconds <= patience:
                return None
            culprit = min(heartbeats, key=lambda worker: worker["beats"])
            what = f"is stuck in {culprit['phase']}"
        text = (
            f"worker {culprit['rank']} (process {culprit['pid']} on {culprit['host']}) {what}: no progress "
            f"after step {culprit['step']} for {seconds:.0f} s"
        )
        _log(f"{text}; the stacks of the workers:")
        for line in stacks_of(heartbeats, and_kill=True):
            print(line, file=sys.stderr)
        sys.stderr.flush()
        return Failure(text, ray_failed=True)

    def _change(self) -> str | None:
        """Why other workers should resume the run: a machine is about to go, or there are slots for more."""
        assert self._machines is not None, "on a cluster"
        if leaving := leaving_nodes() & set(self._machines):
            names = ", ".join(sorted(self._addresses[id].name for id in leaving if id in self._addresses))
            return f"{names or 'a machine'} is about to be taken away"
        heartbeats = heartbeat.read(self._config.run_dir, self._start)
        steps = bool(heartbeats) and all(worker["phase"] == "step" for worker in heartbeats)
        if self._workers == self._config.workers or not steps:
            self._can_grow_since = None
            return None
        n = largest_worker_count(
            self._config, self._workers + len(worker_slots(self._config, reachable(nodes()), self._gpus))
        )
        now = time.monotonic()
        if n <= self._workers:
            self._can_grow_since = None
        elif self._can_grow_since is None:
            self._can_grow_since = now
        elif now - self._can_grow_since > GROWTH_DELAY:
            return f"there are slots for {n} workers instead of {self._workers}"
        return None


def hang_limit(config: RunConfig, heartbeats: Iterable[dict[str, Any]]) -> float:
    """Seconds without progress that are a hang: `cluster.hang_timeout`, or by the median step."""
    timeout = config.cluster.hang_timeout
    if timeout != "auto":
        return timeout
    return max(LEAST, MEDIANS * max(worker["step_seconds"] or 0.0 for worker in heartbeats))


class _Changes:
    """When each worker's heartbeat was last seen to change; clocks of other machines are not compared."""

    def __init__(self) -> None:
        self._seen: dict[tuple[int, str], tuple[Any, float]] = {}

    def note(self, heartbeats: Iterable[dict[str, Any]]) -> None:
        now = time.monotonic()
        for worker in heartbeats:
            for key in ("time", "beats"):
                value, _ = self._seen.get((worker["rank"], key), (None, now))
                if value != worker[key]:
                    self._seen[worker["rank"], key] = (worker[key], now)

    def age(self, worker: dict[str, Any], key: str) -> float:
        """Seconds since `key` of a worker's heartbeat changed."""
        return time.monotonic() - self._seen[worker["rank"], key][1]


def _is_gone(worker: Mapping[str, Any]) -> bool:
    """Whether its process is known to have ended: only those of this machine can be asked for."""
    return worker["host"] == socket.gethostname() and not psutil.pid_exists(worker["pid"])


def _log(text: str) -> None:
    """A line of the run's log, where this process's stderr goes."""
    print(f"{time.strftime('%H:%M:%S')} launcher: {text}", file=sys.stderr, flush=True)
