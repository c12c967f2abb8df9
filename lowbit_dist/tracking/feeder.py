"""A thread that feeds an MLflow run, a training's or a sweep's, and tries until the store answers."""

import logging
import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from lowbit_dist.tracking.stores import make_database, resolve, sqlite_file, sqlite_lock, without_password

POLL = 1.0  # seconds between looks for something new
RETRY_SECONDS = 30.0  # at most, between attempts to reach a store that does not answer
FLUSH_SECONDS = 60.0  # that the end waits for a store which takes nothing
log = logging.getLogger(__name__)


class Feeder(ABC):
    """A thread that brings an MLflow run what it lacks; an outage delays it, and stops nothing else.

    A subclass says whether something is lacking (`_is_behind`), brings some of it (`_catch_up`), and finds
    its run or makes it (`_start`).
    """

    meanwhile: str  # what continues while the store does not answer, in a sentence's second half

    def __init__(self, uri: str, run_id: str | None):
        settle_mlflow()
        self.uri = resolve(uri)
        self.shown = without_password(self.uri)
        self.client: Any = None  # an MlflowClient while the store answers
        self.run_id = run_id
        self.failed = False  # the last attempt
        self.progressed = 0.0  # when the store last took something
        self.closing = threading.Event()
        self.thread = threading.Thread(target=self._serve, name="mlflow", daemon=True)

    def close(self) -> bool:
        """Let the store have everything, but do not wait for one that does not answer; whether it has."""
        self.closing.set()
        self.progressed = time.monotonic()
        while self.thread.is_alive() and time.monotonic() < self.progressed + FLUSH_SECONDS:
            self.thread.join(timeout=0.1)
        return not self.thread.is_alive() and not self._is_behind()

    @abstractmethod
    def _is_behind(self) -> bool: ...

    @abstractmethod
    def _catch_up(self) -> None: ...

    @abstractmethod
    def _start(self, client: Any) -> None: ...

    def _serve(self) -> None:
        pause = POLL
        while True:
            is_last = self.closing.is_set()  # an attempt that begins now is the last one if it fails
            done = True
            while done and self._is_behind():
                done = self._attempt(self._catch_up)
            if is_last:
                return
            pause = POLL if done else min(2 * pause, RETRY_SECONDS)
            self.closing.wait(pause)

    def _attempt(self, action: Callable[[], Any]) -> bool:
        """Whether it was done; an error is reported once, and the store is looked at afresh next time."""
        try:
            action()
        except Exception as error:  # whatever happens to MLflow, all else continues
            self.client = None
            if not self.failed:
                log.warning(
                    "MLflow at %s does not answer (%s: %s); %s", self.shown, *innermost(error), self.meanwhile
                )
            self.failed = True
            return False
        self.failed = False
        self.progressed = time.monotonic()
        return True

    def _connected(self) -> Any:
        """A client whose run is there and running; after an error, found or made again."""
        if self.client is None:
            from mlflow.tracking import MlflowClient

            with sqlite_lock(self.uri):
                if self.uri.startswith("sqlite:"):
                    make_database(sqlite_file(self.uri))
                client = MlflowClient(tracking_uri=self.uri)
                self._start(client)
            self.client = client
        return self.client

    def _find_or_make_run(self, client: Any, experiment: str, name: str) -> Any:
        """The run with the number `run_id`, running again, or a new one, whose number that is from now on."""
        from mlflow.utils.mlflow_tags import MLFLOW_RUN_NAME

        run = existing_run(client, self.run_id, self.shown)
        if run is None:
            number = experiment_id(client, experiment, self.uri)
            run = client.create_run(number, tags={MLFLOW_RUN_NAME: name})
        elif run.info.status != "RUNNING":
            client.update_run(run.info.run_id, status="RUNNING")
        self.run_id = run.info.run_id
        return run


def settle_mlflow() -> None:
    """The library's settings for feeding it from a thread that itself tries again; the user's own stay."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    for noisy in ("alembic", "mlflow"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # It prints a traceback for every error that it also raises, and those are reported.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)


def existing_run(client: Any, run_id: str | None, shown: str) -> Any:
    """The run to resume, if this store has it; `shown`: the store's URI for people."""
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

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        beside = sqlite_file(uri).parent / "mlartifacts"  # not in whatever folder a worker runs in
        location = beside.as_uri() if uri.startswith("sqlite:") else None
        try:
            return str(client.create_experiment(name, artifact_location=location))
        except MlflowException:  # another run made it at the same moment
            experiment = client.get_experiment_by_name(name)
            if experiment is None:
                raise
    return str(experiment.experiment_id)


def innermost(error: BaseException) -> tuple[str, str]:
    """The name and the first line of what an error began with: those around it only tell what was tried."""
    while error.__cause__ is not None:
        error = error.__cause__
    return type(error).__name__, next(iter(str(error).splitlines()), "")
