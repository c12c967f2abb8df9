"""Which MLflow run a folder's rows go to: when runs and experiments are deleted, folders copied or moved,
stores changed, and starts killed.
"""

import http.server
import logging
import os
import shutil
import threading

import pytest
from tracked import SUMMARY, Tracked, client, configuration, steps, wait

from lowbit_dist import tracking
from lowbit_dist.tracking import Parent, identity


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tmp_path_factory.mktemp("mlflow") / "mlflow.db"


@pytest.fixture
def config(store, tmp_path):
    def make(name, folder=tmp_path, uri=f"sqlite:///{store}", **sections):
        return configuration(uri, folder, name, **sections)

    return make


def rows(tracker, numbers, loss=1.0):
    for step in numbers:
        tracker.log(step, {"loss": loss, "tokens": step * 10})


def warnings(caplog):
    return [each.message for each in caplog.records if each.levelno >= logging.WARNING]


def runs_named(store, name, experiment="tests"):
    number = client(store).get_experiment_by_name(experiment).experiment_id
    return client(store).search_runs([number], f"attributes.run_name = '{name}'")


def test_a_run_that_is_deleted_while_it_trains_is_replaced_by_one_with_every_row(config, store, caplog):
    tracker = Tracked(config("deleted"))
    rows(tracker, range(1, 151))
    first = tracker.began()
    wait(lambda: steps(store, first) == list(range(1, 151)))
    client(store).delete_run(first)
    rows(tracker, [151, 152])
    wait(lambda: tracker.run_id != first)
    second = tracker.began()
    rows(tracker, [153])
    tracker.finish("FINISHED", SUMMARY)
    assert steps(store, second) == list(range(1, 154))
    assert (tracker.folder / tracking.RUN_ID).read_text() == second
    assert client(store).get_run(second).info.status == "FINISHED"
    assert steps(store, first) == list(range(1, 151)), "what was deleted stays as it was"
    assert warnings(caplog) == [f"MLflow at sqlite:///{store} has no run {first}; a new one gets every row"]


def test_a_run_that_is_deleted_behind_its_last_row_ends_as_another_with_every_row(config, store):
    tracker = Tracked(config("late"))
    rows(tracker, [1, 2, 3])
    first = tracker.began()
    wait(lambda: steps(store, first) == [1, 2, 3])
    client(store).delete_run(first)
    tracker.finish("FINISHED", SUMMARY)
    run = client(store).get_run(tracker.run_id)
    assert run.info.run_id != first
    assert (run.info.status, run.data.tags["digest"]) == ("FINISHED", "abc")
    assert steps(store, tracker.run_id) == [1, 2, 3]


def test_a_sweeps_run_that_is_deleted_is_replaced_and_a_deleted_child_holds_up_nothing(store, tmp_path):
    parent = Parent(f"sqlite:///{store}", "tests", "sweep", tmp_path)
    wait(lambda: (tmp_path / tracking.RUN_ID).exists())
    first, number = parent.run_id, client(store).get_experiment_by_name("tests").experiment_id
    child, gone = (client(store).create_run(number).info.run_id for _ in range(2))
    client(store).delete_run(gone)
    for run_id in (child, gone):
        parent.adopt(run_id, {})
    wait(lambda: parent.adopted.keys() == {child, gone})
    client(store).delete_run(first)
    assert parent.finish("FINISHED", [], "all of it")
    assert parent.run_id != first
    assert client(store).get_run(parent.run_id).data.tags["mlflow.note.content"] == "all of it"


def test_a_copied_folder_gets_a_run_of_its_own_and_a_moved_one_continues_its_run(
    config, store, tmp_path, caplog
):
    first = Tracked(config("here"))
    rows(first, [1, 2])
    first.finish("FINISHED", SUMMARY)
    shutil.copytree(first.folder, tmp_path / "copies" / "here")
    with pytest.MonkeyPatch.context() as patch:  # the same folder by another name is no copy
        patch.chdir(tmp_path)
        (tmp_path / "link").symlink_to(tmp_path)
        again = Tracked(config("here", tmp_path / "link"), 2)
        again.finish("FINISHED", SUMMARY)
        assert again.run_id == first.run_id
    assert warnings(caplog) == []

    copy = config("here", tmp_path / "copies")
    assert not tracking.tracker.is_complete(copy), "MLflow has none of the copy"
    second = Tracked(copy, 2)
    rows(second, [3])
    second.finish("KILLED")
    assert second.run_id != first.run_id
    assert steps(store, second.run_id) == [1, 2, 3]
    assert steps(store, first.run_id) == [1, 2]
    assert client(store).get_run(first.run_id).info.status == "FINISHED"
    assert warnings(caplog) == [
        f"MLflow at sqlite:///{store} has run {first.run_id} for {tmp_path / 'here'}, of which "
        f"{tmp_path / 'copies' / 'here'} is a copy; a new one gets every row"
    ]

    (tmp_path / "elsewhere").mkdir()
    os.rename(second.folder, tmp_path / "elsewhere" / "here")
    third = Tracked(config("here", tmp_path / "elsewhere"), 3)
    rows(third, [4])
    third.finish("FINISHED", SUMMARY)
    assert third.run_id == second.run_id
    assert steps(store, third.run_id) == [1, 2, 3, 4]
    place = client(store).get_run(third.run_id).data.tags[identity.FOLDER]
    assert place == (tmp_path / "elsewhere" / "here").as_uri()
    assert len(warnings(caplog)) == 1


def test_a_copied_sweep_takes_no_child_from_the_original(store, config, tmp_path):
    child = Tracked(config("child", tmp_path / "sweep"))
    rows(child, [1])
    child.finish("FINISHED", SUMMARY)
    original = Parent(f"sqlite:///{store}", "tests", "sweep", tmp_path / "sweep")
    original.adopt(child.run_id, {})
    assert original.finish("FINISHED", [], "")
    shutil.copytree(tmp_path / "sweep", tmp_path / "copy")
    copy = Parent(f"sqlite:///{store}", "tests", "sweep", tmp_path / "copy")
    copy.adopt(tracking.noted_run_id(tmp_path / "copy" / "child"), {})
    assert copy.finish("FINISHED", [], "")
    assert copy.run_id != original.run_id
    assert client(store).get_run(child.run_id).data.tags["mlflow.parentRunId"] == original.run_id


def test_another_store_gets_all_of_a_finished_run(config, store, tmp_path):
    made = config("stores")
    tracker = Tracked(made)
    rows(tracker, [1, 2, 3])
    tracker.finish("FINISHED", SUMMARY)
    assert tracking.catch_up(made, SUMMARY)
    assert tracking.noted_run_id(made.run_dir) == tracker.run_id, "there was nothing to bring"
    other = shutil.copy(store, tmp_path / "other.db")  # a new one takes long to make
    client(other).delete_run(tracker.run_id)
    moved = config("stores", uri=f"sqlite:///{other}")
    assert tracking.catch_up(moved, SUMMARY)
    assert tracking.noted_run_id(made.run_dir) != tracker.run_id
    assert steps(other, tracking.noted_run_id(made.run_dir)) == [1, 2, 3]


def test_a_deleted_experiment_is_named_once_and_gets_every_row_when_it_is_restored(config, store, caplog):
    tracker = Tracked(config("trash", tracking={"mlflow": f"sqlite:///{store}", "experiment": "trash"}))
    rows(tracker, [1, 2])
    first = tracker.began()
    wait(lambda: steps(store, first) == [1, 2])
    number = client(store).get_run(first).info.experiment_id
    client(store).delete_experiment(number)
    rows(tracker, [3])
    wait(lambda: tracker.failed)
    rows(tracker, [4])
    client(store).restore_experiment(number)
    tracker.finish("FINISHED", SUMMARY)
    assert tracker.run_id == first
    assert steps(store, first) == [1, 2, 3, 4]
    assert warnings(caplog) == [
        f"MLflow at sqlite:///{store} has deleted the experiment trash: bring it back with "
        f"`MLFLOW_TRACKING_URI=sqlite:///{store} mlflow experiments restore --experiment-id {number}`, or "
        "start again with another tracking.experiment; training continues, and its rows wait"
    ]


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (401, "does not know who asks (401): write its user's name and password into ~/.mlflow/credentials"),
        (403, "does not let this user write (403): ask for the right to edit the experiment"),
    ],
)
def test_a_server_that_refuses_a_user_is_named_once_with_what_to_do(code, words, config, caplog):
    class Refusing(http.server.BaseHTTPRequestHandler):
        """As a proxy before a tracking server."""

        def do_GET(self):
            self.send_error(code)

        do_POST = do_GET

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        tracker = Tracked(config(f"code-{code}", uri=f"http://me:xyzzy@127.0.0.1:{server.server_port}"))
        rows(tracker, [1, 2])
        wait(lambda: tracker.failed)
        tracker.finish("FINISHED", SUMMARY)
        server.shutdown()
    assert tracker.run_id is None
    said, last = warnings(caplog)
    assert said.startswith(f"MLflow at http://127.0.0.1:{server.server_port} {words}")
    assert said.endswith("; training continues, and its rows wait")
    assert "when the run is started again, it gets the rest" in last
    assert "xyzzy" not in caplog.text


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("end", [OSError("the answer was lost"), SystemExit()], ids=["lost", "killed"])
def test_a_run_that_was_made_and_not_noted_is_found_again(end, config, store, monkeypatch):
    from mlflow.tracking import MlflowClient

    made, ends = MlflowClient.create_run, iter([end])

    def create_run(self, *arguments, **named):
        run = made(self, *arguments, **named)
        for each in ends:
            raise each
        return run

    monkeypatch.setattr(MlflowClient, "create_run", create_run)
    name = f"made-{type(end).__name__}"
    tracker = Tracked(config(name))
    rows(tracker, [1])
    if isinstance(end, SystemExit):  # of its thread, as a kill
        tracker.tracker.mlflow.thread.join(timeout=60)
        assert not (tracker.folder / tracking.RUN_ID).exists()
        tracker.record.close()
        tracker = Tracked(config(name), 1)
    else:
        tracker.began()
    tracker.finish("FINISHED", SUMMARY)
    (run,) = runs_named(store, name)
    assert run.info.run_id == tracker.run_id
    assert steps(store, tracker.run_id) == [1]
    assert not (tracker.folder / identity.MAKING).exists()


def test_a_changed_log_every_loses_no_step_that_lies_before_mlflows_newest(config, store):
    first = Tracked(config("often"))
    rows(first, range(10, 101, 10))
    first.log(105, {"val_loss": 3.0})
    first.finish("KILLED")
    second = Tracked(config("often"), 50)  # its checkpoint
    for step in range(55, 116, 5):
        second.log(step, {"loss": 2.0, "tokens": step * 10, "val_loss": 4.0})
    second.finish("FINISHED", SUMMARY)
    assert second.run_id == first.run_id
    points = client(store).get_metric_history(first.run_id, "train/loss")
    old, new = set(range(10, 101, 10)), set(range(55, 116, 5)) - set(range(10, 101, 10))
    assert {point.step: point.value for point in points} == dict.fromkeys(old, 1.0) | dict.fromkeys(new, 2.0)
    assert len(points) == len(old | new), "no step stands twice"
    quality = {p.step: p.value for p in client(store).get_metric_history(first.run_id, "val/loss")}
    assert quality == dict.fromkeys(range(55, 116, 5), 4.0) | {105: 3.0}


def test_a_run_of_an_older_version_gets_every_row_under_the_new_names(config, store):
    made = config("older")
    number = client(store).create_experiment("older")
    run_id = client(store).create_run(number).info.run_id
    (made.run_dir / tracking.RUN_ID).write_text(run_id)
    tracker = Tracked(made)
    for step in (1, 2):
        tracker.log(step, {"loss": 1.0, "tokens": step})
        client(store).log_metric(run_id, "loss", 1.0, step=step)
    tracker.finish("FINISHED", SUMMARY)
    assert tracker.run_id == run_id
    assert steps(store, run_id) == steps(store, run_id, "loss") == [1, 2]
