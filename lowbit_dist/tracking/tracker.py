"""The launcher's reader of a run's folder: MLflow gets rows while they come, charts are drawn at the end."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

from lowbit_dist import charts
from lowbit_dist.config import RunConfig
from lowbit_dist.record import LAYERS
from lowbit_dist.tracking.mlflow_run import MlflowRun, is_complete

log = logging.getLogger(__name__)


class Tracker:
    """Brings MLflow, if the run has one, what its folder has; from now until `finish`."""

    def __init__(self, config: RunConfig, say: Callable[[str], None] = log.info):
        """say: told where MLflow shows the run"""
        self.config = config
        self._mlflow = None if config.tracking.mlflow is None else MlflowRun(config, say)

    def finish(self, status: str, summary: Mapping[str, Any] | None = None) -> None:
        """Draw the charts, and end the MLflow run as FINISHED, FAILED or KILLED with all rows and files.

        A run that has measured nothing is not begun in MLflow.
        """
        folder = self.config.run_dir
        pictures = charts.of_run(folder, self.config.run.name, summary)
        if self._mlflow is not None:
            files = [folder / name for name in ("config.yaml", LAYERS) if (folder / name).exists()]
            self._mlflow.finish(status, files + pictures, summary or {})


def catch_up(config: RunConfig, summary: Mapping[str, Any]) -> bool:
    """Bring MLflow what it did not get of a finished run, as while it was down; whether it has all of it."""
    if config.tracking.mlflow is None or is_complete(config):
        return True
    Tracker(config).finish("FINISHED", summary)
    return is_complete(config)
