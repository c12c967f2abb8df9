"""Ray, started on this machine or joined, and the signals that end a launch."""

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from lowbit_dist import folders
from lowbit_dist.machine import processors
from lowbit_dist.network import ray_address

OBJECT_STORE = 128 << 20  # bytes; no tensor of training travels through Ray's object store

# Read by Ray in this process and handed on to its controller and workers.  What the user has set stays.
RAY_SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # how soon a dead worker is noticed
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # else every print appears twice
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # an actor more: nodes.py watches for machines that are to go
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths of the configuration are those of the shell
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}
# Makes each of Ray's services listen on 127.0.0.1 alone, on every system; `_node_ip_address` does not do it.
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
# How long Ray's processes look for a dead head before they end: on one machine it does not come back.
AWAIT_HEAD = {"RAY_gcs_rpc_server_reconnect_timeout_s": "5"}
# Ray's workers have a niceness of 15, and starve beside anything else that computes.
PRIORITY = {"RAY_worker_niceness": "0"}

# What Ctrl-C, a scheduler and a terminal that closes send.
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(Exception):
    """The user ended the run by a signal."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


@contextlib.contextmanager
def ray_session(
    launcher: int, say: Callable[[str], None], *, object_store: int = OBJECT_STORE
) -> Iterator[None]:
    """Ray on this machine, for this machine alone and gone afterwards, or the cluster at RAY_ADDRESS.

    `launcher`: the process whose number is in the name of the session's folder.  `object_store`: bytes that
    may travel at a time, of a Ray that is started here.
    """
    address = ray_address()
    for name, value in (RAY_SETTINGS | ({} if address else LOOPBACK | AWAIT_HEAD | PRIORITY)).items():
        os.environ.setdefault(name, value)
    import ray

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    with contextlib.ExitStack() as stack:
        if address:
            say(f"joining Ray at {address}")
            stack.callback(ray.shutdown)
            context = ray.init(**quiet)
        else:
            parent, remark = folders.for_sessions(launcher)
            say("starting Ray on this machine" + (f", in {parent}: {remark}" if remark else ""))
            folder = stack.enter_context(folders.session_folder(launcher))
            stack.callback(ray.shutdown)
            context = ray.init(
                address="local",
                num_cpus=processors(),
                include_dashboard=True,
                dashboard_host="127.0.0.1",
                object_store_memory=object_store,
                _temp_dir=str(folder),
                **quiet,
            )
        logging.getLogger("ray").setLevel(logging.ERROR)
        if context.dashboard_url:
            say(f"Ray's dashboard: http://{context.dashboard_url} (its token: {_token()})")
        yield


def _token() -> str:
    """Where Ray's token is, in words."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return "RAY_AUTH_TOKEN"
    return os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token"


def free_in_cluster(say: Callable[[str], None]) -> tuple[float, float]:
    """CPUs and GPUs of the cluster at RAY_ADDRESS that nobody uses now."""
    with ray_session(os.getpid(), say):
        import ray

        free = ray.available_resources()
    return free.get("CPU", 0.0), free.get("GPU", 0.0)


class Signals:
    """SIGINT, SIGTERM and SIGHUP, which end a launch: politely while workers train, at once otherwise.

    The first one then is only noted in `received`; the next one raises `Stopped`.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.are_noted = False  # else they raise

    def handle(self, signum: int, frame: FrameType | None) -> None:
        is_first = self.received is None
        if signum == signal.SIGHUP and not is_first:
            return  # a terminal that closes sends it, and its shell once more
        self.received = signum
        if not (self.are_noted and is_first):
            raise Stopped(signum)


@contextlib.contextmanager
def signals_stop() -> Iterator[Signals]:
    """Inside, signals do what `Signals` says; afterwards, what they did before."""
    signals = Signals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    with signals_handled(signals.handle):
        yield signals


@contextlib.contextmanager
def signals_handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Inside, what asks for an end is the handler's: Ctrl-C, SIGTERM, and the SIGHUP of a terminal that
    closes, unless it is ignored as under `nohup`.  What is written to such a terminal then goes nowhere.
    """
    terminals = [descriptor for descriptor in (0, 1, 2) if os.isatty(descriptor)]

    def handle(signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGHUP:
            _leave(terminals)
        handler(signum, frame)

    before = {signum: signal.getsignal(signum) for signum in STOPPING}
    if before[signal.SIGHUP] is signal.SIG_IGN:
        del before[signal.SIGHUP]
    for signum in before:
        signal.signal(signum, handle)
    try:
        yield
    finally:
        for signum, former in before.items():
            signal.signal(signum, former)


def _leave(terminals: list[int]) -> None:
    """Let descriptors of a terminal that is gone be of /dev/null: every write would be an error."""
    for descriptor in terminals:
        if not os.isatty(descriptor):
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, descriptor)
            os.close(null)
