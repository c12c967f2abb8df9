"""Ray, started on this machine or joined, and the signals that end a launch."""

import contextlib
import logging
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from lowbit_dist.cluster.driver import remove_left_sessions, session_folder

OBJECT_STORE = 128 << 20  # bytes; tensors never travel through Ray's object store

# Read by Ray in this process and handed on to its controller and workers.  What the user has set stays.
RAY_SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # how soon a dead worker is noticed
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # else every print appears twice
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",
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


class Stopped(Exception):
    """The user ended the run by a signal."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


@contextlib.contextmanager
def ray_session(launcher: int, say: Callable[[str], None]) -> Iterator[None]:
    """Ray on this machine, for this machine alone and gone afterwards, or the cluster at RAY_ADDRESS.

    `launcher`: the process by whose life the session is judged when another one finds its folder.
    """
    address = os.environ.get("RAY_ADDRESS")
    for name, value in (RAY_SETTINGS | ({} if address else LOOPBACK | AWAIT_HEAD | PRIORITY)).items():
        os.environ.setdefault(name, value)
    import ray

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    folder = None
    try:
        if address:
            say(f"joining Ray at {address}")
            context = ray.init(**quiet)
        else:
            say("starting Ray on this machine")
            remove_left_sessions(launcher)
            folder = tempfile.mkdtemp(prefix=session_folder(launcher), dir="/tmp")
            context = ray.init(
                address="local",
                num_cpus=os.cpu_count(),
                include_dashboard=True,
                dashboard_host="127.0.0.1",
                object_store_memory=OBJECT_STORE,
                _temp_dir=folder,
                **quiet,
            )
        logging.getLogger("ray").setLevel(logging.ERROR)
        if context.dashboard_url:
            say(f"Ray's dashboard: http://{context.dashboard_url} (its token: ~/.ray/auth_token)")
        yield
    finally:
        ray.shutdown()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def free_in_cluster(say: Callable[[str], None]) -> tuple[float, float]:
    """CPUs and GPUs of the cluster at RAY_ADDRESS that nobody uses now."""
    with ray_session(os.getpid(), say):
        import ray

        free = ray.available_resources()
    return free.get("CPU", 0.0), free.get("GPU", 0.0)


class Signals:
    """SIGINT and SIGTERM, which end a launch: politely while workers train, at once otherwise.

    The first one then is only noted in `received`; the next one raises `Stopped`.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.are_noted = False  # else they raise

    def handle(self, signum: int, frame: FrameType | None) -> None:
        if self.are_noted and self.received is None:
            self.received = signum
            return
        raise Stopped(signum)


@contextlib.contextmanager
def signals_stop() -> Iterator[Signals]:
    """Inside, signals do what `Signals` says; afterwards, what they did before."""
    if threading.current_thread() is not threading.main_thread():
        yield Signals()
        return
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    signals = Signals()
    for signum in before:
        signal.signal(signum, signals.handle)
    try:
        yield signals
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
