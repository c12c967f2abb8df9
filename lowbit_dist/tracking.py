"""Where a run's numbers go: `metrics.jsonl` in its folder at once, MLflow from a thread of its own.

The file is the record.  MLflow gets each row of it once: a server that is slow or down neither slows nor
stops training, rows wait and are sent later, and those it never got are sent when the run is resumed.
A full disk stops training no more than that: rows wait in memory until there is room.
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
        self._record = _Record(self.folder / METRICS)
        self._is_closed = False
        rows = self._record.cut(step)
        self._mlflow: _Mlflow | None = None
        if config.tracking.mlflow is not None:
            # The folder's note is the newer one: a checkpoint may be of a time with another store.
            self._mlflow = _Mlflow(config, _read(self.folder / RUN_ID) or run_id, rows)

    @property
    def run_id(self) -> str | None:
        return None if self._mlflow is None else self._mlflow.run_id

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
        rows = _rows(self._record.file) + list(self._record.waiting)
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
            with _whole(self.folder / name) as draft:
                draw(draft)
        except OSError as error:
            log.warning("%s is not drawn (%s)", self.folder / name, error.strerror or error)
            return False
        return True


def end(config: RunConfig, status: str) -> None:
    """The MLflow run of workers that are gone: the rows that it has not got, the chart and its status."""
    noted = _read(config.run_dir / RUN_ID)
    if config.tracking.mlflow is not None and noted is not None:
        rows = _rows(config.run_dir / METRICS)
        Tracker(config, step=rows[-1]["step"] if rows else 0, run_id=noted).finish(status)


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


class _Record:
    """The file of rows, in order; those that find no room wait, and no line of it stays torn."""

    def __init__(self, file: Path):
        self.file = file
        self.waiting: deque[dict[str, Any]] = deque()
        self.problem: str | None = None  # why rows wait
        self.torn_at: int | None = None  # where a line begins that was not written whole

    def cut(self, step: int) -> list[dict[str, Any]]:
        """Keep the rows up to `step`, and return those that are in the file."""
        self.waiting = deque(row for row in self.waiting if row["step"] <= step)
        return _cut(self.file, step)

    def add(self, row: dict[str, Any]) -> None:
        self.waiting.append(row)
        self.write()

    def write(self) -> None:
        """Append the rows that wait; an error is reported once, until it is over."""
        try:
            while self.waiting:
                self._append((json.dumps(self.waiting[0]) + "\n").encode())
                self.waiting.popleft()
        except OSError as error:
            if self.problem is None:
                log.warning(
                    "%s cannot be written (%s); training goes on, its rows wait in memory and are written "
                    "when there is room", self.file, error.strerror or error,
                )  # fmt: skip
            self.problem = error.strerror or str(error)
        else:
            if self.problem is not None:
                log.warning("%s is written again, with every row that waited", self.file)
            self.problem = None

    def _append(self, line: bytes) -> None:
        """The line at the end of the file, or an OSError and nothing of it."""
        with self.file.open("ab", buffering=0) as file:
            if self.torn_at is not None:
                file.truncate(min(self.torn_at, file.tell()))
            self.torn_at = end = file.seek(0, os.SEEK_END)
            try:
                while line:
                    line = line[os.write(file.fileno(), line) :]
            except OSError:
                with contextlib.suppress(OSError):
                    file.truncate(end)
                raise
        # Only now: some file systems tell on closing that there was no room.
        self.torn_at = None

    def warn_of_loss(self, *, is_elsewhere: bool) -> None:
        if self.waiting:
            log.warning(
                "%s lacks the last %d rows, from step %d on: it could not be written (%s); %s",
                self.file, len(self.waiting), self.waiting[0]["step"], self.problem,
                "they go to MLflow alone" if is_elsewhere else "they are lost",
            )  # fmt: skip


def _rows(file: Path) -> list[dict[str, Any]]:
    """Every whole row, each step once; a line that a kill or a crash tore is none."""
    return [row for row, _ in _rows_and_ends(file)]


def _rows_and_ends(file: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Rows, and where in the file their lines end."""
    last, end = -1, 0
    for line in file.read_bytes().splitlines(keepends=True) if file.exists() else []:
        end += len(line)
        try:
            row = json.loads(line)
        except ValueError:  # of JSON or of UTF-8
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int) and row["step"] > last:
            last = row["step"]
            yield row, end


def _cut(file: Path, step: int) -> list[dict[str, Any]]:
    """Keep the rows up to `step`, and return them."""
    kept = [(row, end) for row, end in _rows_and_ends(file) if row["step"] <= step]
    rows = [row for row, _ in kept]
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if file.exists() and file.read_bytes() == content:
        return rows
    try:
        with _whole(file) as draft:
            draft.write_bytes(content)
    except OSError:
        if not file.exists():
            return rows
        # No room for a draft: the file is cut where it stands.
        os.truncate(file, kept[-1][1] if kept else 0)
    return rows


@contextlib.contextmanager
def _whole(file: Path) -> Iterator[Path]:
    """A draft that takes the place of `file` in the end; after an error `file` is as it was."""
    draft = file.with_name(f".draft.{file.name}")  # its suffix stays: pictures are written by it
    try:
        yield draft
        draft.rename(file)
    except BaseException:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
        raise


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
        # It prints a traceback for every error that it also raises, and `_attempt` reports those.
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
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
        self.noted: str | None = None  # the run's number, as the run's folder has it
        self.note_failed = False
        self._attempt(self._connected)
        self.thread = threading.Thread(target=self._feed, name="mlflow", daemon=True)
        self.thread.start()

    def _connected(self) -> Any:
        """A client whose run is there and running; after an error, found or made again."""
        if self.client is None:
            from mlflow.tracking import MlflowClient

            with _alone(self.uri):
                if self.uri.startswith("sqlite:"):
                    _make_database(_sqlite_file(self.uri))
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
        self._note()
        # A parameter keeps its first value: MLflow refuses another, as after a restart with more workers.
        params = [
            Param(key, str(value)[:PARAM_LIMIT])
            for key, value in self.config.flat().items()
            if key not in run.data.params
        ]
        for first in range(0, len(params), BATCH):
            client.log_batch(self.run_id, params=params[first : first + BATCH])
        histories = (client.get_metric_history(self.run_id, key) for key in ("tokens", "loss", "val_loss"))
        self.last = max((point.step for history in histories for point in history), default=0)

    def _note(self) -> None:
        """Keep the run's number in the folder, where a run without a checkpoint finds it."""
        if self.run_id is None or self.noted == self.run_id:
            return
        file = self.config.run_dir / RUN_ID
        try:
            with _whole(file) as draft:
                draft.write_text(self.run_id)
            self.noted = self.run_id
        except OSError as error:
            if not self.note_failed:
                log.warning("%s cannot be written yet (%s)", file, error.strerror or error)
            self.note_failed = True

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

    def close(self) -> bool:
        """Send what waits and end the thread; whether all is sent."""
        self.flush(FLUSH_SECONDS)
        with self.changed:
            self.closing = True
            self.changed.notify_all()
        self.thread.join(timeout=FLUSH_SECONDS)
        return not self.waiting and not self.thread.is_alive()

    def finish(self, status: str, files: list[Path], summary: Mapping[str, Any]) -> None:
        if not self.close():
            log.warning(
                "MLflow at %s did not get all of the run; when the run is started again, it gets the rest "
                "of %s", self.uri, self.config.run_dir / METRICS,
            )  # fmt: skip
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
                is_last = self.closing  # an attempt that begins now is the last one if it fails
            sent = self._attempt(partial(self._log, rows))
            with self.changed:
                if sent:
                    for _ in rows:
                        self.waiting.popleft()
                self.changed.notify_all()
                if not sent:
                    if is_last:
                        return
                    self.changed.wait_for(lambda: self.closing, timeout=pause)
            pause = 1.0 if sent else min(2 * pause, 30.0)

    def _log(self, rows: list[dict[str, Any]]) -> None:
        from mlflow.entities import Metric

        client = self._connected()
        self._note()
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
                    "MLflow at %s does not answer (%s: %s); training goes on, and rows wait until it does",
                    self.uri, *_innermost(error),
                )  # fmt: skip
            self.warned = True
            return False
        self.warned = False
        return True


def _innermost(error: BaseException) -> tuple[str, str]:
    """The name and the first line of what an error began with: those around it only tell what was tried."""
    while error.__cause__ is not None:
        error = error.__cause__
    return type(error).__name__, next(iter(str(error).splitlines()), "")


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


def _make_database(file: Path) -> None:
    """A new store gets its name when it is complete.

    MLflow cannot go on with one whose making was cut short by a full disk or a kill.
    """
    if file.exists() and file.stat().st_size:
        return
    from mlflow.store.db import utils

    draft = file.with_name(f"{file.name}.draft")
    leftovers = (draft, draft.with_name(f"{draft.name}-journal"))
    for each in leftovers:
        each.unlink(missing_ok=True)
    engine = utils.create_sqlalchemy_engine(f"sqlite:///{draft}")
    try:
        utils._initialize_tables(engine)
        engine.dispose()
        draft.rename(file)
    finally:
        engine.dispose()
        for each in leftovers:
            each.unlink(missing_ok=True)
