"""A thread that feeds a service, such as an MLflow run, and tries until the service answers."""

import logging
import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lowbit_dist.tracking import stores
from lowbit_dist.tracking.identity import find_or_make, living_run, noted_run_id

POLL = 1.0  # seconds between looks for something new
RETRY_SECONDS = 30.0  # at most, between attempts to reach a service that does not answer
FLUSH_SECONDS = 60.0  # that the end waits for a service which takes nothing
log = logging.getLogger(__name__)


class Feeder(ABC):
    """A thread that brings a service what it lacks; an outage delays it, and stops nothing else.

    A subclass says whether something is lacking (`_is_behind`), brings some of it (`_catch_up`), and after an
    error forgets what it knew of the service (`_lose`).
    """

    meanwhile: str  # what continues while the service takes nothing, in a sentence's second half

    def __init__(self, shown: str):
        """shown: the service in a warning, where its place is known with that"""
        self.shown = shown
        self.problem: str | None = None  # the last attempt's, as a kind
        self.progressed = 0.0  # when the service last took something
        self.closing = threading.Event()
        self.thread = threading.Thread(target=self._serve, name=shown, daemon=True)

    def close(self) -> bool:
        """Let the service have everything, but do not wait for one that does not answer; whether it has."""
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
    def _lose(self) -> None: ...

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
        """Whether it was done; an error is reported once, and the service is looked at afresh next time."""
        try:
            action()
        except Exception as error:  # whatever happens to the service, all else continues
            self._lose()
            problem = described(error)
            if self.problem != (kind := problem.partition("(")[0]):
                log.warning("%s %s; %s", self.shown, problem, self.meanwhile)
            self.problem = kind
            return False
        self.problem = None
        self.progressed = time.monotonic()
        return True


class MlflowFeeder(Feeder):
    """Feeds an MLflow run; a subclass also learns what its run has when that is found or made (`_start`)."""

    def __init__(self, uri: str, folder: Path, experiment: str, name: str):
        """The run that is noted in `folder`, or a new one, made when there is something to bring."""
        settle_mlflow()
        self.uri = stores.resolve(uri)
        super().__init__(f"MLflow at {stores.without_password(self.uri)}")
        self.folder, self.experiment, self.name = folder, experiment, name
        self.client: Any = None  # an MlflowClient while the store answers
        self.run_id = noted_run_id(folder)

    @abstractmethod
    def _start(self, client: Any, run: Any) -> None: ...

    def _lose(self) -> None:
        self.client = None

    def _attempt(self, action: Callable[[], Any]) -> bool:
        def with_a_run() -> None:
            try:
                action()
            except Exception as error:
                if not self._has_lost_run(error):
                    raise
                action()  # with a new run

        return super()._attempt(with_a_run)

    def _has_lost_run(self, error: Exception) -> bool:
        """Whether the error means that the run was deleted; the next connection then makes another."""
        refused = getattr(error, "error_code", None) in ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST")
        if not refused or self.client is None or self.run_id is None:
            return False
        if living_run(self.client, self.run_id) is not None:
            return False
        self.client = None
        return True

    def _connected(self) -> Any:
        """A client whose run is there and running; after an error, found or made again."""
        if self.client is None:
            from mlflow.tracking import MlflowClient

            with stores.sqlite_lock(self.uri):
                if self.uri.startswith("sqlite:"):
                    stores.make_database(stores.sqlite_file(self.uri))
                client = MlflowClient(tracking_uri=self.uri)
                run = find_or_make(client, self.uri, self.run_id, self.folder, self.experiment, self.name)
            self.run_id = run.info.run_id
            self._start(client, run)
            self.client = client
        return self.client


def settle_mlflow() -> None:
    """The library's settings for feeding it from a thread that itself tries again; the user's own stay."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # the launcher says where it is
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    for noisy in ("alembic", "mlflow"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # It prints a traceback for every error that it also raises, and those are reported.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    logging.getLogger("mlflow.utils.git_utils").setLevel(logging.CRITICAL)  # where there is no git


def described(error: BaseException) -> str:
    """What is wrong with a store, in words that follow its name; what comes before a bracket is the kind."""
    if isinstance(error, stores.Unusable):
        return str(error)
    status = getattr(error, "get_http_status_code", lambda: 500)()  # as MLflow's own errors have
    if status == 401:
        return (
            "does not know who asks (401): write its user's name and password into ~/.mlflow/credentials, or "
            "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, and start "
            "again"
        )
    if status == 403:
        return (
            "does not let this user write (403): ask for the right to edit the experiment, or start again "
            "as another user or with another tracking.experiment"
        )
    while error.__cause__ is not None:  # those around the first only tell what was tried
        error = error.__cause__
    what = "does not answer" if status >= 500 else "refuses what it is sent"
    return f"{what} ({type(error).__name__}: {next(iter(str(error).splitlines()), '')})"
