"""The launcher's readers of a run's folder: services get rows as they come, charts are drawn at the end."""

import contextlib
import logging
from collections.abc import Callable, Mapping
from typing import Any

from lowbit_dist import charts
from lowbit_dist.config import RunConfig
from lowbit_dist.record import LAYERS, METRICS
from lowbit_dist.tracking import stores
from lowbit_dist.tracking.event_file import EventFile
from lowbit_dist.tracking.identity import place_of
from lowbit_dist.tracking.mlflow_run import MlflowRun
from lowbit_dist.tracking.wandb_run import WandbRun

COMPLETE = ".tracked"  # in a finished run's folder, once services have all: which services, of which folder
log = logging.getLogger(__name__)


def check(config: RunConfig) -> None:
    """ConfigError unless each service that `tracking` names can be fed; quick, and asks no server."""
    stores.check(config)
    for kind in (WandbRun, EventFile):
        if getattr(config.tracking, kind.package):
            kind.check(config)


class Tracker:
    """Brings the services that the run is shown in what its folder has; from now until `finish`."""

    def __init__(self, config: RunConfig, say: Callable[[str], None] = log.info):
        """say: told where the services show the run"""
        self.config = config
        with contextlib.suppress(OSError):
            (config.run_dir / COMPLETE).unlink(missing_ok=True)
        self.mlflow = MlflowRun(config, say) if config.tracking.mlflow else None
        self.others = [
            kind(config, say) for kind in (WandbRun, EventFile) if getattr(config.tracking, kind.package)
        ]

    def finish(self, status: str, summary: Mapping[str, Any] | None = None) -> None:
        """Draw the charts, and end the run as FINISHED, FAILED or KILLED in each service, with all rows.

        A run that has measured nothing is not begun there.
        """
        folder = self.config.run_dir
        pictures = charts.of_run(folder, self.config.run.name, summary)
        files = [folder / name for name in ("config.yaml", LAYERS) if (folder / name).exists()] + pictures
        behind = []
        if self.mlflow is not None and not self.mlflow.finish(status, files, summary or {}):
            behind.append(self.mlflow.shown)
        behind += [other.shown for other in self.others if not other.finish(status, summary or {})]
        for service in behind:
            log.warning(
                "%s did not get all of the run; when the run is started again, it gets the rest of %s",
                service, folder / METRICS,
            )  # fmt: skip
        if status == "FINISHED" and not behind and _services(self.config):
            with contextlib.suppress(OSError):  # a full disk is reported elsewhere
                (folder / COMPLETE).write_text(_all_of(self.config))


def catch_up(config: RunConfig, summary: Mapping[str, Any]) -> bool:
    """Bring services what they lack of a finished run, as after they were down; whether all have it."""
    if not is_complete(config):
        Tracker(config).finish("FINISHED", summary)
    return is_complete(config)


def is_complete(config: RunConfig) -> bool:
    """Whether the services that are asked for have all of a finished run, of this folder."""
    try:
        return not _services(config) or (config.run_dir / COMPLETE).read_text() == _all_of(config)
    except OSError:
        return False


def _services(config: RunConfig) -> list[str]:
    """Where the run is to be shown."""
    mlflow = stores.without_password(stores.resolve(config.tracking.mlflow or ""))
    return [*filter(None, (mlflow, config.tracking.wandb, "TensorBoard" * config.tracking.tensorboard))]


def _all_of(config: RunConfig) -> str:
    return "\n".join((*_services(config), place_of(config.run_dir), ""))
