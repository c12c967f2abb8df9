"""The launcher's reader of a run's folder: MLflow gets rows while they come, charts are drawn at the end."""

import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from lowbit_dist import charts
from lowbit_dist.config import RunConfig
from lowbit_dist.files import atomic_write
from lowbit_dist.record import LAYERS, METRICS, rows_of
from lowbit_dist.tracking.mlflow_run import COMPLETE, MlflowRun, noted_run_id

log = logging.getLogger(__name__)


class Tracker:
    """Brings MLflow, if the run has one, what its folder has; from now until `finish`."""

    def __init__(self, config: RunConfig):
        self.config = config
        self._mlflow = None if config.tracking.mlflow is None else MlflowRun(config)

    @property
    def run_id(self) -> str | None:
        """Of the MLflow run; None without one, and while it could not be made."""
        return None if self._mlflow is None else self._mlflow.run_id

    def finish(self, status: str, summary: Mapping[str, Any] | None = None) -> None:
        """Draw the charts, and end the MLflow run as FINISHED, FAILED or KILLED with all rows and files.

        A run that has measured nothing is not begun in MLflow.
        """
        folder = self.config.run_dir
        rows, layers = rows_of(folder / METRICS), rows_of(folder / LAYERS)
        drawings: dict[str, Callable[[Path], object]] = {}
        if any("loss" in row for row in rows):
            drawings["loss.png"] = partial(charts.loss_curve, rows, title=self.config.run.name)
        if any("flip_rate" in layer for row in layers for layer in row["layers"].values()):
            drawings["flips.png"] = partial(charts.layer_heat, layers, "flip_rate")
        if summary is not None:
            drawings["memory.png"] = partial(
                charts.memory_bars, charts.bytes_per_parameter(summary["memory"])
            )
        drawn = [folder / name for name, draw in drawings.items() if _is_drawn(folder / name, draw)]
        if self._mlflow is not None and (rows or noted_run_id(folder) is not None):
            files = [folder / "config.yaml", *drawn, *([folder / LAYERS] if layers else [])]
            self._mlflow.finish(status, files, summary or {})
        elif self._mlflow is not None:
            self._mlflow.close()


def _is_drawn(file: Path, draw: Callable[[Path], object]) -> bool:
    try:
        with atomic_write(file) as draft:
            draw(draft)
    except OSError as error:
        log.warning("%s is not drawn (%s)", file, error.strerror or error)
        return False
    return True


def catch_up(config: RunConfig, summary: Mapping[str, Any]) -> bool:
    """Bring MLflow what it did not get of a finished run, as while it was down; whether it has all of it."""
    complete = config.run_dir / COMPLETE
    if config.tracking.mlflow is None or complete.exists():
        return True
    Tracker(config).finish("FINISHED", summary)
    return complete.exists()
