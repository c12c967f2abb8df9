"""The run in MLflow: made or found again, and fed by a thread that tries until the store answers."""

import contextlib
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lowbit_dist.config import RunConfig
from lowbit_dist.files import whole
from lowbit_dist.tracking.record import METRICS
from lowbit_dist.tracking.stores import alone, make_database, resolve, sqlite_file, without_password

RUN_ID = ".mlflow_run_id"
COMPLETE = ".mlflow_complete"  # in a finished run's folder, once MLflow has all of it
PARAM_LIMIT = 6000  # characters, MLflow's own
BATCH = 100  # rows taken at once; also MLflow's limit of parameters in a request
METRIC_LIMIT = 1000  # of one request, MLflow's own
START_SECONDS = 10.0  # that whoever asks for the run's number waits for a server
FLUSH_SECONDS = 30.0
log = logging.getLogger(__name__)


class MlflowRun:
    """One MLflow run, fed by a thread."""

    def __init__(self, config: RunConfig, run_id: str | None, rows: list[dict[str, Any]]):
        settle_mlflow()
        assert config.tracking.mlflow is not None, "tracking.mlflow is set"
        self.config = config
        self.uri = resolve(config.tracking.mlflow)
        self.shown = without_password(self.uri)
        self.client: Any = None  # an MlflowClient while the store answers
        self.run_id = run_id
        self.last = 0  # the newest step that MLflow has
        self.waiting: deque[dict[str, Any]] = deque(rows)
        self.changed = threading.Condition()
        self.closing = False
        self.warned = False
        self.noted: str | None = None  # the run's number, as the run's folder has it
        self.note_failed = False
        self.has_tried = threading.Event()
        self.told = False
        self.thread: threading.Thread | None = None
        with contextlib.suppress(OSError):
            (config.run_dir / COMPLETE).unlink(missing_ok=True)

    def begin(self) -> None:
        """Look for the store, beside whatever goes on here; the first row does so, too."""
        if self.thread is None:
            self.thread = threading.Thread(target=self._feed, name="mlflow", daemon=True)
            self.thread.start()

    def await_try(self) -> None:
        """Wait until the store was looked for once: a database takes the time that it takes, but a server may
        take a connection and never answer.
        """
        self.begin()
        self.has_tried.wait(START_SECONDS if self.uri.startswith("http") else None)

    def _connected(self) -> Any:
        """A client whose run is there and running; after an error, found or made again."""
        if self.client is None:
            from mlflow.tracking import MlflowClient

            with alone(self.uri):
                prepare_store(self.uri)
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

        run = existing_run(client, self.run_id, self.shown)
        if run is None:
            experiment = experiment_id(client, self.config.tracking.experiment, self.uri)
            run = client.create_run(experiment, tags={MLFLOW_RUN_NAME: self.config.run.name})
        elif run.info.status != "RUNNING":
            client.update_run(run.info.run_id, status="RUNNING")
        self.run_id = run.info.run_id
        self._note()
        # A parameter keeps its first value: MLflow refuses another, as after a restart with more workers.
        params = [
            Param(key, without_password(str(value))[:PARAM_LIMIT])
            for key, value in self.config.flat().items()
            if key not in run.data.params
        ]
        for first in range(0, len(params), BATCH):
            client.log_batch(self.run_id, params=params[first : first + BATCH])
        histories = (client.get_metric_history(self.run_id, key) for key in ("tokens", "loss", "val_loss"))
        self.last = max((point.step for history in histories for point in history), default=0)
        if not self.told:
            self.told = True
            log.info("MLflow: %s", link(self.uri, run.info.experiment_id, run.info.run_id))

    def _note(self) -> None:
        """Keep the run's number in the folder, where a run without a checkpoint finds it."""
        if self.run_id is None or self.noted == self.run_id:
            return
        file = self.config.run_dir / RUN_ID
        try:
            with whole(file) as draft:
                draft.write_text(self.run_id)
            self.noted = self.run_id
        except OSError as error:
            if not self.note_failed:
                log.warning("%s cannot be written yet (%s)", file, error.strerror or error)
            self.note_failed = True

    def send(self, row: dict[str, Any]) -> None:
        self.begin()
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
        self.begin()
        self.flush(FLUSH_SECONDS)
        with self.changed:
            self.closing = True
            self.changed.notify_all()
        assert self.thread is not None, "it has begun"
        self.thread.join(timeout=FLUSH_SECONDS)
        return not self.waiting and not self.thread.is_alive()

    def finish(self, status: str, files: list[Path], summary: Mapping[str, Any]) -> None:
        is_complete = self.close()
        if is_complete:
            actions = [*(partial(self._upload, file) for file in files), partial(self._end, status, summary)]
            taken = [self._attempt(action) for action in actions]  # each of them, whatever becomes of others
            is_complete = all(taken)
        if not is_complete:
            log.warning(
                "MLflow at %s did not get all of the run; when the run is started again, it gets the rest "
                "of %s", self.shown, self.config.run_dir / METRICS,
            )  # fmt: skip
        elif status == "FINISHED":
            with contextlib.suppress(OSError):  # of a full disk, others speak
                (self.config.run_dir / COMPLETE).touch()

    def _upload(self, file: Path) -> None:
        upload(self._connected(), self.run_id, file)

    def _end(self, status: str, summary: Mapping[str, Any]) -> None:
        client = self._connected()
        for key in ("digest", "checkpoint"):
            if key in summary:
                client.set_tag(self.run_id, key, summary[key])
        client.set_terminated(self.run_id, status)

    def _feed(self) -> None:
        self._attempt(self._connected)
        self.has_tried.set()
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
                    self.shown, *innermost(error),
                )  # fmt: skip
            self.warned = True
            return False
        self.warned = False
        return True


def link(uri: str, experiment: str, run_id: str) -> str:
    """Where a person finds a run, without a password that the URI may have."""
    parts = urlsplit(without_password(uri))
    if parts.scheme in ("http", "https"):
        return f"{parts.geturl().rstrip('/')}/#/experiments/{experiment}/runs/{run_id}"
    return f"run {run_id} in {parts.scheme}://{parts.netloc}{parts.path}"


def upload(client: Any, run_id: str | None, file: Path) -> None:
    """Make a file one of the run's; the passwords in a configuration's URIs stay here."""
    if file.suffix == ".yaml":
        client.log_text(run_id, without_password(file.read_text()), file.name)
    else:
        client.log_artifact(run_id, str(file))


def settle_mlflow() -> None:
    """The library's settings for feeding it from a thread that itself tries again; the user's own stay."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    for noisy in ("alembic", "mlflow"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # It prints a traceback for every error that it also raises, and those are reported.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)


def prepare_store(uri: str) -> None:
    """Make the database of a new SQLite store."""
    if uri.startswith("sqlite:"):
        make_database(sqlite_file(uri))


def existing_run(client: Any, run_id: str | None, shown: str) -> Any:
    """The run to go on with, if this store has it; `shown`: the store's URI for people."""
    from mlflow.exceptions import MlflowException

    if run_id is None:
        return None
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if not is_absent(error):
            raise
        run = None
    if run is None or run.info.lifecycle_stage != "active":
        log.warning("MLflow at %s has no run %s; a new one gets every row", shown, run_id)
        return None
    return run


def is_absent(error: Any) -> bool:
    """Whether an MlflowException says that the store has no such thing."""
    from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, ErrorCode

    return bool(error.error_code == ErrorCode.Name(RESOURCE_DOES_NOT_EXIST))


def experiment_id(client: Any, name: str, uri: str) -> str:
    """The experiment of a name, made if the store has none."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        beside = sqlite_file(uri).parent / "mlartifacts"  # not in whatever folder a worker runs in
        location = beside.as_uri() if uri.startswith("sqlite:") else None
        try:
            return str(client.create_experiment(name, artifact_location=location))
        except MlflowException:  # another run made it at the same moment
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    return str(found.experiment_id)


def innermost(error: BaseException) -> tuple[str, str]:
    """The name and the first line of what an error began with: those around it only tell what was tried."""
    while error.__cause__ is not None:
        error = error.__cause__
    return type(error).__name__, next(iter(str(error).splitlines()), "")


def noted_run_id(run_dir: Path) -> str | None:
    """The run's number, as `MlflowRun` keeps it in the run's folder."""
    file = run_dir / RUN_ID
    return file.read_text().strip() or None if file.exists() else None
