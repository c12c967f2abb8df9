"""Where a run's numbers go: `metrics.jsonl` in its folder at once, MLflow from a thread of its own.

The file is the record.  MLflow gets each row of it once: a server that is slow or down neither slows nor
stops training, rows wait and are sent later, and those it never got are sent when the run is resumed.
"""

import contextlib
import fcntl
import importlib.util
import json
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from lowbit_dist import charts
from lowbit_dist.config import ConfigError, RunConfig

METRICS = "metrics.jsonl"
RUN_ID = ".mlflow_run_id"
PARAM_LIMIT = 6000  # characters, MLflow's own
BATCH = 100  # rows taken at once; also MLflow's limit of parameters in a request
METRIC_LIMIT = 1000  # of one request, MLflow's own
FLUSH_SECONDS = 30.0
DRIVERS = {  # database -> the Python package that SQLAlchemy reaches it through
    "postgresql": "psycopg2",
    "postgresql+psycopg2": "psycopg2",
    "postgresql+psycopg": "psycopg",
    "mysql": "MySQLdb",
    "mysql+mysqldb": "MySQLdb",
    "mysql+pymysql": "pymysql",
    "mssql": "pyodbc",
    "mssql+pyodbc": "pyodbc",
    "mssql+pymssql": "pymssql",
}
log = logging.getLogger(__name__)


def check(config: RunConfig) -> None:
    """ConfigError unless `tracking.mlflow` names a store that can be used; quick, opens no database."""
    uri = config.tracking.mlflow
    if uri is None:
        return
    rule = "write sqlite:///FILE, a tracking server's http(s)://HOST:PORT, or null for files alone"
    try:
        parts = urlparse(uri)
        parts.port  # noqa: B018 (read for its ValueError)
    except ValueError as error:
        raise ConfigError(f"tracking.mlflow ({uri}) is not a URI ({error}); {rule}") from None
    if parts.scheme in ("sqlite", "sqlite+pysqlite"):
        _check_sqlite(uri, rule)
    elif parts.scheme in ("http", "https"):
        if not parts.hostname:
            raise ConfigError(f"tracking.mlflow ({uri}) names no host; {rule}")
    elif parts.scheme in DRIVERS:
        package = DRIVERS[parts.scheme]
        if importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"tracking.mlflow ({uri}) needs the Python package {package}, which is not installed; "
                f"install it, or {rule}"
            )
    elif "databricks" not in (uri, parts.scheme):
        raise ConfigError(f"tracking.mlflow ({uri}) is not a store that MLflow 3 writes to; {rule}")


def _check_sqlite(uri: str, rule: str) -> None:
    name = uri.removeprefix("sqlite:///")
    if not uri.startswith("sqlite:///") or name in ("", ":memory:"):
        raise ConfigError(f"tracking.mlflow ({uri}) names no file; {rule}")
    file = _sqlite_file(uri)
    folder = file.parent
    try:
        if not folder.is_dir():
            raise ConfigError(
                f"tracking.mlflow ({uri}): the folder {folder} does not exist; make it, or {rule}"
            )
        if file.is_dir():
            raise ConfigError(f"tracking.mlflow ({uri}): {file} is a folder; {rule}")
        if not os.access(folder, os.W_OK) or (file.exists() and not os.access(file, os.W_OK)):
            raise ConfigError(f"tracking.mlflow ({uri}): {file} cannot be written; {rule}")
        if file.exists() and file.stat().st_size:
            with file.open("rb") as opened:
                if opened.read(16) != b"SQLite format 3\0":
                    raise ConfigError(f"tracking.mlflow ({uri}): {file} is not an SQLite database; {rule}")
    except OSError as error:
        raise ConfigError(f"tracking.mlflow ({uri}) cannot be used: {error.strerror}; {rule}") from None


def resolve(uri: str) -> str:
    """`uri` with a relative SQLite file made absolute, so that it means the same in every process."""
    if not uri.startswith("sqlite:///"):
        return uri
    _, question, query = uri.partition("?")
    return f"sqlite:///{_sqlite_file(uri)}{question}{query}"


def _sqlite_file(uri: str) -> Path:
    return Path(uri.removeprefix("sqlite:///").partition("?")[0]).absolute()


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
            # The folder's note is the newer one: a checkpoint may be of a time with another store.
            self._mlflow = _Mlflow(config, _read(self.folder / RUN_ID) or run_id, rows)

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
    """Every whole row, each step once; a line that a kill or a crash tore is none."""
    rows: list[dict[str, Any]] = []
    for line in file.read_bytes().splitlines() if file.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:  # of JSON or of UTF-8
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            if rows and row["step"] <= rows[-1]["step"]:
                continue
            rows.append(row)
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
        assert config.tracking.mlflow is not None, "tracking.mlflow is set"
        self.config = config
        self.uri = resolve(config.tracking.mlflow)
        self.client: Any = None  # an MlflowClient while the store answers
        self.run_id = run_id
        self.last = 0  # the newest step that MLflow has
        self.waiting: deque[dict[str, Any]] = deque(rows)
        self.changed = threading.Condition()
        self.closing = False
        self.warned = False
        self._attempt(self._connected)
        self.thread = threading.Thread(target=self._feed, name="mlflow", daemon=True)
        self.thread.start()

    def _connected(self) -> Any:
        """A client whose run is there and running; after an error, found or made again."""
        if self.client is None:
            from mlflow.tracking import MlflowClient

            with _alone(self.uri):
                client = MlflowClient(tracking_uri=self.uri)
                self._start(client)
            self.client = client
        return self.client

    def _start(self, client: Any) -> None:
        """Create the run or go on with it, and learn the newest step that it has.

        A run that went back to a checkpoint measures some steps again: what MLflow has stays as it is.
        """
        from mlflow.entities import Param
        from mlflow.utils.mlflow_tags import MLFLOW_RUN_NAME

        run = self._existing(client)
        if run is None:
            experiment = self._experiment(client, self.config.tracking.experiment)
            run = client.create_run(experiment, tags={MLFLOW_RUN_NAME: self.config.run.name})
        elif run.info.status != "RUNNING":
            client.update_run(run.info.run_id, status="RUNNING")
        self.run_id = run.info.run_id
        (self.config.run_dir / RUN_ID).write_text(run.info.run_id)
        # A parameter keeps its first value: MLflow refuses another, as after a restart with more workers.
        params = [
            Param(key, str(value)[:PARAM_LIMIT])
            for key, value in self.config.flat().items()
            if key not in run.data.params
        ]
        for first in range(0, len(params), BATCH):
            client.log_batch(self.run_id, params=params[first : first + BATCH])
        histories = (client.get_metric_history(self.run_id, key) for key in ("loss", "val_loss"))
        self.last = max((point.step for history in histories for point in history), default=0)

    def _existing(self, client: Any) -> Any:
        """The run to go on with, if this store has it."""
        from mlflow.exceptions import MlflowException
        from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, ErrorCode

        if self.run_id is None:
            return None
        try:
            run = client.get_run(self.run_id)
        except MlflowException as error:
            if error.error_code != ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
                raise
            run = None
        if run is None or run.info.lifecycle_stage != "active":
            log.warning("MLflow at %s has no run %s; a new one gets every row", self.uri, self.run_id)
            return None
        return run

    def _experiment(self, client: Any, name: str) -> str:
        from mlflow.exceptions import MlflowException

        found = client.get_experiment_by_name(name)
        if found is None:
            beside = _sqlite_file(self.uri).parent / "mlartifacts"  # not in whatever folder a worker runs in
            location = beside.as_uri() if self.uri.startswith("sqlite:") else None
            try:
                return client.create_experiment(name, artifact_location=location)
            except MlflowException:  # another run made it at the same moment
                found = client.get_experiment_by_name(name)
                if found is None:
                    raise
        experiment_id: str = found.experiment_id
        return experiment_id

    def send(self, row: dict[str, Any]) -> None:
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
        if not complete or self.thread.is_alive():
            log.warning("MLflow at %s did not get all of the run; %s has every row", self.uri, METRICS)
            return
        for file in files:
            self._attempt(partial(self._upload, file))
        self._attempt(partial(self._end, status, summary))

    def _upload(self, file: Path) -> None:
        self._connected().log_artifact(self.run_id, str(file))

    def _end(self, status: str, summary: Mapping[str, Any]) -> None:
        client = self._connected()
        for key in ("digest", "checkpoint"):
            if key in summary:
                client.set_tag(self.run_id, key, summary[key])
        client.set_terminated(self.run_id, status)

    def _feed(self) -> None:
        pause = 1.0
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.waiting or self.closing)
                rows = list(self.waiting)[:BATCH]
                if not rows:
                    return
            sent = self._attempt(partial(self._log, rows))
            with self.changed:
                if sent:
                    for _ in rows:
                        self.waiting.popleft()
                self.changed.notify_all()
                if not sent and (self.closing or self.changed.wait_for(lambda: self.closing, timeout=pause)):
                    return
            pause = 1.0 if sent else min(2 * pause, 30.0)

    def _log(self, rows: list[dict[str, Any]]) -> None:
        from mlflow.entities import Metric

        client = self._connected()
        # Requests of whole rows: one is taken or refused as a whole, so `last` never lies in mid-row.
        batch: list[Any] = []
        for row in (row for row in rows if row["step"] > self.last):
            numbers = {key: value for key, value in row.items() if key not in ("step", "time")}
            if len(batch) + len(numbers) > METRIC_LIMIT:
                client.log_batch(self.run_id, metrics=batch)
                batch = []
            batch += [Metric(key, x, int(row["time"] * 1000), row["step"]) for key, x in numbers.items()]
        if batch:
            client.log_batch(self.run_id, metrics=batch)
            self.last = batch[-1].step

    def _attempt(self, action: Callable[[], Any]) -> bool:
        """Whether it was done; an error is reported once, and the store is looked at afresh next time."""
        try:
            action()
        except Exception as error:  # whatever happens to MLflow, training goes on
            self.client = None
            if not self.warned:
                log.warning(
                    "MLflow at %s does not answer (%s: %s); training goes on, %s has every row",
                    self.uri, type(error).__name__, str(error).splitlines()[0] if str(error) else "", METRICS,
                )  # fmt: skip
            self.warned = True
            return False
        self.warned = False
        return True


@contextlib.contextmanager
def _alone(uri: str) -> Iterator[None]:
    """While this runs, no other process of this machine opens the same SQLite store.

    Two that make a new database at the same moment break each other's migrations.
    """
    if not uri.startswith("sqlite:"):
        yield
        return
    file = _sqlite_file(uri)
    with file.with_name(f"{file.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
