"""A cluster of three hosts in network and process namespaces of their own: jobs over HTTP, and lost hosts."""

import json
import os
import secrets
import shutil
import signal
import subprocess
import time
from pathlib import Path

import netcluster
import pytest
from netcluster import NetCluster
from ranks import search_path
from test_outside import CHOSEN, STEPS, TRAIN, train_outside
from test_train import train

from lowbit_dist import heartbeat
from lowbit_dist.checkpoint import Checkpoint, resolve

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif((why := netcluster.why_not()) is not None, reason=str(why)),
    pytest.mark.timeout(1500),
]
CONTINUES = 90  # seconds within which a run goes on after it has lost a host
FAR = 10_000  # steps that a disturbed run never makes: it is stopped when the last disturbance is over


@pytest.fixture(scope="module")
def sites(tmp_path_factory):
    """Of each host, the folder of the packages that are installed on it alone."""
    return [tmp_path_factory.mktemp(f"site{i}") for i in range(3)]


@pytest.fixture(scope="module")
def cluster(sites, tmp_path_factory):
    def variables(i):
        return {"PYTHONPATH": search_path(sites[i])}

    folder = tmp_path_factory.mktemp("hosts")
    with NetCluster(folder, token=secrets.token_hex(32), variables=variables) as cluster:
        yield cluster


@pytest.fixture
def run(small, tmp_path):
    """`run(name, steps, ...)`: the configuration of a reproducible run, and its file."""

    def make(name, steps, **sections):
        train = {
            "steps": steps, "batch_tokens": 16 * 64, "micro_batch": 2, "log_every": 1, "eval_every": steps,
            "eval_samples": 4, "save_every": 7, "reproducible": True,
        }  # fmt: skip
        content = small(
            run={"name": name}, train=train, cluster={"workers": {"min": 1, "max": 2}}, **sections
        )
        file = tmp_path / f"{name}.yaml"
        file.write_text(json.dumps(content))
        return content, file

    return make


class Seen:
    """A run, seen through its folder."""

    def __init__(self, content):
        self.folder = Path(content["run"]["dir"], content["run"]["name"])

    def steps(self):
        try:
            return [
                json.loads(line)["step"] for line in (self.folder / "metrics.jsonl").read_text().splitlines()
            ]
        except (OSError, ValueError):
            return []

    def step(self):
        return max(self.steps(), default=0)

    def workers(self):
        """Of the newest start, those that have made a step."""
        start = heartbeat.count_starts(self.folder)
        return [each for each in heartbeat.read(self.folder, start) if each["phase"] == "step"]

    def wait(self, what, condition, seconds=240):
        began = time.monotonic()
        while not condition():
            assert time.monotonic() - began < seconds, (
                f"no {what} within {seconds} s; see {self.folder}/log.txt"
            )
            assert not (self.folder / "summary.json").exists(), f"the run ended before there was {what}"
            time.sleep(0.2)
        return time.monotonic() - began

    def wait_for_steps(self, n, *, workers):
        """Until so many workers have made `n` more steps."""
        target = None

        def made():
            nonlocal target
            if len(self.workers()) != workers:
                return False
            target = target or self.step() + n
            return self.step() >= target

        return self.wait(f"{n} steps on {workers} workers", made)


def job_of(cluster, name):
    """(id, status) of the newest job of a run."""
    code, stdout, stderr = cluster.lowbit("status", "--json")
    assert code == 0, stderr
    jobs = [each for each in json.loads(stdout)["jobs"] if each["run"] == name]
    return jobs[0]["job"], jobs[0]["status"]


def stop(cluster, job, seen):
    """Stop a job; the checkpoint that it leaves behind."""
    code, stdout, stderr = cluster.lowbit("stop", job, "--json")
    assert (code, json.loads(stdout)["status"]) == (0, "STOPPED"), stderr
    left = Checkpoint.open(resolve(seen.folder))
    assert left.step == seen.step()
    return left


def digest_left_alone(ranks, content, step):
    """What the same run has after so many steps in processes that nobody disturbs."""
    alone = {
        **content,
        "run": {**content["run"], "name": "alone"},
        "train": {**content["train"], "save_every": step},
    }
    ranks(2).run(train, alone, stop_at=step)
    left = Checkpoint.open(resolve(Seen(alone).folder))
    assert left.step == step
    return left.digest()


def test_a_job_is_submitted_stopped_with_a_checkpoint_submitted_again_and_followed_to_its_end(
    cluster, run, ranks
):
    content, file = run("calm", 30)
    code, stdout, stderr = cluster.lowbit("submit", file, "--json")
    assert code == 0, stderr
    assert "lowbit: checked: node1, node2 can carry the run" in stderr
    submitted = json.loads(stdout)
    assert (submitted["job"], submitted["run"], submitted["status"]) == ("calm-1", "calm", "RUNNING")
    code, _, stderr = cluster.lowbit("submit", file)
    assert code == 2
    assert "is being trained by job calm-1" in stderr

    seen = Seen(content)
    seen.wait_for_steps(2, workers=2)
    stopped_at = stop(cluster, "calm-1", seen).step
    assert 1 < stopped_at < 30, "it must have been stopped before its end"

    code, stdout, stderr = cluster.lowbit("submit", file, "--follow", "--json")
    assert code == 0, stderr
    found = json.loads(stdout)
    assert (found["job"], found["status"]) == ("calm-2", "SUCCEEDED")
    assert found["progress"].startswith("step 30/30")
    assert f"lowbit: step {stopped_at + 1}/30" in stderr
    assert seen.steps() == list(range(1, 31))
    code, stdout, _ = cluster.lowbit("logs", "calm-2")
    assert code == 0
    assert "lowbit: step 30/30" in stdout
    code, _, stderr = cluster.lowbit("logs", "calm-9")
    assert code == 2
    assert "has no job 'calm-9'; its newest are: calm-2, calm-1" in stderr

    undisturbed = ranks(2).run(train, {**content, "run": {**content["run"], "name": "alone"}})[0]["digest"]
    assert Checkpoint.open(resolve(seen.folder)).digest() == undisturbed


def test_a_request_without_the_token_is_refused(cluster, run):
    assert cluster.get("/api/jobs/", token=False)[0] == 401
    assert cluster.get("/api/jobs/")[0] == 200
    _, file = run("stranger", 30)
    for verb in (("submit", file), ("status",), ("logs", "calm-1"), ("stop", "calm-1")):
        code, _, stderr = cluster.lowbit(*verb, token=False)
        assert (code, "refuses the token (401)" in stderr, len(stderr.splitlines())) == (2, True, 1), stderr


def test_what_the_cluster_lacks_is_answered_in_one_line_before_a_worker_starts(cluster, run, tmp_path):
    _, file = run("lacking", 30)
    for change, answer in (
        ("cluster.workers=4", "(4) x cluster.cpus_per_worker (1) are 4 CPUs, but the Ray cluster has 2"),
        (f"data.path={tmp_path}/absent", "does not exist"),
        ("run.dir=/tmp/ray/mine", "does not see /tmp/ray/mine/lacking; write a folder that all"),
    ):  # fmt: skip
        code, stdout, stderr = cluster.lowbit("submit", file, change)
        assert (code, stdout) == (2, ""), stderr
        assert answer in stderr.splitlines()[-1]


def test_a_method_of_another_package_is_trained_and_a_host_without_it_is_named(
    cluster, sites, installed, small, tmp_path, ranks
):
    content = small(run={"name": "signs"}, train=TRAIN, cluster={"workers": 2}, **CHOSEN)
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(content))
    here = {"PYTHONPATH": os.environ["PYTHONPATH"]}

    def install(*numbers):
        for i in numbers:
            shutil.copytree(installed, sites[i], dirs_exist_ok=True)

    def refusal():
        code, stdout, stderr = cluster.lowbit("submit", file, variables=here)
        assert (code, stdout) == (2, ""), stderr
        return stderr.splitlines()[-1].removeprefix("lowbit: ")

    answer = refusal()
    assert answer.startswith(f"the head of {cluster.address} cannot read this run's configuration (")
    assert "install lowbit-outside 0.1.0 (" in answer and answer.endswith(") on all machines")

    install(0, 1)
    answer = refusal()
    assert answer.startswith(f"machine node2 ({cluster.ip(2)}) lacks lowbit-outside 0.1.0 (")
    assert answer.endswith("from which this run's method or optimizer comes; install it on all machines")

    install(2)
    source = sites[2] / "lowbit_outside" / "sign.py"
    source.write_text(source.read_text().replace("1.0", "2.0"))
    answer = refusal()
    assert answer.startswith(f"machine node2 ({cluster.ip(2)}) has lowbit-outside 0.1.0 (")
    assert answer.endswith("install the same packages on all machines")

    install(2)
    code, stdout, stderr = cluster.lowbit("submit", file, "--follow", "--json", variables=here)
    assert code == 0, stderr
    assert json.loads(stdout)["status"] == "SUCCEEDED"
    seen = Seen(content)
    rows = [json.loads(line) for line in (seen.folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert rows[-1]["zero_fraction"] == 0.0
    alone = {**content, "run": {**content["run"], "name": "alone"}}
    expected = ranks(2).run(train_outside, str(installed), alone)[0]["digest"]
    assert Checkpoint.open(resolve(seen.folder)).digest() == expected


def test_a_run_outlives_the_power_the_network_and_its_driver(cluster, run, ranks):
    content, file = run("storm", FAR)
    code, _, stderr = cluster.lowbit("submit", file)
    assert code == 0, stderr
    seen = Seen(content)
    seen.wait_for_steps(3, workers=2)

    cluster.power_off(2)
    after_power_cut = seen.wait_for_steps(1, workers=1)
    cluster.start(2)
    seen.wait_for_steps(3, workers=2)

    cluster.link(1, "down")
    after_partition = seen.wait_for_steps(1, workers=1)
    cluster.link(1, "up")
    seen.wait_for_steps(3, workers=2)

    job, status = job_of(cluster, "storm")
    assert (job, status) == ("storm-1", "RUNNING")
    for pid in cluster.processes_of("lowbit_dist train job.yaml"):
        os.kill(pid, signal.SIGKILL)
    while job_of(cluster, "storm")[1] == "RUNNING":
        time.sleep(0.5)
    before = Checkpoint.open(resolve(seen.folder)).step
    code, stdout, stderr = cluster.lowbit("submit", file, "--json")
    assert code == 0, stderr
    assert json.loads(stdout)["job"] == "storm-2"
    seen.wait_for_steps(1, workers=2)
    left = stop(cluster, "storm-2", seen)
    assert f"lowbit: step {before + 1}/{FAR}" in cluster.lowbit("logs", "storm-2")[1]

    assert seen.steps() == list(range(1, left.step + 1))
    assert left.digest() == digest_left_alone(ranks, content, left.step)
    assert after_power_cut < CONTINUES
    assert after_partition < CONTINUES
    log = cluster.lowbit("logs", "storm-1")[1]
    # By default Ray takes a minute to believe that a host without network is lost.
    assert f"machine node1 ({cluster.ip(1)}) has not answered for" in log
    assert log.count("there are slots for 2 workers instead of 1") == 2
    print(
        f"went on after {after_power_cut:.0f} s without power, {after_partition:.0f} s without network; "
        f"{left.step} steps"
    )


def test_a_host_that_will_be_taken_away_is_left_with_a_checkpoint(cluster, run, ranks):
    content, file = run("preempted", FAR)
    code, _, stderr = cluster.lowbit("submit", file, f"train.save_every={FAR}")
    assert code == 0, stderr
    seen = Seen(content)
    seen.wait_for_steps(3, workers=2)

    (node,) = [each["node"] for each in seen.workers() if each["host"] == "node2"]
    cluster.drain(node)
    seen.wait_for_steps(1, workers=1)
    assert {each["host"] for each in seen.workers()} == {"node1"}
    cluster.power_off(2)  # as whoever announced it does
    seen.wait_for_steps(3, workers=1)
    left = stop(cluster, "preempted-1", seen)
    cluster.start(2)
    cluster.wait_for(3)

    assert "node2 is about to be taken away" in cluster.lowbit("logs", "preempted-1")[1]
    assert seen.steps() == list(range(1, left.step + 1))
    rows = [json.loads(line) for line in (seen.folder / "metrics.jsonl").read_text().splitlines()]
    first = next(row["step"] for row in rows if row["restarts"])
    assert first > 3, "no other checkpoint than that of leaving, and it was found"
    assert rows[-1]["restarts"] == 1
    assert left.digest() == digest_left_alone(ranks, content, left.step)


def test_the_token_is_nowhere_to_be_read(cluster, tmp_path):
    """After the jobs above: not in the runs' folders, the cluster's logs, or any command line."""
    found = [
        file
        for folder in (tmp_path.parent, cluster.folder)
        for file in folder.rglob("*")
        if file.is_file() and file.stat().st_size < 50_000_000 and cluster.token.encode() in file.read_bytes()
    ]
    assert found == []
    lines = subprocess.run(["ps", "-ww", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert "ray start" in lines
    assert cluster.token not in lines
