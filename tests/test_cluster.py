"""Launching with Ray: what is refused before a worker starts, and what becomes of a run when one dies."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest

from lowbit_dist import cluster, configfile, heartbeat, runs, tracking
from lowbit_dist.checkpoint import FORMAT, Position
from lowbit_dist.cluster import attempts, checks, jobs
from lowbit_dist.config import ConfigError
from lowbit_dist.record import rows_of

STEPS, BATCH = 24, 512
SUMMARY = {
    "run", "mlflow_run_id", "steps", "tokens", "train_loss", "val_loss", "tokens_per_second", "digest",
    "checkpoint", "memory", "restarts", "skipped_steps",
}  # fmt: skip


class Told:
    """Remembers what it is told; `at(row)` is called with each row."""

    def __init__(self, at=lambda row: None):
        self.said, self.rows, self.at = [], [], at

    def say(self, text):
        self.said.append(text)

    def row(self, row):
        self.rows.append(row)
        self.at(row)

    @property
    def attempts(self):
        return sum(text.startswith("starting ") and " worker" in text for text in self.said)


def configuration(content):
    return configfile.from_dict(content)


@pytest.fixture
def run(small):
    """`run(name, ...)`: a run of 24 steps with a checkpoint after each fourth."""

    def make(name, **sections):
        train = {
            "steps": STEPS, "batch_tokens": BATCH, "log_every": 1, "eval_every": STEPS, "eval_samples": 4,
            "save_every": 4, "reproducible": True,
        }  # fmt: skip
        content = small(run={"name": name}, train=train)
        for section, fields in sections.items():
            content[section] = {**content[section], **fields}
        return content

    return make


def shell(content, folder):
    """`lowbit train --json` in a process of its own."""
    file = folder / f"{content['run']['name']}.yaml"
    file.write_text(json.dumps(content))
    code = "from lowbit_dist.cli import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", code, "train", str(file), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
    )


# ------------------------------------------------------------------ before a worker starts


@pytest.mark.parametrize(
    ("wanted", "cpus", "gpus", "answer"),
    [
        ({"workers": 2}, 2, 0, None),
        ({"workers": 2, "cpus_per_worker": 0.5}, 1, 0, None),
        ({"workers": 3, "cpus_per_worker": 0.1}, 0.3, 0, None),
        ({"workers": 2}, 16, 2, None),
        ({"workers": 4, "gpus_per_worker": 0}, 16, 2, None),
        (
            {"workers": 4},
            2,
            0,
            "has 2: 2 workers fit; write cluster.workers=2 or cluster.cpus_per_worker=0.5",
        ),
        ({"workers": 4}, 3, 0, "3 workers fit; write cluster.workers=3 or cluster.cpus_per_worker=0.75"),
        # 6 micro-batches are not divided by 5 or 4 workers.
        ({"workers": 6}, 5, 0, "5 workers fit; write cluster.workers=3 or cluster.cpus_per_worker=0.8"),
        ({"workers": 1, "cpus_per_worker": 4}, 2, 0, "no worker fits; write cluster.cpus_per_worker=2"),
        ({"workers": 4}, 16, 2, "4 GPUs, but here has 2: 2 workers fit; write cluster.workers=2"),
        ({"workers": 2, "gpus_per_worker": 1}, 16, 0, "no worker fits; write cluster.gpus_per_worker=0"),
        ({"workers": 2}, 0, 0, "no worker fits; write cluster.start_timeout=600"),
    ],
)
def test_more_workers_than_there_are_processors_are_refused_with_what_fits(wanted, cpus, gpus, answer, small):
    workers = wanted["workers"]
    batch = {"batch_tokens": 64 * 2 * (6 if workers in (3, 6) else 12 if cpus == 3 else workers)}
    config = configuration(small(cluster=wanted, train=batch))
    if answer is None:
        checks.check_workers(config, cpus=cpus, gpus=gpus, place="here")
        return
    with pytest.raises(ConfigError) as error:
        checks.check_workers(config, cpus=cpus, gpus=gpus, place="here")
    assert answer in str(error.value)


def test_what_is_suggested_instead_of_too_many_workers_is_accepted(small):
    config = configuration(small(cluster={"workers": 6}, train={"batch_tokens": 64 * 2 * 6}))
    with pytest.raises(ConfigError) as error:
        checks.check_workers(config, cpus=5, gpus=0, place="here")
    for way in str(error.value).rpartition("write ")[2].split(" or "):
        name, value = way.removeprefix("cluster.").split("=")
        changed = config.to_dict()
        changed["cluster"][name] = json.loads(value)
        checks.check_workers(configuration(changed), cpus=5, gpus=0, place="here")


def test_a_run_of_the_same_name_with_another_configuration_is_refused_with_the_fields(small):
    config = configuration(small())
    config.run_dir.mkdir()
    (config.run_dir / "config.yaml").write_text(config.to_yaml())
    other = configuration(small(method={"grid": "int8"}, optimizer={"lr": 0.5}))
    (config.run_dir / "metrics.jsonl").write_text('{"step": 1, "time": 1.0}\n')
    checks.check_run(other)  # as long as there is no checkpoint that a launch would resume from
    (config.run_dir / "checkpoints" / "step-4").mkdir(parents=True)
    checks.check_run(config)
    checks.check_run(configuration(small(cluster={"workers": 1}, train={"log_every": 1})))
    with pytest.raises(ConfigError) as error:
        checks.check_run(other)
    assert "method.grid: ternary -> int8, optimizer.lr: 0.002 -> 0.5" in str(error.value)


def test_a_run_that_failed_before_its_first_checkpoint_starts_anew_when_its_configuration_was_corrected(
    small,
):
    wrong, corrected = configuration(small(optimizer={"lr": 0.5})), configuration(small())
    folder, told = wrong.run_dir, Told()
    folder.mkdir()
    runs.begin(wrong)
    measured = {"metrics.jsonl": '{"step": 1, "time": 1.0}\n', tracking.RUN_ID: "first"}
    for name, content in measured.items():
        (folder / name).write_text(content)
    cluster._begin(wrong, told)
    assert {name: (folder / name).read_text() for name in measured} == measured
    assert told.said == []
    checks.check_run(corrected)
    cluster._begin(corrected, told)
    assert rows_of(folder / "metrics.jsonl") == [] and tracking.noted_run_id(folder) is None
    assert configfile.load(folder / "config.yaml") == corrected
    assert told.said == [
        "run small starts anew: it has no checkpoint, and was begun with another configuration "
        "(optimizer.lr: 0.5 -> 0.002)"
    ]


def test_a_checkpoint_of_another_model_is_refused(small):
    config = configuration(small())
    folder = config.run_dir / "checkpoints" / "step-4"
    folder.mkdir(parents=True)
    (config.run_dir / "latest").write_text("step-4")
    position = asdict(Position(step=4, samples=16, tokens=1024))
    (folder / "manifest.json").write_text(
        json.dumps(
            {
                "format": FORMAT,
                **position,
                "vocab_size": 512,
                "tokenizer_sha256": "0",
                "config": config.to_dict(),
            }
            | {"tensors": {}, "files": {}}
        )
    )
    checks.check_run(config)
    with pytest.raises(ConfigError, match=r"checkpoints/step-4 .*model\.layers: 2 -> 3"):
        checks.check_run(configuration(small(model={"layers": 3})))
    (folder / "manifest.json").write_text("{")
    checks.check_run(config)  # a damaged one is for the workers: they go back to the one before


def test_a_run_folder_that_cannot_be_one_is_refused(small, tmp_path):
    (tmp_path / "small").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        checks.check_run(configuration(small()))
    with pytest.raises(ConfigError, match=r"run\.dir .* cannot be written"):
        checks.check_folder(configuration(small(run={"dir": "/proc"})))


def test_data_that_is_not_there_is_answered_with_the_commands_that_make_it(small, tmp_path):
    config = configuration(small(data={"path": str(tmp_path / "absent")}, cluster={"workers": 1}))
    with pytest.raises(ConfigError) as error:
        checks.check(config)
    for words in (
        "`lowbit tokenizer train --input",
        "`lowbit data prepare --input",
        f"--out {tmp_path}/absent`",
    ):
        assert words in str(error.value)
    assert not config.run_dir.exists()


def test_one_run_is_not_trained_twice_at_once(small):
    config = configuration(small())
    config.run_dir.mkdir()
    with (
        checks.run_lock(config),
        pytest.raises(ConfigError, match="by another process"),
        checks.run_lock(config),
    ):
        pass
    with checks.run_lock(config):
        pass


def test_a_job_gets_every_path_of_its_configuration_as_a_whole_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = {
        "run.dir": "r", "data.path": "d", "data.tokenizer": "t", "data.cache": "c", "model.pretrained": "m",
    }  # fmt: skip
    store = "tracking.mlflow=sqlite:///mlflow.db"
    (tmp_path / "run.yaml").write_text("precision: fp32\n")
    config = configfile.load("run.yaml", [*(f"{name}={path}" for name, path in paths.items()), store])
    whole = jobs.absolute(config)
    assert {name: whole.flat()[name] for name in paths} == {
        name: str(tmp_path / path) for name, path in paths.items()
    }
    assert whole.tracking.mlflow == f"sqlite:///{tmp_path}/mlflow.db"
    assert whole.differences(config) == [], "places may change"
    remote = configfile.load("run.yaml", ["data.path=s3://bucket/data"])
    assert jobs.absolute(remote).data == remote.data


@pytest.mark.parametrize(
    ("address", "answer"),
    [
        ("127.0.0.1:1", "does not answer"),
        ("127.0.0.1:port", "is no address"),
        ("ray://127.0.0.1:10001", "is an address of Ray's client"),
        ("http://127.0.0.1:8265", "is the address of Ray's dashboard"),
    ],
)
def test_an_address_without_a_ray_cluster_is_refused(address, answer, small, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", address)
    config = configuration(small(cluster={"workers": 1}))
    with pytest.raises(ConfigError) as error:
        checks.check(config)
    assert str(error.value).startswith(f"RAY_ADDRESS ({address}) {answer}")


# ------------------------------------------------------------------ runs


def test_rows_are_followed_from_the_end_of_the_file_whole_and_through_a_cut(tmp_path):
    from lowbit_dist.cluster.following import Follower

    metrics, log = tmp_path / "metrics.jsonl", tmp_path / "log.txt"
    metrics.write_text('{"step": 1}\n')
    told = Told()
    follower = Follower(tmp_path, told)
    with metrics.open("a") as file:
        file.write('{"step": 2}\n{"st')
    log.write_text(
        "12:00:00 worker 0: careful\nTraceback\n"
        "2026-11-26 12:00:01,123\tERROR worker.py:433 -- A worker died or was killed while executing a task "
        "by an unexpected system error. (1) The process is killed by SIGKILL by OOM killer\n"
        "12:00:02 worker 0: stopped at step 2: its checkpoint is saved\n"
        "12 of them were killed\n"
    )
    follower.read()
    with metrics.open("a") as file:
        file.write('ep": 3}\n')
    follower.read()
    metrics.write_text('{"step": 1}\n')  # the run went back to an earlier checkpoint
    follower.read()
    with metrics.open("a") as file:
        file.write('{"step": 2}\n')
    follower.read()
    assert [row["step"] for row in told.rows] == [2, 3, 2]
    assert told.said == ["worker 0: careful", "worker 0: stopped at step 2: its checkpoint is saved"]


def children(pid):
    """Process id -> command line of all living processes that `pid` has started."""
    found = {}
    for each in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            found[each.pid] = " ".join(each.cmdline())
    return found


def train(content):
    from lowbit_dist import loop

    return loop.run(configuration(content))


@pytest.fixture(scope="module")
def digests():
    return {}


@pytest.fixture
def undisturbed(run, ranks, digests):
    """The digest of the run in processes that nobody stops."""
    if not digests:
        digests["alone"] = ranks(2).run(train, run("alone"))[0]["digest"]
    return digests["alone"]


def left_behind(pid, with_folder=True):
    """Processes of a launch that has ended, and its folder (of a killed one, the next launch removes it)."""
    deadline = time.monotonic() + 10
    mark = re.compile(rf"lowbit-ray-{pid}\b")
    while time.monotonic() < deadline:
        processes = [
            each
            for each in psutil.process_iter(["cmdline"])
            if mark.search(" ".join(each.info["cmdline"] or ()))
        ]
        places = [place for place in Path("/tmp").glob("lowbit-ray-*") if mark.match(place.name)]
        found = [*processes, *(places if with_folder else ())]
        if not found:
            break
        time.sleep(0.2)
    return found


@pytest.mark.integration
def test_a_run_from_the_shell_ends_with_its_whole_summary_and_leaves_nothing(run, tmp_path, undisturbed):
    process = shell(run("undisturbed"), tmp_path)
    stdout, stderr = process.communicate(timeout=400)
    assert process.returncode == 0, stderr
    summary = json.loads(stdout)
    assert stdout.count("\n") == 1
    assert set(summary) >= SUMMARY
    assert summary == json.loads((tmp_path / "undisturbed" / "summary.json").read_text())
    assert (summary["steps"], summary["tokens"], summary["restarts"]) == (STEPS, STEPS * BATCH, 0)
    assert summary["memory"]["workers"] == 2
    for words in ("dashboard: http://127.0.0.1:", f"step {STEPS}/{STEPS}  loss", "tokens/s", "/worker"):
        assert words in stderr
    assert left_behind(process.pid) == []
    assert not (tmp_path / "undisturbed" / ".ray").exists()
    assert summary["digest"] == undisturbed

    # The same command again has nothing to do, and needs no Ray for it.
    told = Told()
    assert cluster.launch(configuration(run("undisturbed")), progress=told) == summary
    assert told.attempts == 0
    # Nor has it with a store that does not know the run yet, which then gets all of it.
    uri = f"sqlite:///{tmp_path}/later.db"
    later = cluster.launch(configuration(run("undisturbed", tracking={"mlflow": uri})), progress=told)
    number = (tmp_path / "undisturbed" / ".mlflow_run_id").read_text()
    assert later == summary | {"mlflow_run_id": number}
    assert later == json.loads((tmp_path / "undisturbed" / "summary.json").read_text())
    assert told.attempts == 0
    assert mlflow_run(uri, tmp_path / "undisturbed") == ("FINISHED", list(range(1, STEPS + 1)))


def wait_for(condition, process, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def rows(run_dir):
    file = run_dir / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line)["step"] for line in lines]


def mlflow_run(uri, run_dir):
    """The status of the run in MLflow, and the steps that it has."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    run_id = (run_dir / ".mlflow_run_id").read_text()
    points = client.get_metric_history(run_id, "train/lr")
    return client.get_run(run_id).info.status, sorted(point.step for point in points)


def assert_stopped_politely(stderr):
    """What a launch says that was ended by a signal."""
    assert "stopping after this step, with a checkpoint" in stderr
    assert "resumes from the newest checkpoint" in stderr.splitlines()[-1]
    assert "Traceback" not in stderr
    assert "OOM" not in stderr


@pytest.mark.slow
@pytest.mark.timeout(1200)  # on a machine that does other things, too
def test_a_run_that_is_stopped_and_killed_in_every_way_ends_as_one_that_was_left_alone(
    run, tmp_path, undisturbed
):
    folder, uri = tmp_path / "abused", f"sqlite:///{tmp_path}/mlflow.db"
    content = run("abused", tracking={"mlflow": uri})

    def started_and_beyond(step):
        """Until workers of this start have made a further step: one that was killed may have left its row."""
        start = heartbeat.count_starts(folder) + 1
        process = shell(content, tmp_path)
        wait_for(
            lambda: (
                any(each["phase"] == "step" for each in heartbeat.read(folder, start))
                and rows(folder)[-1:] > [step]
            ),
            process,
        )
        return process

    # A signal ends it after the step in hand, with a checkpoint of that step: SIGINT and SIGHUP do, too, in
    # test_outside.py and test_signals.py.
    process = started_and_beyond(0)
    # Ray is there for this machine alone.  The store by which torch's workers meet is not.
    family = {pid for pid, line in children(process.pid).items() if "RayTrainWorker" not in line}
    places = {
        each.laddr.ip
        for each in psutil.net_connections("tcp")
        if each.status == "LISTEN" and each.pid in family
    }
    assert {place.removeprefix("::ffff:") for place in places} == {"127.0.0.1"}
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=120)
    assert (process.returncode, stdout) == (143, ""), stderr
    assert_stopped_politely(stderr)
    assert left_behind(process.pid) == []
    step = rows(folder)[-1]
    assert 0 < step < STEPS, "it must have been stopped before its end"
    assert (folder / "latest").read_text() == f"step-{step}"
    assert mlflow_run(uri, folder) == ("KILLED", list(range(1, step + 1)))

    # The launcher dies: its processes do, too.
    first, process = step, started_and_beyond(step)
    process.kill()
    process.communicate(timeout=60)
    assert left_behind(process.pid, with_folder=False) == []
    step = int((folder / "latest").read_text().removeprefix("step-"))
    killed = process.pid

    # Ray dies: the launcher starts it anew.
    process = started_and_beyond(step)
    assert left_behind(killed) == []
    for pid, line in children(process.pid).items():
        if line.split(" ")[0].endswith(("raylet", "gcs_server")):
            os.kill(pid, signal.SIGKILL)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert left_behind(process.pid) == []
    summary = json.loads(stdout)
    assert summary["digest"] == undisturbed
    assert (summary["restarts"], summary["resumes"]) == (1, 2)
    assert f"worker 0: resumes from step {first}" in (folder / "log.txt").read_text()
    assert mlflow_run(uri, folder) == ("FINISHED", list(range(1, STEPS + 1)))
    assert rows(folder) == list(range(1, STEPS + 1))
    assert not (folder / ".stop").exists()


def test_a_worker_that_is_stopped_is_found_named_and_shown_and_one_that_is_killed_replaced(
    run, undisturbed, ray
):
    """And Ray's metrics have all of the run's gauges meanwhile."""
    from test_monitoring import exported

    from lowbit_dist.tracking import gauges

    stopped, found, killed, told_by_ray, with_memory = [], [], [], set(), set()

    def harm(row):
        if row["step"] >= 6 and not stopped:
            worker = heartbeat.read(config.run_dir)[1]
            os.kill(worker["pid"], signal.SIGSTOP)
            stopped.append((worker["pid"], time.monotonic()))
        elif row["step"] >= 12 and told.attempts == 2 and not killed:
            workers = [pid for pid, command in children(os.getpid()).items() if "RayTrainWorker" in command]
            assert len(workers) == 2
            killed.append(workers[-1])
            os.kill(killed[0], signal.SIGKILL)
        shown = [(name, tags) for name, run, *tags in exported(ray) if run == "harmed"]
        told_by_ray.update(name for name, _ in shown)
        with_memory.update(tags[0] for name, tags in shown if name == "lowbit_memory_bytes" and tags)

    def note(text):
        if "does not run" in text and not found:
            found.append(time.monotonic())

    config = configuration(run("harmed", cluster={"hang_timeout": 12}, train={"eval_every": 2}))
    told = Told(harm)
    told.say = lambda text: (told.said.append(text), note(text))
    summary = cluster.launch(config, progress=told)
    (pid, began), (noticed,) = stopped[0], found
    assert 12 - 2 * heartbeat.EVERY <= noticed - began <= 12 + 30
    assert killed, "the case must kill a worker"
    assert told.attempts == 3
    assert any(" died (" in text and "restart 2 of at most 10" in text for text in told.said), told.said
    assert (summary["restarts"], summary["resumes"]) == (2, 0)
    assert "worker 0: resumes from step" in " ".join(told.said)
    assert summary["digest"] == undisturbed
    assert told_by_ray == set(gauges.GAUGES) - {"lowbit_mfu"}, "no peak is known of a CPU"
    assert {"0", "1"} <= with_memory, "each worker tells of its memory"
    log = (config.run_dir / "log.txt").read_text()
    assert f"launcher: worker 1 (process {pid} on " in log
    assert "does not run: no progress after step" in log
    of_0, of_1 = log.split("stacks of the workers:")[1].split("  worker 1 (process")
    assert "worker 0 (process" in of_0
    assert "State: T (stopped)" in of_1
    for stack in (of_0, of_1):
        assert '"TrainingThread' in stack
        assert "run (lowbit_dist/loop.py:" in stack
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def wait_for_the_writer(content):
    """Seconds that worker 0 waits before it may write."""
    from lowbit_dist.cluster import worker

    began = time.monotonic()
    with worker._only_writer(configuration(content)):
        return time.monotonic() - began


def test_a_worker_that_outlived_its_launcher_is_waited_for(small, ranks):
    content = small()
    config = configuration(content)
    config.run_dir.mkdir()
    ranks(2).run(wait_for_the_writer, content)  # starting takes them longer than the other process lives
    holder = subprocess.Popen(
        [sys.executable, "-c", "import fcntl, sys, time; lock = open(sys.argv[1], 'w'); "
         "fcntl.flock(lock, fcntl.LOCK_EX); print(flush=True); time.sleep(2)", config.run_dir / ".writer"],
        stdout=subprocess.PIPE,
    )  # fmt: skip
    holder.stdout.readline()
    first, other = ranks(2).run(wait_for_the_writer, content)
    assert first > 1.0 and other < 0.5
    holder.wait()
    assert ranks(2).run(wait_for_the_writer, content)[0] < 0.5


def test_workers_get_their_folder_threads_and_interface_and_a_mistake_that_one_finds_comes_out_as_it_is(
    run, ray, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)

    def work(settings):
        import os

        import torch
        import torch.distributed as dist

        from lowbit_dist.cluster import worker
        from lowbit_dist.config import ConfigError

        worker.prepare(settings)
        total = torch.ones(1)
        dist.all_reduce(total)
        if dist.get_rank() == 1:
            variables = ("OMP_NUM_THREADS", "DS_ACCELERATOR", "GLOO_SOCKET_IFNAME")
            found = {name: os.environ.get(name) for name in variables}
            found |= {"threads": torch.get_num_threads(), "folder": os.getcwd(), "workers": total.item()}
            raise ConfigError(f"data.path (x) is wrong; write {json.dumps(found)}")
        dist.barrier()

    config = configuration(run("environment", cluster={"cpus_per_worker": 0.5, "workers": 2}))
    config.run_dir.mkdir()
    told = Told()
    with pytest.raises(ConfigError) as error:
        attempts.train_until_done(config, told, work)
    assert told.attempts == 1, "it is not tried again"
    words, found = str(error.value).split("; write ")
    assert words == "data.path (x) is wrong"
    found = json.loads(found)
    addresses = psutil.net_if_addrs()[found.pop("GLOO_SOCKET_IFNAME")]
    import ray.util

    assert ray.util.get_node_ip_address() in {each.address for each in addresses}
    assert found == {
        "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "threads": 1, "folder": str(tmp_path),
        "workers": 2,
    }  # fmt: skip


@pytest.mark.slow  # attempts after a failure, and errors in a worker's own words, are in the tests around it
def test_the_same_error_at_the_same_place_is_tried_twice_and_ends_in_the_workers_own_words(run, ray):
    def work(settings):
        raise ValueError("weights do not fit\nwrong shape (3, 4)")

    config, told = configuration(run("broken", cluster={"workers": 1})), Told()
    config.run_dir.mkdir()
    with pytest.raises(cluster.RunFailed) as error:
        attempts.train_until_done(config, told, work)
    assert str(error.value).startswith("worker 0: ValueError: wrong shape (3, 4) after 1 restart")
    assert told.attempts == 2


@pytest.mark.slow  # kills and FAILED runs are in other tests, too; what is new is a limit of 0
def test_no_failure_is_retried_when_none_is_allowed_and_mlflow_says_failed(run, ray, tmp_path):
    def kill(row):
        if row["step"] == 2:
            for pid, command in children(os.getpid()).items():
                if "RayTrainWorker" in command:
                    os.kill(pid, signal.SIGKILL)

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    alone = {"workers": 1, "max_failures": 0}
    config = configuration(run("fragile", cluster=alone, tracking={"mlflow": uri}))
    told = Told(kill)
    with pytest.raises(cluster.RunFailed, match=r"worker \d died"):
        cluster.launch(config, progress=told)
    assert told.attempts == 1
    status, steps = mlflow_run(uri, config.run_dir)
    assert status == "FAILED"
    assert steps == rows(config.run_dir), "what the workers could not send, the launcher sends"


def test_workers_get_what_the_network_needs_and_on_gpus_what_repeats_their_bits(monkeypatch):
    from lowbit_dist.cluster import fit

    given = {
        "FI_PROVIDER": "efa", "UCX_TLS": "rc", "NCCL_DEBUG": "WARN", "LD_LIBRARY_PATH": "/opt/amazon/efa/lib",
        "GLOO_SOCKET_IFNAME": "eth0", "LOWBIT_CACHE": "/scratch", "TORCH_NCCL_TRACE_BUFFER_SIZE": "9",
    }  # fmt: skip
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONSTARTUP", "mine")
    on_gpus, on_cpus = (fit._environment({"gpus": n, "threads": 2}) for n in (1, 0))
    for environment in (on_gpus, on_cpus):
        assert given.items() <= environment.items()
        assert "PYTHONSTARTUP" not in environment
    assert on_gpus["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8" and "CUDA_VISIBLE_DEVICES" not in on_gpus
    assert on_cpus["CUDA_VISIBLE_DEVICES"] == "" and "CUBLAS_WORKSPACE_CONFIG" not in on_cpus
