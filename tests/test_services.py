"""W&B and TensorBoard through their own packages, and MLflow's system metrics of each host."""

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ranks import search_path
from tracked import SUMMARY, Tracked, client, configuration, wait

from lowbit_dist import heartbeat, tracking
from lowbit_dist.config import ConfigError
from lowbit_dist.tracking import feeder, machines, wandb_run
from lowbit_dist.tracking.event_file import EVENTS, EventFile

ROW = {"loss": 2.0, "lr": 0.5, "tokens_per_second": 10.0, "flip_rate": 0.25}
NAMES = {"train/loss": 2.0, "train/lr": 0.5, "speed/tokens_per_second": 10.0, "codes/flip_rate": 0.25}


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """W&B without a network, an account or settings of this machine's user."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    alone(monkeypatch, tmp_path)


def alone(monkeypatch, tmp_path):
    import wandb

    for name in ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    wandb.teardown()  # its settings are read once


def made(service, folder, name="run"):
    return configuration(None, folder, name, tracking={"mlflow": None, **service})


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


WANDB, TENSORBOARD = {"wandb": "team/project"}, {"tensorboard": True}


def logged(config, start=0, steps=(), end="FINISHED", **numbers):
    """One start of a run, after step `start`."""
    tracked = Tracked(config, start)
    for step in steps:
        tracked.log(step, ROW | numbers)
    tracked.finish(end, SUMMARY)


# --- TensorBoard -------------------------------------------------------------------------------------------


def scalars(config):
    """Name -> [(step, value)], as TensorBoard shows them."""
    module = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    read = module.EventAccumulator(str(config.run_dir), size_guidance={module.SCALARS: 0}).Reload()
    return {
        name: [(point.step, point.value) for point in read.Scalars(name)] for name in read.Tags()["scalars"]
    }


def test_tensorboard_shows_each_row_under_mlflows_names(tmp_path):
    pytest.importorskip("tensorboard")
    config = made(TENSORBOARD, tmp_path)
    logged(config, steps=(10, 20, 30))
    assert scalars(config) == {name: [(step, x) for step in (10, 20, 30)] for name, x in NAMES.items()}
    written = (config.run_dir / EVENTS).read_bytes()
    logged(config, 30)
    assert (config.run_dir / EVENTS).read_bytes() == written, "there was nothing to bring"


def test_a_torn_event_is_none_and_what_lacks_is_written_when_the_run_is_started_again(tmp_path):
    pytest.importorskip("tensorboard")
    config = made(TENSORBOARD, tmp_path)
    logged(config, steps=(1, 2, 3), end="FAILED")
    file = config.run_dir / EVENTS
    file.write_bytes(file.read_bytes()[:-10])  # as a kill or a full disk leaves it
    logged(config, 2, (3, 4), loss=1.0)
    assert scalars(config)["train/loss"] == [(1, 2.0), (2, 2.0), (3, 1.0), (4, 1.0)]


def test_a_run_that_goes_back_keeps_what_it_showed(tmp_path):
    pytest.importorskip("tensorboard")
    config = made(TENSORBOARD, tmp_path)
    tracked = Tracked(config)
    for step in (1, 2, 3):
        tracked.log(step, ROW)
    wait(lambda: tracked.tracker.others[0].newest == 3)
    tracked.rewind(1)
    for step in (2, 3, 4):
        tracked.log(step, ROW | {"loss": 1.0})
    tracked.finish("FINISHED", SUMMARY)
    assert scalars(config)["train/loss"] == [(1, 2.0), (2, 2.0), (3, 2.0), (4, 1.0)]


def test_a_finished_run_gets_event_files_when_it_is_asked_for_them(tmp_path):
    pytest.importorskip("tensorboard")
    logged(made({}, tmp_path), steps=(1, 2))
    config = made(TENSORBOARD, tmp_path)
    assert tracking.catch_up(config, SUMMARY)
    assert [step for step, _ in scalars(config)["train/lr"]] == [1, 2]


def test_events_that_find_no_room_wait_and_stop_nothing(tmp_path, monkeypatch, caplog):
    pytest.importorskip("tensorboard")
    config = made(TENSORBOARD, tmp_path)
    log, is_full = EventFile._log, iter([True])

    def full(self, rows):
        log(self, rows)
        if next(is_full, False):
            os.truncate(config.run_dir / EVENTS, 100)
            raise OSError("No space left on device")

    monkeypatch.setattr(EventFile, "_log", full)
    tracked = Tracked(config)
    for step in (1, 2, 3):
        tracked.log(step, ROW)
    wait(lambda: warnings(caplog))  # of the end's own attempts one that fails is the last
    tracked.finish("FINISHED", SUMMARY)
    assert [step for step, _ in scalars(config)["train/loss"]] == [1, 2, 3]
    (warned,) = warnings(caplog)
    assert warned.startswith("TensorBoard does not answer (OSError: No space left on device); training ")


# --- W&B ---------------------------------------------------------------------------------------------------


def records(config):
    """Of each start that logged rows, the oldest first: what its file has, once W&B's own process has written
    the end of the newest.
    """
    deadline = time.monotonic() + 60
    while not (starts := written(config)) or "exit" not in starts[-1]:
        assert time.monotonic() < deadline, starts
        time.sleep(0.1)
    return starts


def written(config):
    from wandb.proto.wandb_internal_pb2 import Record

    starts = []
    files = config.run_dir.glob("wandb/offline-run-*/run-*.wandb")
    for file in sorted(files, key=lambda file: file.stat().st_mtime):
        of_file = {"history": [], "summary": {}}
        for data in chunks(file.read_bytes()):
            record = Record.FromString(data)
            kind = record.WhichOneof("record_type")
            if kind == "run":
                of_file["run"] = record.run
            elif kind == "exit":
                of_file["exit"] = record.exit.exit_code
            elif kind == "history":
                of_file["history"].append(items(record.history.item))
            elif kind == "summary":
                of_file["summary"] |= items(record.summary.update)
        starts.append(of_file)
    return starts


def chunks(content):
    """The records of a log as LevelDB has it: blocks of 32 KiB, a record in one part or several."""
    position, record = 7, b""  # behind the file's own head
    while position + 7 <= len(content):
        if (left := 32768 - position % 32768) < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        record += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def items(pairs):
    return {pair.key or "/".join(pair.nested_key): json.loads(pair.value_json) for pair in pairs}


def steps_of(start):
    return [row["_step"] for row in start["history"]]


def test_wandb_has_each_row_under_mlflows_names_the_configuration_and_the_end(offline, tmp_path):
    config = made(WANDB, tmp_path)
    logged(config, steps=(10, 20, 30))
    (start,) = records(config)
    assert steps_of(start) == [10, 20, 30]
    assert {key: x for key, x in start["history"][0].items() if not key.startswith("_")} == NAMES
    run = start["run"]
    assert (run.entity, run.project, run.display_name) == ("team", "project", "run")
    settings = items(run.config.update)
    assert settings["train.batch_tokens"] == 8192
    assert settings["method.name"] == "dqt"
    assert start["exit"] == 0
    assert start["summary"]["digest"] == "abc"
    assert start["summary"]["memory/plan_dense/other_weights"] == 200


@pytest.mark.parametrize(("status", "code"), [("FAILED", 1), ("KILLED", 255)])
def test_a_run_that_fails_or_is_stopped_is_no_success_in_wandb(offline, tmp_path, status, code):
    config = made(WANDB, tmp_path)
    logged(config, steps=(1,), end=status)
    assert records(config)[0]["exit"] == code


def test_a_resumed_run_is_the_same_in_wandb_and_its_newest_folder_has_each_step_once(offline, tmp_path):
    config = made(WANDB, tmp_path)
    logged(config, steps=(1, 2, 3), end="KILLED")
    logged(config, 2, (3, 4, 5))
    first, second = records(config)
    assert first["run"].run_id == second["run"].run_id
    assert steps_of(second) == [1, 2, 3, 4, 5]


def test_a_copied_folder_gets_a_wandb_run_of_its_own_and_a_moved_one_continues_its_run(offline, tmp_path):
    config = made(WANDB, tmp_path)
    logged(config, steps=(1, 2))
    shutil.copytree(config.run_dir, tmp_path / "copies" / "run")
    copy = made(WANDB, tmp_path / "copies")
    logged(copy, 2, (3,))
    config.run_dir.rename(tmp_path / "moved")
    moved = made(WANDB, tmp_path, "moved")
    logged(moved, 2, (3,))
    of_copy, of_moved = records(copy)[-1]["run"].run_id, records(moved)[-1]["run"].run_id
    assert of_copy != of_moved == records(moved)[0]["run"].run_id


def test_no_password_reaches_wandb(offline, tmp_path, monkeypatch):
    config = configuration(None, tmp_path, "run", data={"path": "s3://me:xyzzy@bucket/set"}, tracking=WANDB)
    monkeypatch.setattr(sys, "argv", ["lowbit", "train", "data.path=s3://me:xyzzy@bucket/set"])
    logged(config, steps=(1,))
    assert items(records(config)[0]["run"].config.update)["data.path"] == "s3://bucket/set"
    for file in config.run_dir.glob("wandb/**/*"):
        assert file.is_dir() or b"xyzzy" not in file.read_bytes(), file


def test_without_a_key_wandb_is_refused_before_the_start_and_never_asks(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    alone(monkeypatch, tmp_path)
    with pytest.raises(ConfigError) as refused:
        tracking.check(made(WANDB, tmp_path))
    assert str(refused.value) == (
        "tracking.wandb (team/project) needs a key: run `wandb login` once, or set WANDB_API_KEY, or "
        "WANDB_MODE=offline"
    )
    monkeypatch.setenv("WANDB_BASE_URL", "https://api.wandb.ai")
    (tmp_path / "netrc").write_text(f"machine api.wandb.ai login user password {'a' * 40}\n")
    wandb.teardown()
    tracking.check(made(WANDB, tmp_path))


@pytest.mark.parametrize("project", ["a/b/c", "100%", "what?", "x" * 129])
def test_what_is_no_project_is_refused(offline, project, tmp_path):
    with pytest.raises(ConfigError, match=r"must be PROJECT or ENTITY/PROJECT"):
        tracking.check(made({"wandb": project}, tmp_path))


def test_a_wandb_server_that_does_not_answer_stops_nothing_and_is_mentioned_once(
    tmp_path, monkeypatch, caplog
):
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    alone(monkeypatch, tmp_path)
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "1")
    tracking.check(made(WANDB, tmp_path))
    began = time.monotonic()
    logged(made(WANDB, tmp_path), steps=(1, 2))
    assert time.monotonic() - began < feeder.FLUSH_SECONDS
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warned[0].startswith("W&B does not answer (")
    assert warned[-1].startswith(
        "W&B did not get all of the run; when the run is started again, it gets the "
    )
    assert len(warned) == 2


# --- both --------------------------------------------------------------------------------------------------

START = """
import sys, time
from pathlib import Path
from tracked import Tracked
from lowbit_dist import configfile
from lowbit_dist.record import METRICS

config = configfile.load(Path(sys.argv[1]))
tracked = Tracked(config)
for step in range(1, 6):
    tracked.log(step, {"loss": 2.0})
while any(each.newest != 5 for each in tracked.tracker.others):
    time.sleep(0.05)
print("all is there", flush=True)
time.sleep(600)
"""


def test_a_killed_and_resumed_run_shows_each_step_once(offline, tmp_path):
    pytest.importorskip("tensorboard")
    config = made(WANDB | TENSORBOARD, tmp_path)
    command = [sys.executable, "-c", START, config.run_dir / "config.yaml"]
    environment = os.environ | {"PYTHONPATH": search_path(Path(__file__).parent)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout.readline() == "all is there\n"
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    noted = json.loads((config.run_dir / wandb_run.RUN).read_text())["id"]
    logged(config, 3, (4, 5, 6, 7))  # the newest checkpoint is of step 3
    assert [step for step, _ in scalars(config)["train/loss"]] == [1, 2, 3, 4, 5, 6, 7]
    first, second = records(config)
    assert second["run"].run_id == noted
    assert "exit" not in first
    assert (steps_of(second), second["exit"]) == ([1, 2, 3, 4, 5, 6, 7], 0)


@pytest.mark.parametrize("service", [WANDB, TENSORBOARD], ids=["wandb", "tensorboard"])
def test_a_package_that_is_not_installed_is_named_with_its_extra(service, tmp_path, monkeypatch):
    from importlib.metadata import PackageNotFoundError

    from lowbit_dist.tracking import rows

    def version(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(rows, "version", version)
    ((package, value),) = service.items()
    with pytest.raises(ConfigError) as refused:
        tracking.check(made(service, tmp_path))
    assert str(refused.value) == (
        f"tracking.{package} ({str(value).lower()}) needs the package {package}, which is not installed; "
        f"run: pip install 'lowbit-dist[{package}]'"
    )


# --- system metrics ----------------------------------------------------------------------------------------


def test_mlflow_has_system_metrics_of_each_host(tmp_path, monkeypatch):
    monkeypatch.setattr(machines, "EVERY", 0.5)
    store = tmp_path / "mlflow.db"
    config = configuration(f"sqlite:///{store}", tmp_path, "busy")
    beats = []
    for rank, host in enumerate(["alpha", "alpha", "beta"]):
        monkeypatch.setattr(heartbeat.socket, "gethostname", lambda host=host: host)
        beats.append(heartbeat.Heartbeat(config.run_dir, rank=rank, start=1))
    for each in beats:
        each.beat("step", 7)
    tracked = Tracked(config)
    tracked.log(1, {"loss": 1.0})
    name = "system/beta/cpu_utilization_percentage"
    try:
        wait(lambda: tracked.run_id and len(points(store, tracked, name)) > 1)
    finally:
        for each in beats:
            each.close()
        tracked.finish("FINISHED", SUMMARY)
    numbers = client(store).get_run(tracked.run_id).data.metrics
    assert {key for key in numbers if key.startswith("system/")} == {
        f"system/{host}/{key}"
        for host in ("alpha", "beta")
        for key in (
            "cpu_utilization_percentage",
            "system_memory_usage_megabytes",
            "system_memory_usage_percentage",
        )
    }
    assert 0 < numbers["system/alpha/system_memory_usage_percentage"] < 100
    measured = points(store, tracked, name)
    assert {point.step for point in measured} == {7}
    assert len({point.timestamp for point in measured}) == len(measured), "each once"


def points(store, tracked, name):
    return client(store).get_metric_history(tracked.run_id, name)


def test_mlflows_own_switch_turns_them_off(tmp_path, monkeypatch):
    monkeypatch.setenv(machines.SWITCH, "false")
    assert not machines.Machines(tmp_path).are_due
