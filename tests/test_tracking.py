"""Tracking against real MLflow on SQLite, and against a server that is not there."""

import json
import logging

import pytest

from lowbit_dist import tracking
from lowbit_dist.config import ConfigError, RunConfig
from lowbit_dist.methods import METHODS


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """One database: MLflow's migrations of a new one take long."""
    return tmp_path_factory.mktemp("mlflow") / "mlflow.db"


@pytest.fixture
def config(store, tmp_path):
    def make(uri=f"sqlite:///{store}", name="tracked"):
        made = RunConfig.from_dict(
            {
                "run": {"name": name, "dir": str(tmp_path)},
                "method": {"name": "dqt"},
                "data": {"path": "data"},
                "tracking": {"mlflow": uri, "experiment": "tests"},
            },
            METHODS,
        )
        made.run_dir.mkdir(exist_ok=True)
        (made.run_dir / "config.yaml").write_text(made.to_yaml())
        return made

    return make


def client(store):
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{store}")


def steps(store, run_id, key="loss"):
    return sorted(point.step for point in client(store).get_metric_history(run_id, key))


def part(**bytes_of):
    names = ("low_bit_weights", "scales", "other_weights", "gradients", "optimizer_states", "buffers")
    return {
        "components": {name: {"bytes": bytes_of.get(name, 0)} for name in names},
        "workers": 2,
        "parameters": {"total": 100},
    }


SUMMARY = {
    "digest": "abc",
    "memory": part(low_bit_weights=12, optimizer_states=100)
    | {"plan_dense": part(other_weights=200), "plan_bitnet": part(other_weights=300)},
}


def test_a_run_has_its_parameters_metrics_charts_and_status(config, store):
    tracker = tracking.Tracker(config(), step=0, run_id=None)
    for step in (10, 20, 30):
        tracker.log(step, {"loss": 5.0 / step, "tokens": step * 100, "grad_norm": None})
    tracker.flush()
    assert steps(store, tracker.run_id) == [10, 20, 30]
    tracker.finish("FINISHED", SUMMARY)
    run = client(store).get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["method.grid"] == "ternary"
    assert run.data.params["train.batch_tokens"] == "8192"
    assert run.data.metrics["loss"] == 5.0 / 30
    assert "grad_norm" not in run.data.metrics
    assert run.data.tags["digest"] == "abc"
    files = {file.path for file in client(store).list_artifacts(tracker.run_id)}
    assert files == {"config.yaml", "loss.png", "memory.png"}


def test_a_resumed_run_is_the_same_run_and_no_step_stands_twice(config, store):
    first = tracking.Tracker(config(), step=0, run_id=None)
    for step in (10, 20, 30):
        first.log(step, {"loss": 1.0, "tokens": step})
    first.finish("FAILED")
    assert client(store).get_run(first.run_id).info.status == "FAILED"

    # the newest checkpoint is of step 20: step 30 is measured again
    second = tracking.Tracker(config(), step=20, run_id=first.run_id)
    assert client(store).get_run(first.run_id).info.status == "RUNNING"
    for step in (30, 40):
        second.log(step, {"loss": 2.0, "tokens": step})
    second.finish("FINISHED", SUMMARY)
    assert second.run_id == first.run_id
    assert steps(store, first.run_id) == [10, 20, 30, 40]
    rows = [json.loads(line) for line in (config().run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [10, 20, 30, 40]


def test_a_run_killed_before_its_first_checkpoint_keeps_its_mlflow_run(config, store):
    first = tracking.Tracker(config(name="early"), step=0, run_id=None)
    again = tracking.Tracker(config(name="early"), step=0, run_id=None)
    assert again.run_id == first.run_id
    again.finish("FINISHED", SUMMARY)


def test_what_mlflow_never_got_is_sent_when_the_run_is_resumed(config, store):
    first = tracking.Tracker(config(name="late"), step=0, run_id=None)
    first.log(10, {"loss": 1.0, "tokens": 10})
    first.flush()
    with (config(name="late").run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "time": 1.0, "loss": 0.5, "tokens": 20}\n{"step": 30, "ti')  # torn by a kill
    second = tracking.Tracker(config(name="late"), step=20, run_id=first.run_id)
    second.finish("FINISHED", SUMMARY)
    assert steps(store, first.run_id) == [10, 20]


def test_a_server_that_is_down_stops_nothing_and_is_mentioned_once(config, caplog):
    with caplog.at_level(logging.WARNING, logger="lowbit_dist.tracking"):
        tracker = tracking.Tracker(config("http://127.0.0.1:9"), step=0, run_id=None)
        for step in range(1, 4):
            tracker.log(step, {"loss": 1.0, "tokens": step})
        tracker.flush()
        tracker.finish("FINISHED", SUMMARY)
    assert len((config().run_dir / "metrics.jsonl").read_text().splitlines()) == 3
    assert sum("does not answer" in record.message for record in caplog.records) == 1


def test_without_mlflow_the_files_are_written(config):
    tracker = tracking.Tracker(config(None), step=0, run_id=None)
    assert tracker.run_id is None
    tracker.log(1, {"loss": 1.0, "tokens": 1})
    tracker.finish("FINISHED", SUMMARY)
    assert (config(None).run_dir / "loss.png").stat().st_size > 1000
    assert (config(None).run_dir / "memory.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("mlruns", "not a store"),
        ("file:///tmp/mlruns", "not a store"),
        ("sqlite:////nowhere/at/all/mlflow.db", "does not exist"),
        ("http:///path", "names no host"),
        ("ftp://host", "not a store"),
    ],
)
def test_a_store_that_cannot_be_used_is_refused_in_one_line(uri, words, config):
    with pytest.raises(ConfigError, match=words) as caught:
        tracking.check(config(uri))
    assert uri in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_database_is_refused(config, tmp_path):
    (tmp_path / "notes.txt").write_text("these are notes, not a database")
    with pytest.raises(ConfigError, match="is not an SQLite database"):
        tracking.check(config(f"sqlite:///{tmp_path}/notes.txt"))


def test_good_stores_pass_and_relative_files_become_absolute(config, store, monkeypatch, tmp_path):
    for uri in (None, f"sqlite:///{store}", "http://localhost:5000", "postgresql://user@host/db"):
        tracking.check(config(uri))
    monkeypatch.chdir(tmp_path)
    assert tracking.resolve("sqlite:///mlflow.db") == f"sqlite:///{tmp_path}/mlflow.db"
    assert tracking.resolve("http://host") == "http://host"


def test_bytes_per_parameter_count_every_worker():
    bars = tracking.bytes_per_parameter(SUMMARY["memory"])
    assert bars["this run"]["optimizer_states"] == 2.0
    assert bars["this run"]["low_bit_weights"] == 0.24
    assert sum(bars["BitNet STE"].values()) == 6.0
