"""What training and the launcher write through: rows as they are measured, charts and a status at the end."""

import logging
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from lowbit_dist import charts
from lowbit_dist.config import RunConfig
from lowbit_dist.files import atomic_write
from lowbit_dist.tracking.mlflow_run import COMPLETE, MlflowRun, noted_run_id
from lowbit_dist.tracking.record import METRICS, Record, rows_of

log = logging.getLogger(__name__)


class Tracker:
    """Worker 0's record of a run: rows of numbers, charts, and the MLflow run that carries them."""

    def __init__(self, config: RunConfig, *, step: int, run_id: str | None):
        """Go on after `step`: later rows of a stopped run are cut, since they will be measured again."""
        self.config = config
        self.folder = config.run_dir
        self._record = Record(self.folder / METRICS)
        self._is_closed = False
        rows = self._record.cut(step)
        self._mlflow: MlflowRun | None = None
        if config.tracking.mlflow is not None:
            # The folder's note is the newer one: a checkpoint may be of a time with another store.
            self._mlflow = MlflowRun(config, noted_run_id(self.folder) or run_id, rows)

    @property
    def run_id(self) -> str | None:
        """Of the MLflow run; waits until its store was looked for. None without one, or while it is down."""
        if self._mlflow is not None:
            self._mlflow.await_try()
        return self.run_id_so_far

    @property
    def run_id_so_far(self) -> str | None:
        """The same without waiting."""
        return None if self._mlflow is None else self._mlflow.run_id

    def begin(self) -> None:
        """Look for MLflow's store, which takes seconds that training need not wait for."""
        if self._mlflow is not None:
            self._mlflow.begin()

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """One row, in the file when this returns if there is room; values that are missing are left out."""
        row = {"step": step, "time": time.time()} | {k: v for k, v in metrics.items() if v is not None}
        self._record.add(row)
        if self._mlflow is not None:
            self._mlflow.send(row)

    def rewind(self, step: int) -> None:
        """Forget the rows after `step`, which will be measured again; what MLflow has stays as it is."""
        self._record.cut(step)

    def close(self) -> None:
        """Send what waits, without ending the run; nothing after `finish`."""
        if self._is_closed:
            return
        self._is_closed = True
        self._record.write()
        self._record.warn_of_loss(is_elsewhere=self._mlflow is not None)
        if self._mlflow is not None:
            self._mlflow.close()

    def finish(self, status: str, summary: Mapping[str, Any] | None = None) -> None:
        """Draw the charts and end the MLflow run as FINISHED, FAILED or KILLED."""
        self._is_closed = True
        self._record.write()
        rows = rows_of(self._record.file) + list(self._record.waiting)
        drawings: dict[str, Callable[[Path], object]] = {}
        if any("loss" in row for row in rows):
            drawings["loss.png"] = partial(charts.loss_curve, rows, title=self.config.run.name)
        if summary is not None:
            drawings["memory.png"] = partial(charts.memory_bars, bytes_per_parameter(summary["memory"]))
        files = [self.folder / "config.yaml"]
        files += [self.folder / name for name, draw in drawings.items() if self._drawn(name, draw)]
        self._record.warn_of_loss(is_elsewhere=self._mlflow is not None)
        if self._mlflow is not None:
            self._mlflow.finish(status, files, summary or {})

    def _drawn(self, name: str, draw: Callable[[Path], object]) -> bool:
        try:
            with atomic_write(self.folder / name) as draft:
                draw(draft)
        except OSError as error:
            log.warning("%s is not drawn (%s)", self.folder / name, error.strerror or error)
            return False
        return True


def end(config: RunConfig, status: str) -> None:
    """The MLflow run of workers that are gone: the rows that it has not got, the chart and its status."""
    noted, rows = noted_run_id(config.run_dir), rows_of(config.run_dir / METRICS)
    # Workers that died early have not looked for the store yet; their rows are here.
    if config.tracking.mlflow is not None and (noted is not None or rows):
        Tracker(config, step=rows[-1]["step"] if rows else 0, run_id=noted).finish(status)


def catch_up(config: RunConfig, summary: Mapping[str, Any]) -> bool:
    """Bring MLflow what it did not get of a finished run, as while it was down; whether it has all of it."""
    complete = config.run_dir / COMPLETE
    if config.tracking.mlflow is None or complete.exists():
        return True
    Tracker(config, step=summary["steps"], run_id=summary["mlflow_run_id"]).finish("FINISHED", summary)
    return complete.exists()


def bytes_per_parameter(memory: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Resident bytes of this run and of the baselines, over all parameters, as `charts.memory_bars` draws
    them.
    """
    named = {
        "this run": memory,
        "dense, fp32 AdamW": memory["plan_dense"],
        "BitNet STE": memory["plan_bitnet"],
    }
    resident = ("low_bit_weights", "scales", "other_weights", "gradients", "optimizer_states", "buffers")
    return {
        name: {
            part: one["components"][part]["bytes"] * one["workers"] / one["parameters"]["total"]
            for part in resident
        }
        for name, one in named.items()
    }
