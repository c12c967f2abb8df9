"""Where a run's numbers go: `metrics.jsonl` in its folder at once, MLflow from a thread of its own.

The file is the record.  MLflow gets each row of it once: a server that is slow or down neither slows nor
stops training, rows wait and are sent later, and those it never got are sent when the run is resumed.
"""

import json
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from lowbit_dist import charts
from lowbit_dist.config import ConfigError, RunConfig

METRICS = "metrics.jsonl"
RUN_ID = ".mlflow_run_id"
PARAM_LIMIT = 6000  # characters, MLflow's own
BATCH = 100  # rows of one request
FLUSH_SECONDS = 30.0
log = logging.getLogger(__name__)


def check(config: RunConfig) -> None:
    """ConfigError unless `tracking.mlflow` names a store that can be used; quick, opens no database."""
    uri = config.tracking.mlflow
    if uri is None:
        return
    parts = urlparse(uri)
    rule = "write sqlite:///FILE, a tracking server's http(s)://HOST:PORT, or null for files alone"
    if parts.scheme == "sqlite":
        folder = _sqlite_file(uri).parent
        if not folder.is_dir():
            raise ConfigError(
                f"tracking.mlflow ({uri}): the folder {folder} does not exist; make it, or {rule}"
            )
        file = _sqlite_file(uri)
        if not os.access(file if file.exists() else folder, os.W_OK):
            raise ConfigError(f"tracking.mlflow ({uri}): {file} cannot be written; {rule}")
        if file.exists() and file.stat().st_size:
            with file.open("rb") as opened:
                if opened.read(16) != b"SQLite format 3\0":
                    raise ConfigError(f"tracking.mlflow ({uri}): {file} is not an SQLite database; {rule}")
    elif parts.scheme in ("http", "https"):
        if not parts.hostname:
            raise ConfigError(f"tracking.mlflow ({uri}) names no host; {rule}")
    elif parts.scheme not in ("postgresql", "mysql", "mssql", "databricks") and "+" not in parts.scheme:
        raise ConfigError(f"tracking.mlflow ({uri}) is not a store that MLflow 3 writes to; {rule}")


def resolve(uri: str) -> str:
    """`uri` with a relative SQLite file made absolute, so that it means the same in every process."""
    return f"sqlite:///{_sqlite_file(uri)}" if uri.startswith("sqlite:") else uri


def _sqlite_file(uri: str) -> Path:
    return Path(uri.removeprefix("sqlite:///")).absolute()


class Tracker:
    """Worker 0's record of a run: rows of numbers, charts, and the MLflow run that carries them."""

    def __init__(self, config: RunConfig, *, step: int, run_id: str | None):
        """Go on after `step`: later rows of a stopped run are cut, since they will be measured again."""
        self.config = config
        self.folder = config.run_dir
        self._file = self.folder / METRICS
        rows = _cut(self._file, step)
        self._mlflow: _Mlflow | None = None
        if config.tracking.mlflow is not None:
            self._mlflow = _Mlflow(config, run_id or _read(self.folder / RUN_ID), rows)
            if self._mlflow.run_id is not None:
                (self.folder / RUN_ID).write_text(self._mlflow.run_id)

    @property
    def run_id(self) -> str | None:
        return None if self._mlflow is None else self._mlflow.run_id

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """One row, on disk when this returns; values that are missing are left out."""
        row = {"step": step, "time": time.time()} | {k: v for k, v in metrics.items() if v is not None}
        with self._file.open("a") as file:
            file.write(json.dumps(row) + "\n")
        if self._mlflow is not None:
            self._mlflow.send(row)

    def flush(self) -> None:
        """Give MLflow a moment to take what it has not got; never wait for a server that is down."""
        if self._mlflow is not None:
            self._mlflow.flush(FLUSH_SECONDS)

    def finish(self, status: str, summary: Mapping[str, Any] | None = None) -> None:
        """Draw the charts and end the MLflow run as FINISHED, FAILED or KILLED."""
        files = [self.folder / "config.yaml"]
        rows = _rows(self._file)
        if any("loss" in row for row in rows):
            files.append(charts.loss_curve(rows, self.folder / "loss.png", title=self.config.run.name))
        if summary is not None:
            files.append(
                charts.memory_bars(bytes_per_parameter(summary["memory"]), self.folder / "memory.png")
            )
        if self._mlflow is not None:
            self._mlflow.finish(status, files, summary or {})


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


# ------------------------------------------------------------------ the file


def _rows(file: Path) -> list[dict[str, Any]]:
    """Every whole row; a last line that a kill tore is none."""
    rows = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def _cut(file: Path, step: int) -> list[dict[str, Any]]:
    """Keep the rows up to `step`, and return them."""
    rows = [row for row in _rows(file) if row["step"] <= step]
    draft = file.with_suffix(".draft")
    draft.write_text("".join(json.dumps(row) + "\n" for row in rows))
    draft.rename(file)
    return rows


def _read(file: Path) -> str | None:
    return file.read_text().strip() or None if file.exists() else None


# ------------------------------------------------------------------ MLflow


class _Mlflow:
    """One MLflow run, fed by a thread."""

    def __init__(self, config: RunConfig, run_id: str | None, rows: list[dict[str, Any]]):
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # the thread below tries again itself
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        for noisy in ("alembic", "mlflow"):
            logging.getLogger(noisy).setLevel(logging.WARNING)
        from mlflow.tracking import MlflowClient

        assert config.tracking.mlflow is not None, "tracking.mlflow is set"
        self.uri = resolve(config.tracking.mlflow)
        self.client = MlflowClient(tracking_uri=self.uri)
        self.waiting: deque[dict[str, Any]] = deque()
        self.changed = threading.Condition()
        self.closing = False
        self.warned = False
        self.run_id = run_id
        # A run that went back to a checkpoint measures some steps again: what MLflow has stays as it is.
        self.sent_before = self._attempt(lambda: self._start(config)) or 0
        for row in rows:
            self.send(row)
        self.thread = threading.Thread(target=self._feed, name="mlflow", daemon=True)
        self.thread.start()

    def _start(self, config: RunConfig) -> int:
        """Create the run or go on with it; the last step that it has."""
        if self.run_id is not None:
            self.client.set_terminated(self.run_id, "RUNNING")
            return max((m.step for m in self.client.get_metric_history(self.run_id, "loss")), default=0)
        from mlflow.entities import Param
        from mlflow.utils.mlflow_tags import MLFLOW_RUN_NAME

        created = self.client.create_run(
            self._experiment(config.tracking.experiment), tags={MLFLOW_RUN_NAME: config.run.name}
        )
        run_id: str = created.info.run_id
        params = [Param(key, str(value)[:PARAM_LIMIT]) for key, value in config.flat().items()]
        for first in range(0, len(params), BATCH):
            self.client.log_batch(run_id, params=params[first : first + BATCH])
        self.run_id = run_id
        return 0

    def _experiment(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        found = self.client.get_experiment_by_name(name)
        if found is None:
            beside = _sqlite_file(self.uri).parent / "mlartifacts"  # not in whatever folder a worker runs in
            location = beside.as_uri() if self.uri.startswith("sqlite:") else None
            try:
                return self.client.create_experiment(name, artifact_location=location)
            except MlflowException:  # another run made it at the same moment
                found = self.client.get_experiment_by_name(name)
                if found is None:
                    raise
        experiment_id: str = found.experiment_id
        return experiment_id

    def send(self, row: dict[str, Any]) -> None:
        if row["step"] > self.sent_before:
            with self.changed:
                self.waiting.append(row)
                self.changed.notify_all()

    def flush(self, seconds: float) -> bool:
        """Wait until all rows are sent, but not if the last attempt failed; whether they are."""
        with self.changed:
            self.changed.wait_for(lambda: not self.waiting or self.warned, timeout=seconds)
            return not self.waiting

    def finish(self, status: str, files: list[Path], summary: Mapping[str, Any]) -> None:
        complete = self.flush(FLUSH_SECONDS)
        with self.changed:
            self.closing = True
            self.changed.notify_all()
        self.thread.join(timeout=FLUSH_SECONDS)
        if self.run_id is None or not complete:
            log.warning("MLflow at %s did not get all of the run; %s has every row", self.uri, METRICS)
            return
        run_id = self.run_id
        for file in files:
            self._attempt(lambda file=file: self.client.log_artifact(run_id, str(file)))  # type: ignore[misc]
        for key in ("digest", "checkpoint"):
            if key in summary:
                self._attempt(lambda key=key: self.client.set_tag(run_id, key, summary[key]))  # type: ignore[misc]
        self._attempt(lambda: self.client.set_terminated(run_id, status))

    def _feed(self) -> None:
        pause = 1.0
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.waiting or self.closing)
                rows = list(self.waiting)[:BATCH]
                if not rows or self.run_id is None:
                    return
            if self._attempt(lambda rows=rows: self._log(rows)) is not None:  # type: ignore[misc]
                pause = 1.0
                with self.changed:
                    for _ in rows:
                        self.waiting.popleft()
                    self.changed.notify_all()
            else:
                with self.changed:
                    self.changed.notify_all()
                    if self.closing or self.changed.wait_for(lambda: self.closing, timeout=pause):
                        return
                pause = min(2 * pause, 30.0)

    def _log(self, rows: list[dict[str, Any]]) -> bool:
        from mlflow.entities import Metric

        metrics = [
            Metric(key, value, int(row["time"] * 1000), row["step"])
            for row in rows
            for key, value in row.items()
            if key not in ("step", "time")
        ]
        for first in range(0, len(metrics), 1000):  # MLflow's limit of one request
            assert self.run_id is not None, "only a started run is fed"
            self.client.log_batch(self.run_id, metrics=metrics[first : first + 1000])
        return True

    def _attempt(self, action: Callable[[], Any]) -> Any:
        """Its result; None after an error, which is reported once."""
        try:
            result = action()
        except Exception as error:
            if not self.warned:
                log.warning(
                    "MLflow at %s does not answer (%s: %s); training goes on, %s has every row",
                    self.uri, type(error).__name__, str(error).splitlines()[0] if str(error) else "", METRICS,
                )  # fmt: skip
            self.warned = True
            return None
        self.warned = False
        return result
