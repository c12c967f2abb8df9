"""The MLflow run of a sweep: the parent of its children's runs, which carries their comparison.

Children know nothing of it: they are ordinary runs, and become its children by tags that are set from outside
once their own runs are there.  So a child that is resumed by hand stays where it is.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lowbit_dist.tracking.feeder import MlflowFeeder
from lowbit_dist.tracking.identity import FOLDER, living_run, note, place_of
from lowbit_dist.tracking.mlflow_run import upload

NOTE_LIMIT = 5000  # characters of a tag, in every version of the server
log = logging.getLogger(__name__)


class Parent(MlflowFeeder):
    """The MLflow run of a sweep, which gets its children and in the end their comparison."""

    meanwhile = "the sweep continues"

    def __init__(self, uri: str, experiment: str, name: str, folder: Path):
        """The run that is noted in `folder`, or a new one."""
        super().__init__(uri, folder, experiment, name)
        self.children: dict[str, Mapping[str, str]] = {}  # run -> its tags
        self.adopted: dict[str, str] = {}  # run -> the parent that it is known to have
        self.ending: tuple[str, Sequence[Path], str] | None = None  # status, files, description
        self.has_ended = False
        self.thread.start()

    def adopt(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Make a run, of the same store, a child; telling it again changes nothing."""
        if self.children.get(run_id) == tags:
            return
        self.children[run_id] = tags

    def finish(self, status: str, files: Sequence[Path], description: str) -> bool:
        """End the run as FINISHED, FAILED or KILLED, with its files; whether MLflow has got all of it.

        Waits for a store that is slow, but not for one that did not answer.
        """
        self.ending = (status, files, description)
        self.close()
        if not self.has_ended:
            log.warning(
                "%s did not get all of the sweep; when it is started again, it gets the rest", self.shown
            )
        return self.has_ended

    def _is_behind(self) -> bool:
        return (
            self.client is None
            or any(self.adopted.get(child) != self.run_id for child in list(self.children))
            or (self.ending is not None and not self.has_ended)
        )

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

    def _start(self, client: Any, run: Any) -> None:
        note(self.folder, run.info.run_id)

    def _tag(self, client: Any, run_id: str, tags: Mapping[str, str]) -> None:
        from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

        assert self.run_id is not None, "a connected parent has its run"
        child, inside = living_run(client, run_id), f"{place_of(self.folder)}/"
        if child is None:  # if it is trained still, it will have another
            log.warning("%s has no run %s, a child of %s", self.shown, run_id, self.name)
        # In a copy of a sweep's folder children note the original's runs, until they have their own.
        elif child.data.tags.get(FOLDER, inside).startswith(inside):
            for key, value in {MLFLOW_PARENT_RUN_ID: self.run_id, **tags}.items():
                client.set_tag(run_id, key, value)
        self.adopted[run_id] = self.run_id
