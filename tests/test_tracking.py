"""Tracking against real MLflow on SQLite, and against a server that is not there, hangs or dies."""

import contextlib
import itertools
import json
import logging
import signal
import socket
import time

import pytest
from mlflow_server import Server
from tracked import SUMMARY, Tracked, client, configuration, part, steps, wait

from lowbit_dist import charts, configfile, record, tracking
from lowbit_dist.config import ConfigError
from lowbit_dist.tracking import feeder, mlflow_run


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """One database: MLflow's migrations of a new one take long."""
    return tmp_path_factory.mktemp("mlflow") / "mlflow.db"


@pytest.fixture
def config(store, tmp_path):
    def make(uri=f"sqlite:///{store}", name="tracked"):
        return configuration(uri, tmp_path, name)

    return make


def test_a_run_has_its_parameters_metrics_charts_and_status(config, store):
    tracker = Tracked(config())
    for step in (10, 20, 30):
        tracker.log(step, {"loss": 5.0 / step, "tokens": step * 100, "grad_norm": None})
    tracker.log(40, {}, {"0.up_proj": {"flip_rate": 0.25}})  # no number, but of a layer
    tracker.finish("FINISHED", SUMMARY)
    assert steps(store, tracker.run_id) == [10, 20, 30]
    run = client(store).get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["method.grid"] == "ternary"
    assert run.data.params["train.batch_tokens"] == "8192"
    assert run.data.metrics["train/loss"] == 5.0 / 30
    assert "train/grad_norm" not in run.data.metrics
    assert run.data.tags["digest"] == "abc"
    files = {file.path for file in client(store).list_artifacts(tracker.run_id)}
    assert files == {"config.yaml", "loss.png", "memory.png", "flips.png", "layers.jsonl"}


def test_a_password_in_a_uri_is_not_in_mlflow(config, store):
    made = config(name="secret")
    made = made.model_copy(update={"data": made.data.model_copy(update={"path": "s3://me:xyzzy@bucket/set"})})
    (made.run_dir / "config.yaml").write_text(made.to_yaml())
    tracker = Tracked(made)
    tracker.log(10, {"loss": 0.5})
    tracker.finish("FINISHED", SUMMARY)
    run = client(store).get_run(tracker.run_id)
    assert run.data.params["data.path"] == "s3://bucket/set"
    from mlflow.artifacts import load_text

    text = load_text(f"{run.info.artifact_uri}/config.yaml")
    assert "s3://bucket/set" in text
    assert "xyzzy" not in text
    assert "xyzzy" not in str(run.to_dictionary())
    assert "xyzzy" in (made.run_dir / "config.yaml").read_text(), "the run itself needs it"


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("https://me:a@b@host:80/x?y=1", "https://host:80/x?y=1"),
        ("postgresql://me:pass@db/mlflow", "postgresql://db/mlflow"),
        ("sqlite:////folder/me@host.db", "sqlite:////folder/me@host.db"),
        ("http://host:5000\nexperiment: me@home", "http://host:5000\nexperiment: me@home"),
        ("none", "none"),
    ],
)
def test_a_uri_is_shown_without_its_password(uri, shown):
    assert tracking.without_password(uri) == shown


def test_an_unusable_store_is_refused_without_its_password(config):
    with pytest.raises(ConfigError) as refused:
        tracking.check(config("oracle://me:xyzzy@db/mlflow"))
    assert "(oracle://db/mlflow)" in str(refused.value)


def test_a_resumed_run_is_the_same_run_and_no_step_stands_twice(config, store):
    first = Tracked(config())
    for step in (10, 20, 30):
        first.log(step, {"loss": 1.0, "tokens": step})
    first.finish("FAILED")
    assert client(store).get_run(first.run_id).info.status == "FAILED"

    # the newest checkpoint is of step 20: step 30 is measured again
    second = Tracked(config(), 20)
    for step in (30, 40):
        second.log(step, {"loss": 2.0, "tokens": step})
    assert second.began() == first.run_id
    assert client(store).get_run(first.run_id).info.status == "RUNNING"
    second.finish("FINISHED", SUMMARY)
    assert second.run_id == first.run_id
    assert steps(store, first.run_id) == [10, 20, 30, 40]
    rows = [json.loads(line) for line in (config().run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [10, 20, 30, 40]


def test_a_run_killed_before_its_first_checkpoint_keeps_its_mlflow_run(config, store):
    first = Tracked(config(name="early"))
    first.log(1, {"loss": 1.0, "tokens": 1})
    known = first.began()
    first.close()
    again = Tracked(config(name="early"))
    again.log(1, {"loss": 1.0, "tokens": 1})
    again.finish("FINISHED", SUMMARY)
    assert again.run_id == known is not None
    assert steps(store, known) == [1]


def test_what_mlflow_never_got_is_sent_when_the_run_is_resumed(config, store):
    first = Tracked(config(name="late"))
    first.log(10, {"loss": 1.0, "tokens": 10})
    first.close()
    with (config(name="late").run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "time": 1.0, "loss": 0.5, "tokens": 20}\n{"step": 30, "ti')  # torn by a kill
    second = Tracked(config(name="late"), 20)
    second.finish("FINISHED", SUMMARY)
    assert steps(store, first.run_id) == [10, 20]


def test_a_server_that_is_down_stops_nothing_and_is_mentioned_once(config, caplog):
    with caplog.at_level(logging.WARNING, logger="lowbit_dist.tracking"):
        tracker = Tracked(config("http://127.0.0.1:9"))
        for step in range(1, 4):
            tracker.log(step, {"loss": 1.0, "tokens": step})
        tracker.finish("FINISHED", SUMMARY)
    assert len((config().run_dir / "metrics.jsonl").read_text().splitlines()) == 3
    assert sum("does not answer" in record.message for record in caplog.records) == 1


def test_without_mlflow_the_files_are_written(config):
    tracker = Tracked(config(None))
    assert tracker.run_id is None
    tracker.log(1, {"loss": 1.0, "tokens": 1})
    tracker.finish("FINISHED", SUMMARY)
    assert tracker.run_id is None
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
    for uri in (None, f"sqlite:///{store}", "http://localhost:5000", "databricks"):
        tracking.check(config(uri))
    monkeypatch.chdir(tmp_path)
    assert tracking.resolve("sqlite:///mlflow.db") == f"sqlite:///{tmp_path}/mlflow.db"
    assert tracking.resolve("http://host") == "http://host"


def test_bytes_per_parameter_count_every_worker():
    bars = charts.bytes_per_parameter(SUMMARY["memory"])
    assert bars["this run"]["optimizer_states"] == 2.0
    assert bars["this run"]["low_bit_weights"] == 0.24
    assert sum(bars["BitNet"].values()) == 6.0


def test_every_bar_is_named_with_its_states_and_an_equal_one_is_not_drawn_twice():
    def named(own):
        reports = {"plan_dense_same_states": own, "plan_bitnet": own, "plan_dense": "fp32"}
        return [
            *charts.bytes_per_parameter(
                part()
                | {"states": own}
                | {name: part() | {"states": states} for name, states in reports.items()}
            )
        ]

    assert named("int8") == [
        "this run, 8-bit states",
        "dense, 8-bit states",
        "BitNet, 8-bit states",
        "dense, fp32 states",
    ]
    assert named("fp32") == ["this run, fp32 states", "dense, fp32 states", "BitNet, fp32 states"]
    # Of Lion with states in fp32 the dense baseline is smaller than AdamW's; it is the one that is like.
    lion, adamw = ({"states": "fp32"} | part(optimizer_states=n) for n in (400, 800))
    bars = charts.bytes_per_parameter(lion | {"plan_dense_same_states": lion, "plan_dense": adamw})
    assert bars["dense, fp32 states"]["optimizer_states"] == 8.0


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("http://[x", r"is not a URI \(Invalid IPv6 URL\)"),
        ("http://host:99999", r"is not a URI \(Port out of range 0-65535\)"),
        ("sqlite:////tmp", "/tmp is a folder"),
        ("sqlite:///" + "a" * 300, "cannot be used: File name too long"),
        ("sqlite:///", "names no file"),
        ("sqlite://", "names no file"),
        ("sqlite:///:memory:", "names no file"),
        ("sqlite+pysqlite:///x", "names no file"),
        ("sqlite+nothing:///x", "not a store"),
        ("ftp+http://host", "not a store"),
        ("mssql+pymssql://host/db", "needs the Python package pymssql, which is not installed"),
        ("mysql+a.b://host/db", "not a store"),
    ],
)
def test_a_uri_of_odd_form_is_refused_without_a_traceback(uri, words, config):
    with pytest.raises(ConfigError, match=words) as caught:
        tracking.check(config(uri))
    assert "\n" not in str(caught.value)


def test_a_query_of_a_store_is_kept_and_is_no_part_of_the_file(monkeypatch, tmp_path, config):
    monkeypatch.chdir(tmp_path)
    assert tracking.resolve("sqlite:///a.db?timeout=5") == f"sqlite:///{tmp_path}/a.db?timeout=5"
    (tmp_path / "a.db").write_text("this is no database at all")
    with pytest.raises(ConfigError, match="is not an SQLite database"):
        tracking.check(config("sqlite:///a.db?timeout=5"))


def test_torn_repeated_and_foreign_lines_are_no_rows(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(
        b'{"step": 1, "loss": 3}\n[1]\n7\n{"loss": 1}\n\x00\x00\n\xff\n{"step": 2, "loss": 2}\n'
        b'{"step": 2, "loss": 9}\n{"step": 1, "loss": 9}\n{"step": 3, "loss": 1}\n{"step": 4, "lo'
    )
    rows = [{"step": 1, "loss": 3}, {"step": 2, "loss": 2}]
    record.cut(file, 2)
    assert record.rows_of(file) == rows
    assert [json.loads(line) for line in file.read_text().splitlines()] == rows


def test_a_store_that_was_down_at_the_start_gets_every_row_when_it_is_back(config, store, monkeypatch):
    """The database stands behind a folder that appears later, as a file system that was not mounted."""
    late = store.parent / "late"
    tracker = Tracked(config(f"sqlite:///{late}/mlflow.db", name="down"))
    for step in (1, 2, 3):
        tracker.log(step, {"loss": 1.0, "tokens": step})
    wait(lambda: tracker.failed)
    assert tracker.run_id is None
    late.symlink_to(store.parent)
    tracker.log(4, {"loss": 1.0, "tokens": 4})
    deadline = time.monotonic() + 20
    while not (tracker.run_id and steps(store, tracker.run_id) == [1, 2, 3, 4]):
        assert time.monotonic() < deadline, "the rows never arrived"
        time.sleep(0.1)
    tracker.finish("FINISHED", SUMMARY)
    assert client(store).get_run(tracker.run_id).info.status == "FINISHED"
    again = Tracked(config(name="down"), 4)
    again.finish("FINISHED", SUMMARY)
    assert again.run_id == tracker.run_id, "the run's number was kept when it became known"


def test_a_run_that_ended_while_its_store_was_down_brings_it_the_rest_when_it_is_started_again(config, store):
    away = store.parent / "away"
    made = config(f"sqlite:///{away}/mlflow.db", name="ended")
    tracker = Tracked(made)
    for step in (1, 2, 3):
        tracker.log(step, {"loss": 1.0, "tokens": step})
    tracker.finish("FINISHED", SUMMARY)
    summary = {**SUMMARY, "steps": 3}
    assert not tracking.catch_up(made, summary)

    away.symlink_to(store.parent)
    assert tracking.catch_up(made, summary)
    run = client(store).get_run(tracking.noted_run_id(made.run_dir))
    assert steps(store, run.info.run_id) == [1, 2, 3]
    assert (run.info.status, run.data.tags["digest"]) == ("FINISHED", "abc")
    away.unlink()
    assert tracking.catch_up(made, summary), "there is nothing left to bring"

    Tracked(made, 3).close()  # the run is resumed, with more steps
    assert not tracking.catch_up(made, summary)


def test_a_resumed_run_whose_store_does_not_answer_at_first_logs_no_step_twice(config, store, monkeypatch):
    first = Tracked(config(name="flaky"))
    for step in (10, 20, 30):
        first.log(step, {"loss": 1.0, "tokens": step})
    first.finish("KILLED")
    started = mlflow_run.MlflowRun._start
    failures = iter([OSError("the store is away")])

    def start(self, client, run):
        for failure in failures:
            raise failure
        started(self, client, run)

    monkeypatch.setattr(mlflow_run.MlflowRun, "_start", start)
    second = Tracked(config(name="flaky"), 20)
    for step in (30, 40):
        second.log(step, {"loss": 2.0, "tokens": step})
    deadline = time.monotonic() + 20
    while steps(store, first.run_id) != [10, 20, 30, 40]:
        assert time.monotonic() < deadline, steps(store, first.run_id)
        time.sleep(0.1)
    second.finish("FINISHED", SUMMARY)
    assert steps(store, first.run_id) == [10, 20, 30, 40]


def test_a_request_that_fails_in_the_middle_is_repeated_without_doubles(config, store, monkeypatch):
    tracker = Tracked(config(name="broken"))
    from mlflow.tracking import MlflowClient

    sent = MlflowClient.log_batch
    failures = iter([OSError("the answer was lost")])

    def log_batch(self, *arguments, **named):
        sent(self, *arguments, **named)  # the store took it, but nobody hears of it
        for failure in failures:
            raise failure

    monkeypatch.setattr(MlflowClient, "log_batch", log_batch)
    for step in (1, 2, 3):
        tracker.log(step, {"loss": 1.0 / step, "tokens": step})
    deadline = time.monotonic() + 20
    while steps(store, tracker.began()) != [1, 2, 3]:
        assert time.monotonic() < deadline, steps(store, tracker.run_id)
        time.sleep(0.1)
    tracker.finish("FINISHED", SUMMARY)
    assert steps(store, tracker.run_id, "train/tokens") == [1, 2, 3]


def test_rows_that_are_cut_and_measured_again_before_they_were_sent_are_sent_once(config, store):
    away = store.parent / "cut"
    tracker = Tracked(config(f"sqlite:///{away}/mlflow.db", name="cut"))
    for step in (1, 2, 3, 4):
        tracker.log(step, {"loss": 1.0, "tokens": step})
    wait(lambda: tracker.failed)
    tracker.rewind(2)
    for step in (3, 4, 5):
        tracker.log(step, {"loss": 2.0, "tokens": step})
    away.symlink_to(store.parent)
    tracker.finish("FINISHED", SUMMARY)
    points = client(store).get_metric_history(tracker.run_id, "train/loss")
    assert [(point.step, point.value) for point in points] == [(1, 1), (2, 1), (3, 2), (4, 2), (5, 2)]


def test_many_rows_are_sent_in_requests_of_the_size_that_mlflow_takes(config, store):
    tracker = Tracked(config(name="many"))
    names = [f"train/part{i}" for i in range(300)]
    for step in range(1, 13):
        tracker.log(step, {"loss": 1.0} | dict.fromkeys(names, float(step)))
    tracker.finish("FINISHED", SUMMARY)
    assert steps(store, tracker.run_id) == list(range(1, 13))
    assert client(store).get_run(tracker.run_id).data.metrics["train/part299"] == 12.0


def test_a_run_that_its_store_has_lost_is_made_anew_with_all_its_rows(config, store, caplog):
    first = Tracked(config(name="lost"))
    for step in (1, 2):
        first.log(step, {"loss": 1.0, "tokens": step})
    first.finish("FINISHED", SUMMARY)
    client(store).delete_run(first.run_id)
    with caplog.at_level(logging.WARNING, logger="lowbit_dist.tracking"):
        second = Tracked(config(name="lost"), 2)
        second.finish("FINISHED", SUMMARY)
    assert second.run_id != first.run_id
    assert steps(store, second.run_id) == [1, 2]
    assert [record.message for record in caplog.records] == [
        f"MLflow at sqlite:///{store} has no run {first.run_id}; a new one gets every row"
    ]
    (config(name="lost").run_dir / tracking.RUN_ID).write_text("f" * 32)
    third = Tracked(config(name="lost"), 2)
    third.finish("FINISHED", SUMMARY)
    assert third.run_id not in (first.run_id, second.run_id, "f" * 32, None)
    assert steps(store, third.run_id) == [1, 2]


def test_a_restart_with_other_workers_resumes_the_same_run(config, store):
    first = Tracked(config(name="wider"))
    first.log(1, {"loss": 1.0, "tokens": 1})
    first.finish("KILLED")
    assert client(store).get_run(first.run_id).info.status == "KILLED"
    wider = configfile.from_dict(config(name="wider").to_dict() | {"cluster": {"workers": 1}})
    second = Tracked(wider)
    second.log(2, {"loss": 1.0, "tokens": 1})
    second.finish("FINISHED", SUMMARY)
    run = client(store).get_run(first.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["cluster.workers"] == "2"
    assert steps(store, first.run_id) == [1, 2]


def test_a_run_that_measured_nothing_is_not_begun_in_mlflow(config, store):
    nothing = Tracked(config(name="nothing"))
    nothing.finish("FAILED")
    assert nothing.run_id is None


def test_runs_that_start_at_once_share_a_new_experiment(config, store):
    def make(number):
        data = config(name=f"at-once-{number}").to_dict()
        data["tracking"]["experiment"] = "new experiment"
        return configfile.from_dict(data)

    from concurrent.futures import ThreadPoolExecutor

    configs = [make(number) for number in range(4)]
    with ThreadPoolExecutor(4) as pool:
        trackers = list(pool.map(Tracked, configs))
        list(pool.map(lambda tracker: tracker.log(1, {"loss": 1.0}), trackers))
        run_ids = list(pool.map(Tracked.began, trackers))
    experiments = {client(store).get_run(run_id).info.experiment_id for run_id in run_ids}
    assert len(experiments) == 1
    for each in trackers:
        each.finish("FINISHED", SUMMARY)


def test_bars_in_a_terminal_are_as_long_as_their_numbers():
    bars = {"this run": {"low_bit_weights": 0.3, "optimizer_states": 0.7}, "dense": {"other_weights": 4.0}}
    assert charts.memory_bars_text(bars, width=40).splitlines() == [
        "this run  ███░░░░░░░ 1.00",
        "dense     " + "▓" * 40 + " 4.00",
        "          bytes per parameter: █ low-bit weights (codes)",
        "          ▓ other weights   ░ optimizer states",
    ]


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A tracking server; `server.start()` also after it was killed."""
    for name, value in (("MAX_RETRIES", "0"), ("TIMEOUT", "6")):
        monkeypatch.setenv(f"MLFLOW_HTTP_REQUEST_{name}", value)
    made = Server(tmp_path)
    made.start()
    yield made
    made.signal(signal.SIGKILL)


def arrive(server, run_id, expected):
    from mlflow.exceptions import MlflowException

    deadline, steps_there = time.monotonic() + 120, None
    while steps_there != expected:
        with contextlib.suppress(MlflowException):  # a slow machine, and a short patience
            steps_there = server.steps(run_id)
        assert time.monotonic() < deadline, steps_there
        time.sleep(0.2)


@pytest.mark.timeout(900)
def test_a_server_that_hangs_or_dies_in_mid_run_gets_every_row_once_when_it_is_back(
    config, server, monkeypatch
):
    tracker = Tracked(config(server.uri, name="outage"))
    for step in (1, 2):
        tracker.log(step, {"loss": 1.0, "tokens": step})
    arrive(server, tracker.began(), [1, 2])

    server.signal(signal.SIGSTOP)  # it takes connections, and never answers
    for step in (3, 4):
        tracker.log(step, {"loss": 1.0, "tokens": step})
    wait(lambda: tracker.failed)
    tracker.log(5, {"loss": 1.0, "tokens": 5})
    server.signal(signal.SIGCONT)
    arrive(server, tracker.run_id, [1, 2, 3, 4, 5])

    server.signal(signal.SIGKILL)
    for step in (6, 7):
        tracker.log(step, {"loss": 1.0, "tokens": step})
    wait(lambda: tracker.failed)
    server.start()
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")  # the end makes one attempt, and has time
    tracker.log(8, {"loss": 1.0, "tokens": 8})
    tracker.finish("FINISHED", SUMMARY)
    arrive(server, tracker.run_id, list(range(1, 9)))


def test_a_server_that_takes_connections_and_never_answers_delays_neither_rows_nor_the_end(
    config, monkeypatch
):
    monkeypatch.setattr(feeder, "FLUSH_SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        begun = time.monotonic()
        tracker = Tracked(config(f"http://127.0.0.1:{silent.getsockname()[1]}", name="silent"))
        tracker.log(1, {"loss": 1.0, "tokens": 1})
        assert time.monotonic() - begun < 1
        tracker.finish("FINISHED", SUMMARY)
        assert time.monotonic() - begun < 10, "MLflow's own patience is 20 s, twice"
    assert tracker.run_id is None
    assert [row["step"] for row in record.rows_of(tracker.file)] == [1]


@pytest.mark.parametrize("later", [1000.25, 1000.125, 1000.5])  # as long, longer, shorter in the file
def test_a_tail_sees_each_row_that_is_appended_and_what_replaces_a_file(later, tmp_path, monkeypatch):
    clock = itertools.chain([1000.25] * 3, itertools.repeat(later))
    monkeypatch.setattr(record.time, "time", lambda: next(clock))
    file = tmp_path / "metrics.jsonl"
    begun, late = record.Tail(file), None
    assert begun.rows() == []
    pen = record.Record(tmp_path, step=0, writes=True)
    for step in (1, 2, 3):
        pen.log(step, {"loss": 1.0}, {})
    late = record.Tail(file, from_end=True)
    assert [row["step"] for row in begun.rows()] == [1, 2, 3]
    with file.open("a") as torn:
        torn.write('{"step": 4, "lo')
    assert begun.rows() == late.rows() == []
    again = record.Record(tmp_path, step=2, writes=True)
    again.log(3, {"loss": 2.0}, {})
    again.log(4, {"loss": 2.0}, {})
    assert [(row["step"], row["loss"]) for row in begun.rows()] == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0)]
    again_seen = [3] if later == 1000.125 else []  # the longer row reaches behind what was read
    assert [row["step"] for row in late.rows()] == [*again_seen, 4]


def test_the_other_workers_write_nothing(tmp_path):
    pen = record.Record(tmp_path, step=0, writes=False)
    pen.log(1, {"loss": 1.0}, {"0": {"flip_rate": 0.5}})
    pen.close()
    assert list(tmp_path.iterdir()) == []
