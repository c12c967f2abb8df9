"""The run in MLflow: made or found again, and fed with its rows as they are appended to its folder."""

import contextlib
import logging
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lowbit_dist.config import RunConfig
from lowbit_dist.files import atomic_write
from lowbit_dist.record import METRICS, Tail
from lowbit_dist.tracking.feeder import Feeder
from lowbit_dist.tracking.stores import without_password

RUN_ID = ".mlflow_run_id"
COMPLETE = ".mlflow_complete"  # in a finished run's folder, once MLflow has all of it
PARAM_LIMIT = 6000  # characters, MLflow's own
BATCH = 100  # rows taken at once; also MLflow's limit of parameters in a request
METRIC_LIMIT = 1000  # of one request, MLflow's own
log = logging.getLogger(__name__)


class MlflowRun(Feeder):
    """One MLflow run, which gets the rows that training writes into the run's folder."""

    meanwhile = "training continues, and rows wait until it does"

    def __init__(self, config: RunConfig, say: Callable[[str], None]):
        assert config.tracking.mlflow is not None, "tracking.mlflow is set"
        super().__init__(config.tracking.mlflow, noted_run_id(config.run_dir))
        self.config, self.say = config, say
        self.last = 0  # the newest step that MLflow has
        self.tail = Tail(config.run_dir / METRICS)
        self.rows: deque[dict[str, Any]] = deque()  # that MLflow may lack, their steps rising
        self._read()
        self.old = {row["time"] for row in self.rows}  # of the rows that were there before this start
        self.noted: str | None = None  # the run's number, as the run's folder has it
        self.note_failed = False
        self.told = False
        with contextlib.suppress(OSError):
            (config.run_dir / COMPLETE).unlink(missing_ok=True)
        self.thread.start()

    def finish(self, status: str, files: list[Path], summary: Mapping[str, Any]) -> None:
        """Send what is left, then end the run as FINISHED, FAILED or KILLED, with its files."""
        is_complete = self.close()
        if is_complete and self.run_id is None:  # nothing was measured: it is not begun
            return
        if is_complete:
            # The status first; a store that does not take one of these is not asked for the others.
            actions = [partial(self._end, status, summary), *(partial(self._upload, file) for file in files)]
            is_complete = all(self._attempt(action) for action in actions)
        if not is_complete:
            log.warning(
                "MLflow at %s did not get all of the run; when the run is started again, it gets the rest "
                "of %s", self.shown, self.config.run_dir / METRICS,
            )  # fmt: skip
        elif status == "FINISHED":
            with contextlib.suppress(OSError):  # a full disk is reported elsewhere
                (self.config.run_dir / COMPLETE).touch()

    def _upload(self, file: Path) -> None:
        upload(self._connected(), self.run_id, file)

    def _end(self, status: str, summary: Mapping[str, Any]) -> None:
        client = self._connected()
        for key in ("digest", "checkpoint"):
            if key in summary:
                client.set_tag(self.run_id, key, summary[key])
        client.set_terminated(self.run_id, status)

    def _start(self, client: Any) -> None:
        """Create the run or resume it, and learn the newest step that it has.

        A run that went back to a checkpoint measures some steps again: what MLflow has stays as it is.
        """
        from mlflow.entities import Param

        run = self._find_or_make_run(client, self.config.tracking.experiment, self.config.run.name)
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
            self.say(f"MLflow: {link(self.uri, run.info.experiment_id, run.info.run_id)}")

    def _note(self) -> None:
        """Keep the run's number in the folder, where the next start finds it."""
        if self.run_id is None or self.noted == self.run_id:
            return
        file = self.config.run_dir / RUN_ID
        try:
            with atomic_write(file) as draft:
                draft.write_text(self.run_id)
            self.noted = self.run_id
        except OSError as error:
            if not self.note_failed:
                log.warning("%s cannot be written yet (%s)", file, error.strerror or error)
            self.note_failed = True

    def _is_behind(self) -> bool:
        # MLflow takes seconds to import: not before the first step, for which all workers wait.
        self._read()
        if not self.rows:
            return False
        return self.client is not None or self.closing.is_set() or self.rows[-1]["time"] not in self.old

    def _read(self) -> None:
        for row in self.tail.rows():
            # A resumed run measures steps again, and the file that its rows were cut from is read anew.
            while self.rows and self.rows[-1]["step"] >= row["step"]:
                self.rows.pop()
            self.rows.append(row)

    def _catch_up(self) -> None:
        client = self._connected()
        self._note()
        rows = list(islice(self.rows, BATCH))
        self._log(client, rows)
        for _ in rows:
            self.rows.popleft()

    def _log(self, client: Any, rows: list[dict[str, Any]]) -> None:
        from mlflow.entities import Metric

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


def noted_run_id(run_dir: Path) -> str | None:
    """The run's number, as `MlflowRun` keeps it in the run's folder."""
    file = run_dir / RUN_ID
    return file.read_text().strip() or None if file.exists() else None
