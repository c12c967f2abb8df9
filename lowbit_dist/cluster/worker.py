"""What runs inside each worker process before the training loop does."""

import contextlib
import logging
import os
import traceback
from collections.abc import Iterator
from typing import Any

from lowbit_dist import machine
from lowbit_dist.config import ConfigError, RunConfig
from lowbit_dist.files import locked
from lowbit_dist.folders import provide_home
from lowbit_dist.heartbeat import Heartbeat, Start

STALE_WRITER_TIMEOUT = 60.0  # seconds
log = logging.getLogger(__name__)


def train(settings: dict[str, Any]) -> dict[str, Any] | None:
    """What Ray Train calls on each worker, inside the process group; None if the run was asked to stop."""
    prepare(settings)
    from lowbit_dist import configfile, loop

    try:
        config = configfile.from_dict(settings["config"])
        start: Start = settings["start"]
        with _heartbeat(config, start.number) as heartbeat, _only_writer(config):
            return loop.run(config, begun=start, heartbeat=heartbeat.beat)
    except ConfigError:
        raise
    except Exception:
        log.error("%s", traceback.format_exc())
        raise


@contextlib.contextmanager
def _heartbeat(config: RunConfig, start: int) -> Iterator[Heartbeat]:
    import ray
    import torch.distributed as dist

    node = ray.get_runtime_context().get_node_id()
    heartbeat = Heartbeat(config.run_dir, rank=dist.get_rank(), start=start, node=node)
    try:
        yield heartbeat
    finally:
        heartbeat.close()


@contextlib.contextmanager
def _only_writer(config: RunConfig) -> Iterator[None]:
    """On worker 0, wait for one that has lost its launcher, and does not know it yet, to end."""
    import torch.distributed as dist

    if dist.get_rank() != 0:
        yield
        return
    config.run_dir.mkdir(parents=True, exist_ok=True)
    complaint = RuntimeError(
        f"another process still trains {config.run.name} after {STALE_WRITER_TIMEOUT:.0f} s; end it"
    )
    file = config.run_dir / ".writer"
    with locked(file, timeout=STALE_WRITER_TIMEOUT, complaint=complaint, if_possible=True):
        yield


def prepare(settings: dict[str, Any]) -> None:
    """The worker's folder, threads and log, as the launcher wants them."""
    import torch
    import torch.distributed as dist

    provide_home()  # another machine's user may have none
    if os.path.isdir(settings["folder"]):  # on another machine it need not exist; then paths must be absolute
        os.chdir(settings["folder"])
    torch.set_num_threads(settings["threads"])
    if settings["gpus"]:
        machine.repeat_on_gpus()
    rank = dist.get_rank()
    handler = logging.FileHandler(settings["log"])
    handler.setFormatter(logging.Formatter(f"%(asctime)s worker {rank}: %(message)s", "%H:%M:%S"))
    # Rank 0 speaks; the others only of what is wrong.
    handler.setLevel(logging.INFO if rank == 0 else logging.ERROR)
    package = logging.getLogger("lowbit_dist")
    package.handlers, package.propagate = [handler], False
    package.setLevel(logging.INFO)
