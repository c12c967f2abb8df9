"""What runs inside each worker process before the training loop does."""

import logging
import os
import traceback
from typing import Any

from lowbit_dist.config import ConfigError, RunConfig

log = logging.getLogger(__name__)


def train(settings: dict[str, Any]) -> dict[str, Any] | None:
    """What Ray Train calls on each worker, inside the process group; None if the run was asked to stop."""
    prepare(settings)
    from lowbit_dist import train as loop
    from lowbit_dist.methods import METHODS

    try:
        config = RunConfig.from_dict(settings["config"], METHODS)
        return loop.run(config, restarts=settings["restarts"])
    except ConfigError:
        raise
    except Exception:
        log.error("%s", traceback.format_exc())
        raise


def prepare(settings: dict[str, Any]) -> None:
    """The worker's folder, threads and log, as the launcher wants them."""
    import torch
    import torch.distributed as dist

    if os.path.isdir(settings["folder"]):  # on another machine it need not exist; then paths must be absolute
        os.chdir(settings["folder"])
    torch.set_num_threads(settings["threads"])
    rank = dist.get_rank()
    handler = logging.FileHandler(settings["log"])
    handler.setFormatter(logging.Formatter(f"%(asctime)s worker {rank}: %(message)s", "%H:%M:%S"))
    # Rank 0 speaks; the others only of what is wrong.
    handler.setLevel(logging.INFO if rank == 0 else logging.ERROR)
    package = logging.getLogger("lowbit_dist")
    package.handlers, package.propagate = [handler], False
    package.setLevel(logging.INFO)
