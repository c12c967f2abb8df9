"""The MLflow run of a sweep: the parent of its children's runs, which carries their comparison.

Children know nothing of it: they are ordinary runs, and become its children by tags that are set from outside
once their own runs are there.  So a child that is gone on with by hand stays where it is.
"""

import logging
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lowbit_dist.files import whole
from lowbit_dist.tracking.mlflow_run import (
    FLUSH_SECONDS,
    RUN_ID,
    existing_run,
    experiment_id,
    innermost,
    is_absent,
    noted_run_id,
    prepare_store,
    settle_mlflow,
    upload,
)
from lowbit_dist.tracking.stores import alone, resolve, without_password

NOTE_LIMIT = 5000  # characters of a tag, in every version of the server
log = logging.getLogger(__name__)


class Parent:
    """What MLflow is to have of a sweep, brought there by a thread that tries until the store answers."""

    def __init__(self, uri: str, experiment: str, name: str, folder: Path):
        """The run that is noted in `folder`, or a new one."""
        settle_mlflow()
        self.uri, self.experiment, self.name, self.folder = resolve(uri), experiment, name, folder
        self.shown = without_password(self.uri)
        self.run_id = noted_run_id(folder)
        self.client: Any = None  # an MlflowClient while the store answers
        self.children: dict[str, Mapping[str, str]] = {}  # run -> its tags
        self.adopted: dict[str, str] = {}  # run -> the parent that it is known to have
        self.ending: tuple[str, Sequence[Path], str] | None = None  # status, files, description
        self.has_ended = False
        self.changed = threading.Condition()
        self.closing = False
        self.failed = False  # the last attempt
        self.thread = threading.Thread(target=self._serve, name="mlflow", daemon=True)
        self.thread.start()

    def adopt(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Make a run, of the same store, a child; telling it again changes nothing."""
        if self.children.get(run_id) == tags:
            return
        with self.changed:
            self.children[run_id] = tags
            self.changed.notify_all()

    def finish(self, status: str, files: Sequence[Path], description: str) -> bool:
        """End the run as FINISHED, FAILED or KILLED, with its files; whether MLflow has got all of it.

        Waits for a store that is slow, but not for one that did not answer.
        """
        with self.changed:
            self.ending = (status, files, description)
            self.changed.notify_all()
            self.changed.wait_for(lambda: not self._is_behind() or self.failed, timeout=FLUSH_SECONDS)
            self.closing = True
            self.changed.notify_all()
        self.thread.join(timeout=FLUSH_SECONDS)
        if not self.has_ended:
            log.warning(
                "MLflow at %s did not get all of the sweep; when it is started again, it gets the rest",
                self.shown,
            )
        return self.has_ended

    def _is_behind(self) -> bool:
        return (
            self.client is None
            or any(self.adopted.get(each) != self.run_id for each in self.children)
            or (self.ending is not None and not self.has_ended)
        )

    def _serve(self) -> None:
        pause = 1.0
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self._is_behind() or self.closing)
                if not self._is_behind():
                    return
                is_last = self.closing  # an attempt that begins now is the last one if it fails
            done = self._attempt()
            with self.changed:
                self.changed.notify_all()
                if not done:
                    if is_last:
                        return
                    self.changed.wait_for(lambda: self.closing, timeout=pause)
            pause = 1.0 if done else min(2 * pause, 30.0)

    def _attempt(self) -> bool:
        try:
            self._catch_up()
        except Exception as error:  # whatever happens to MLflow, the sweep goes on
            self.client = None
            if not self.failed:
                log.warning(
                    "MLflow at %s does not answer (%s: %s); the sweep goes on", self.shown, *innermost(error)
                )
            self.failed = True
            return False
        self.failed = False
        return True

    def _catch_up(self) -> None:
        client = self._connected()
        for run_id, tags in list(self.children.items()):
            if self.adopted.get(run_id) != self.run_id:
                self._tag(client, run_id, tags)
        if self.ending is None or self.has_ended:
            return
        status, files, description = self.ending
        for file in files:
            upload(client, self.run_id, file)
        client.set_tag(self.run_id, "mlflow.note.content", description[:NOTE_LIMIT])
        client.set_terminated(self.run_id, status)
        self.has_ended = True

    def _connected(self) -> Any:
        """A client whose run is there and running; after an error, found or made again."""
        if self.client is None:
            from mlflow.tracking import MlflowClient
            from mlflow.utils.mlflow_tags import MLFLOW_RUN_NAME

            with alone(self.uri):
                prepare_store(self.uri)
                client = MlflowClient(tracking_uri=self.uri)
                run = existing_run(client, self.run_id, self.shown)
                if run is None:
                    experiment = experiment_id(client, self.experiment, self.uri)
                    run = client.create_run(experiment, tags={MLFLOW_RUN_NAME: self.name})
                elif run.info.status != "RUNNING":
                    client.update_run(run.info.run_id, status="RUNNING")
            self.run_id = run.info.run_id
            with whole(self.folder / RUN_ID) as draft:
                draft.write_text(run.info.run_id)
            self.client = client
        return self.client

    def _tag(self, client: Any, run_id: str, tags: Mapping[str, str]) -> None:
        from mlflow.exceptions import MlflowException
        from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

        assert self.run_id is not None, "a connected parent has its run"
        try:
            for key, value in {MLFLOW_PARENT_RUN_ID: self.run_id, **tags}.items():
                client.set_tag(run_id, key, value)
        except MlflowException as error:
            if not is_absent(error):
                raise
            log.warning("MLflow at %s has no run %s, a child of %s", self.shown, run_id, self.name)
        self.adopted[run_id] = self.run_id
