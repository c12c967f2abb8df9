"""The launcher's end of the process that talks to Ray.

Ray ends the process that started it when its own head dies, so that process is not the launcher's: it is a
child (`lowbit_dist.cluster.fit`), and one that dies is replaced.  They talk through a socket; when the
launcher dies, the child ends, and Ray with it.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from lowbit_dist.cluster.following import LOG
from lowbit_dist.config import ConfigError, RunConfig

SHUTDOWN_TIMEOUT = 30  # seconds that Ray has to end by itself

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

    def fit(self, restarts: int) -> None:
        """Begin an attempt."""
        self._send(restarts)

    def _send(self, message: Any) -> None:
        with contextlib.suppress(OSError):  # of one that has died, `messages` tells
            self._pipe.send(message)

    def messages(self, seconds: float) -> Iterator[tuple[str, Any]]:
        """What it says: ("say", an event's text), ("probed", machines), and in the end
        ("ended", an Outcome).
        """
        try:
            while self._pipe.poll(seconds):
                yield self._pipe.recv()
                seconds = 0.0
        except (EOFError, OSError):
            code = self._process.wait()
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            yield "ended", Failure(f"Ray, or the process that talks to it, died ({how})", ray_failed=True)

    def close(self) -> None:
        """End it, Ray and the workers, whatever state they are in."""
        self._pipe.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(SHUTDOWN_TIMEOUT)
        for pid in _session(self._process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()
        remove_left_sessions(os.getpid())


def _session(leader: int) -> Iterator[int]:
    """Processes of the session that a process leads, or led."""
    import psutil

    for pid in psutil.pids():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.getsid(pid) == leader:
                yield pid


def session_folder(launcher: int) -> str:
    """The beginning of the names of folders for the Ray of one launcher.

    Short, for the names of sockets may have 107 characters.
    """
    return f"lowbit-ray-{launcher}-{_numbering()}-"


def remove_left_sessions(launcher: int) -> None:
    """Folders of this launcher, and of those that were killed; their processes died with them."""
    for folder in Path("/tmp").glob(f"lowbit-ray-*-{_numbering()}-*"):
        pid = folder.name.split("-")[2]
        if pid == str(launcher) or (pid.isdigit() and not Path(f"/proc/{pid}").exists()):
            shutil.rmtree(folder, ignore_errors=True)


def _numbering() -> str:
    """Where a process's number means that process: a container that shares /tmp has its own numbers."""
    try:
        return f"{os.stat('/proc/self/ns/pid').st_ino & 0xFFFFF:x}"
    except OSError:  # another system than Linux
        return "0"
