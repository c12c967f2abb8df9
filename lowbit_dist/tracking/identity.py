"""Which MLflow run is a folder's, a training's or a sweep's: the one that is noted there, or a new one.

.mlflow_run_id      in the folder: the run's number
.mlflow_making      while a run is made: a random number, which is the new run's tag `lowbit.note`, so
                    that a kill or a lost answer before the number is noted leaves no empty twin
lowbit.folder       a tag of the run: the folder.  A folder that was moved continues its run; one that
                    was copied, whose original is still there, gets a run of its own.  On a machine
                    that does not see the original, a copy cannot be told from what was moved.
"""

import contextlib
import logging
import uuid
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from lowbit_dist.files import atomic_write
from lowbit_dist.tracking.stores import Unusable, sqlite_file, without_password

RUN_ID = ".mlflow_run_id"
MAKING = ".mlflow_making"
FOLDER, NOTE = "lowbit.folder", "lowbit.note"
log = logging.getLogger(__name__)


def noted_run_id(folder: Path) -> str | None:
    """The number of the MLflow run, as it is kept in the folder."""
    file = folder / RUN_ID
    return file.read_text().strip() or None if file.exists() else None


def note(folder: Path, run_id: str) -> None:
    """Keep the run's number in the folder, where the next start finds it."""
    with atomic_write(folder / RUN_ID) as draft:
        draft.write_text(run_id)
    (folder / MAKING).unlink(missing_ok=True)


def place_of(folder: Path) -> str:
    return folder.resolve().as_uri()


def living_run(client: Any, run_id: str) -> Any:
    """The run of this number; None if the store has none, or has deleted it."""
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if not is_absent(error):
            raise
        return None
    return run if run.info.lifecycle_stage == "active" else None


def find_or_make(client: Any, uri: str, run_id: str | None, folder: Path, experiment: str, name: str) -> Any:
    """The run with the number `run_id` if it is this folder's, running again; else a new one."""
    from mlflow.utils.mlflow_tags import MLFLOW_RUN_NAME

    run = None if run_id is None else living_run(client, run_id)
    why = f"has no run {run_id}"
    if run is not None and (original := _original(run, folder)) is not None:
        run, why = None, f"has run {run_id} for {original}, of which {folder} is a copy"
    if run is None:
        number = experiment_id(client, experiment, uri)
        key = _making(folder)
        unfinished = client.search_runs([number], f"tags.`{NOTE}` = '{key}'", max_results=1)
        tags = {MLFLOW_RUN_NAME: name, FOLDER: place_of(folder), NOTE: key}
        run = unfinished[0] if unfinished else client.create_run(number, tags=tags)
        if run_id is not None:
            log.warning("MLflow at %s %s; a new one gets every row", without_password(uri), why)
    if run.data.tags.get(FOLDER) != place_of(folder):
        client.set_tag(run.info.run_id, FOLDER, place_of(folder))
    if run.info.status != "RUNNING":
        client.update_run(run.info.run_id, status="RUNNING")
    return run


def _original(run: Any, folder: Path) -> Path | None:
    """The folder of which this one is a copy: it is there, and notes the same run."""
    if (place := run.data.tags.get(FOLDER)) is None:  # made by an older version
        return None
    original = Path(unquote(urlsplit(place).path))
    with contextlib.suppress(OSError):  # a file system that is away
        if noted_run_id(original) == run.info.run_id and not original.samefile(folder):
            return original
    return None


def _making(folder: Path) -> str:
    """The number of the run that is being made, or was when a start was killed."""
    file = folder / MAKING
    with contextlib.suppress(OSError):  # a full disk is reported elsewhere
        if not file.exists():
            with atomic_write(file) as draft:
                draft.write_text(uuid.uuid4().hex)
        return file.read_text()
    return uuid.uuid4().hex


def is_absent(error: Any) -> bool:
    """Whether an MlflowException says that the store has no such thing."""
    return bool(error.error_code == "RESOURCE_DOES_NOT_EXIST")


def experiment_id(client: Any, name: str, uri: str) -> str:
    """The experiment of a name, made if the store has none; Unusable if it was deleted."""
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
    number = experiment.experiment_id
    if experiment.lifecycle_stage != "active":
        raise Unusable(
            f"has deleted the experiment {name}: bring it back with `MLFLOW_TRACKING_URI="
            f"{without_password(uri)} mlflow experiments restore --experiment-id {number}`, or start again "
            "with another tracking.experiment"
        )
    return str(number)
