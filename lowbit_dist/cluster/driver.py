"""The launcher's end of the process that talks to Ray.

Ray ends the process that started it when its own head dies, so that process is not the launcher's: it is a
child (`lowbit_dist.cluster.fit`), and one that dies is replaced.  They talk through a socket; when the
launcher dies, the child ends, and Ray with it.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from lowbit_dist import machine
from lowbit_dist.cluster.following import LOG
from lowbit_dist.config import ConfigError, RunConfig
from lowbit_dist.folders import remove_left_sessions
from lowbit_dist.heartbeat import Start

SHUTDOWN_TIMEOUT = 30  # seconds that Ray has to end by itself
MORE_MEMORY = (
    "free memory there, write a smaller train.micro_batch, or train on more machines; `lowbit plan` says "
    "what a worker needs"
)

Work = Callable[[dict[str, Any]], dict[str, Any] | None]


@dataclass(frozen=True)
class Failure:
    """Why an attempt ended without a result."""

    text: str  # one line
    error: str | None = None  # the program's own; None for what came from outside, such as a process's death
    is_final: bool = False  # it would come again for ever
    ray_failed: bool = False  # Ray did not answer as it should: it is started anew


@dataclass(frozen=True)
class Change:
    """The workers stopped, with a checkpoint, for others to resume."""

    text: str


Outcome = dict[str, Any] | Failure | Change | ConfigError | None  # None: asked to stop, the workers did


class Driver:
    """The process, with Ray and the workers on this machine."""

    def __init__(self, config: RunConfig, work: Work, probed: set[str]):
        """probed: machines that are known to be able to carry the run"""
        import cloudpickle

        self._begin()
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "lowbit_dist.cluster.fit", str(theirs.fileno())]
        with theirs, (config.run_dir / LOG).open("a") as log:
            self._process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # Ctrl-C in a terminal is for the launcher; and what Ray leaves behind is known by it.
                start_new_session=True,
            )
        self._pipe = Connection(ours.detach())
        self._send(
            cloudpickle.dumps({"config": config, "launcher": os.getpid(), "work": work, "probed": probed})
        )

    def fit(self, start: Start) -> None:
        """Begin an attempt."""
        self._begin()
        self._send(start)

    def _begin(self) -> None:
        self._is_busy = True  # until an attempt has ended
        self._oom_kills = machine.oom_kills()

    def _send(self, message: Any) -> None:
        with contextlib.suppress(OSError):  # of one that has died, `messages` tells
            self._pipe.send(message)

    def messages(self, seconds: float) -> Iterator[tuple[str, Any]]:
        """What it says: ("say", an event's text), ("probed", machines), and in the end
        ("ended", an Outcome).
        """
        try:
            while self._pipe.poll(seconds):
                message = self._pipe.recv()
                self._is_busy &= message[0] != "ended"
                yield message
                seconds = 0.0
        except (EOFError, OSError):
            code = self._process.wait()
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            text = f"Ray, or the process that talks to it, died ({how})"
            if machine.oom_kills() > self._oom_kills:
                text += f", when memory had run out on this machine; {MORE_MEMORY}"
            yield "ended", Failure(text, ray_failed=True)

    def close(self) -> None:
        """End it, Ray and the workers, whatever state they are in; at once if an attempt is under way."""
        self._pipe.close()
        if not self._is_busy:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(SHUTDOWN_TIMEOUT)
        for pid in _session(self._process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()
        remove_left_sessions()


def _session(leader: int) -> Iterator[int]:
    """Processes of the session that a process leads, or led."""
    import psutil

    for pid in psutil.pids():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.getsid(pid) == leader:
                yield pid
