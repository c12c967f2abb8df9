"""The run in MLflow, fed with its rows as they are appended to its folder."""

import logging
from collections.abc import Callable, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lowbit_dist.config import RunConfig
from lowbit_dist.tracking import content
from lowbit_dist.tracking.feeder import MlflowFeeder
from lowbit_dist.tracking.identity import RUN_ID, note
from lowbit_dist.tracking.machines import Machines
from lowbit_dist.tracking.rows import Rows
from lowbit_dist.tracking.stores import without_password

BATCH = 100  # rows taken at once; also MLflow's limit of parameters in a request
METRIC_LIMIT = 1000  # of one request, MLflow's own
log = logging.getLogger(__name__)


class MlflowRun(MlflowFeeder):
    """One MLflow run, which gets the rows that training writes into the run's folder.

    What it has is asked for whenever the store is reached anew, and compared with the whole file, step by
    step: so a run that was made because another was deleted gets every row, and one that has them gets none
    twice.  A run that goes back to a checkpoint measures some steps again: what MLflow has stays as it is.
    """

    meanwhile = "training continues, and its rows wait"

    def __init__(self, config: RunConfig, say: Callable[[str], None]):
        assert config.tracking.mlflow is not None, "tracking.mlflow is set"
        super().__init__(config.tracking.mlflow, config.run_dir, config.tracking.experiment, config.run.name)
        self.config, self.say = config, say
        self.sent = content.Sent()
        self.rows = Rows(config.run_dir)
        self.machines = Machines(config.run_dir)
        self.noted: str | None = None  # the run's number, as the run's folder has it
        self.note_failed = False
        self.told: str | None = None  # the run of which the user knows
        self.thread.start()

    def finish(self, status: str, files: list[Path], summary: Mapping[str, Any]) -> bool:
        """Send what is left, then end the run as FINISHED, FAILED or KILLED; whether MLflow has all of it."""
        is_complete = self.close()
        if is_complete and self.run_id is None:  # nothing was measured: it is not begun
            return True
        return is_complete and self._attempt(partial(self._end, status, files, summary))

    def _end(self, status: str, files: list[Path], summary: Mapping[str, Any]) -> None:
        """The status before the files, which may be refused."""
        client = self._connected()
        while self.rows.waiting:  # if the run was deleted since the last was sent
            self._catch_up()
        content.conclude(client, self.run_id, summary)
        client.set_terminated(self.run_id, status)
        for file in files:
            upload(client, self.run_id, file)
        content.list_checkpoints(client, self.run_id, self.config)

    def _start(self, client: Any, run: Any) -> None:
        """Learn what the run has, and describe it; all rows of the file are read anew."""
        self._note()
        self.sent = content.Sent(client, run)
        self.rows.read_anew()
        if self.told != self.run_id:
            content.describe(client, run, self.config)
            self.told = self.run_id
            self.say(f"MLflow: {link(self.uri, run.info.experiment_id, run.info.run_id)}")

    def _note(self) -> None:
        if self.run_id is None or self.noted == self.run_id:
            return
        try:
            note(self.folder, self.run_id)
            self.noted = self.run_id
        except OSError as error:
            if not self.note_failed:
                log.warning("%s cannot be written yet (%s)", self.folder / RUN_ID, error.strerror or error)
            self.note_failed = True

    def _is_behind(self) -> bool:
        self.rows.read()
        is_closing, is_connected = self.closing.is_set(), self.client is not None
        if self.rows.waiting:
            return is_connected or is_closing or self.rows.are_new
        return is_connected and not is_closing and self.machines.are_due

    def _catch_up(self) -> None:
        client = self._connected()
        self._note()
        rows = list(islice(self.rows.waiting, BATCH))
        self._log(client, rows)
        for _ in rows:
            self.rows.waiting.popleft()
        if self.machines.are_due:
            points = self.machines.metrics()
            for first in range(0, len(points), METRIC_LIMIT):
                client.log_batch(self.run_id, metrics=points[first : first + METRIC_LIMIT])

    def _log(self, client: Any, rows: list[dict[str, Any]]) -> None:
        # Requests of whole rows: one is taken or refused as a whole, so MLflow never has half a row.
        batch: list[Any] = []
        for row in rows:
            points = self.sent.lacking(row)
            if len(batch) + len(points) > METRIC_LIMIT:
                self._send(client, batch)
                batch = []
            batch += points
        if batch:
            self._send(client, batch)

    def _send(self, client: Any, batch: list[Any]) -> None:
        client.log_batch(self.run_id, metrics=batch)
        self.sent.add(batch)


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
