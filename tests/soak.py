"""A soak run: a job on a cluster of hosts under a rain of failures, against the same run left alone.

    python tests/soak.py --kills 20 --gap 75 --steps 2000 --mbit 600 --seed 1

Kills workers, a job's own processes, workers in each phase of a save, while they load and while they start;
cuts a host's power or pulls its cable, and brings it back; stops a worker's process.  A job that has died is
submitted again.  It ends with what was seen, and with exit code 1 if the digest differs, a step is missing or
logged twice (in metrics.jsonl or MLflow), or anything is left behind.

Effective training time is the share of the whole time in which steps were made that were kept: not what was
made again after a failure, nor the time to notice it and to start.  With `--folder`, what an earlier soak
left there is used: the data, and the run left alone.  Needs root (see `netcluster`).
"""

import argparse
import contextlib
import itertools
import json
import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import yaml
from netcluster import NetCluster, why_not

from lowbit_dist import heartbeat

# Of each kind among twenty.
KINDS = {
    "worker": 6, "power": 3, "network": 2, "driver": 3, "stopped": 1,
    "save: folder": 1, "save: file": 1, "save: published": 1, "load": 1, "start": 1,
}  # fmt: skip
# Seconds after which a host is back; a network that is away for less than 12 s costs no restart.
BACK = {"power": (5, 25), "network": (18, 35)}


def workers():
    """Processes of Ray Train's workers, on all hosts; there is no other cluster here."""
    found = []
    for each in psutil.process_iter(["cmdline"]):
        if "RayTrainWorker" in " ".join(each.info["cmdline"] or ()):
            found.append(each.pid)
    return found


def rows(run_dir):
    try:
        return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    except (OSError, ValueError):
        return []


def shared_memory(cluster):
    """Files in each host's /dev/shm, by host."""
    found = {}
    for i, process in cluster.processes.items():
        for child in psutil.Process(process.pid).children():
            with contextlib.suppress(OSError):
                found[i] = set(os.listdir(f"/proc/{child.pid}/root/dev/shm"))
    return found


class Rain:
    """Failures, one after another: each some time after training has recovered from the one before."""

    def __init__(self, cluster, run_dir, plan, rng, gap):
        self.cluster, self.run_dir, self.plan, self.rng, self.gap = cluster, run_dir, plan, rng, gap
        self.done = []  # (kind, step, seconds until a step was made again)
        self.over = threading.Event()

    def run(self):
        for kind in self.plan:
            if not self._recovered(0) or self.over.wait(self.rng.uniform(0.6, 1.4) * self.gap):
                return
            starts = heartbeat.count_starts(self.run_dir)
            if not self._strike(kind):
                return
            began, step = time.monotonic(), len(rows(self.run_dir))
            print(f"{time.strftime('%H:%M:%S')} {kind} at step {step}", flush=True)
            if not self._recovered(starts):
                return
            self.done.append((kind, step, round(time.monotonic() - began, 1)))

    def _recovered(self, starts):
        """Wait until workers of a start after number `starts` make steps."""
        while not self.over.wait(0.1):
            now = heartbeat.count_starts(self.run_dir)
            found = heartbeat.read(self.run_dir, now)
            if now > starts and found and all(each["phase"] == "step" for each in found):
                return True
        return False

    def _strike(self, kind):
        if kind in ("power", "network"):
            i = self.rng.randint(1, self.cluster.hosts)
            if kind == "power":
                self.cluster.power_off(i)
            else:
                self.cluster.link(i, "down")
            threading.Timer(self.rng.uniform(*BACK[kind]), self._bring_back, (kind, i)).start()
            return True
        if kind == "start":  # the workers of the start that follows one more death
            starts = heartbeat.count_starts(self.run_dir)
            self._kill(self.rng.sample(workers(), 1))
            return self._kill_when(
                lambda: heartbeat.count_starts(self.run_dir) > starts and not self._heartbeats() and workers()
            )
        if kind == "load":
            starts = heartbeat.count_starts(self.run_dir)
            self._kill(self.rng.sample(workers(), 1))
            return self._kill_when(
                lambda: (
                    heartbeat.count_starts(self.run_dir) > starts
                    and [each["pid_here"] for each in self._heartbeats() if each["phase"] == "start"]
                )
            )
        if kind.startswith("save"):
            seen = set(self.run_dir.glob("checkpoints/step-*"))
            moment = {
                "save: folder": lambda: list(self.run_dir.glob("checkpoints/.step-*.partial")),
                "save: file": lambda: list(self.run_dir.glob("checkpoints/.step-*.partial/shard-*")),
                "save: published": lambda: set(self.run_dir.glob("checkpoints/step-*")) - seen,
            }[kind]
            return self._kill_when(lambda: moment() and workers(), pause=0.001)
        if kind == "driver":
            found = subprocess.run(
                ["pgrep", "-f", "lowbit_dist train job.yaml"], capture_output=True, text=True
            )
            self._kill(int(pid) for pid in found.stdout.split())
            return True
        if kind == "stopped":
            for pid in self.rng.sample(workers(), 1):
                os.kill(pid, signal.SIGSTOP)
            return True
        self._kill(self.rng.sample(workers(), 1))
        return True

    def _heartbeats(self):
        """Of the newest start; a process has another number here than on its host."""
        found = heartbeat.read(self.run_dir, heartbeat.count_starts(self.run_dir))
        return [{**each, "pid_here": pid} for each, pid in zip(found, workers(), strict=False)]

    def _kill_when(self, victims, pause=0.01):
        while not self.over.wait(pause):
            if found := victims():
                self._kill(self.rng.sample(list(found), 1) if isinstance(found[0], int) else found)
                return True
        return False

    def _kill(self, pids):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _bring_back(self, kind, i):
        if kind == "power":
            self.cluster.start(i)
        else:
            self.cluster.link(i, "up")


def prepared(folder, source=str(Path(json.__file__).parent), vocabulary=512, seq_len=64):
    from lowbit_dist import data, tokenizer

    tokenizer.train([source], vocabulary, folder / "tokenizer")
    data.prepare(
        [source], folder / "tokenizer", folder / "data", seq_len=seq_len, workers=1, val_fraction=0.1
    )


def written(configuration, folder):
    file = folder / f"{configuration['run']['name']}.yaml"
    file.write_text(yaml.safe_dump(configuration))
    return file


def alone(configuration, folder):
    """The summary of the run on this machine, without a failure; at once if it is there already."""
    command = [sys.executable, "-m", "lowbit_dist", "train", written(configuration, folder), "--json"]
    with (folder / "calm.txt").open("w") as log:
        return json.loads(subprocess.run(command, stdout=subprocess.PIPE, stderr=log, check=True).stdout)


def submitted(cluster, configuration, folder):
    """Submit until a job succeeds; how often that was."""
    file = written(configuration, folder)
    for n in range(1, 100):
        code, _, stderr = cluster.lowbit("submit", file, "--follow", timeout=4 * 3600)
        with (folder / "log.txt").open("a") as log:
            log.write(stderr)
        if code == 0:
            return n
        time.sleep(2)
    sys.exit(f"the run never ends; see {folder}/log.txt")


def mlflow_steps(uri, run_id):
    from mlflow.tracking import MlflowClient

    return [point.step for point in MlflowClient(tracking_uri=uri).get_metric_history(run_id, "train/lr")]


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--gap", type=float, default=75, help="seconds of training before each, on average")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--mbit", type=float, help="what each host may send, in Mbit/s: steps take longer")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--kinds", nargs="*", choices=KINDS)
    options = parser.parse_args()
    if why := why_not():
        sys.exit(why)
    rng = random.Random(options.seed)
    folder = (options.folder or Path(tempfile.mkdtemp(prefix="soak-"))).absolute()
    print(f"in {folder}", flush=True)
    if not (folder / "data").exists():
        prepared(folder)
    uri = f"sqlite:///{folder}/mlflow.db"

    def configuration(name):
        return {
            "run": {"name": name, "dir": str(folder)},
            "model": {"hidden_size": 256, "intermediate_size": 512, "layers": 2, "heads": 4, "kv_heads": 2},
            "data": {"path": str(folder / "data"), "seq_len": 64},
            "precision": "fp32",
            "train": {
                "steps": options.steps, "batch_tokens": 1024, "micro_batch": 2, "reproducible": True,
                "log_every": 1, "eval_every": options.steps, "eval_samples": 4, "save_every": 3,
                "keep_last": 2,
            },
            "cluster": {"workers": {"min": 1, "max": 2}, "max_failures": 1000, "hang_timeout": 20},
            "tracking": {"mlflow": uri},
        }  # fmt: skip

    kinds = options.kinds or [kind for kind, n in KINDS.items() for _ in range(n)]
    plan = (kinds * options.kills)[: options.kills] if options.kinds else rng.sample(kinds, options.kills)
    with NetCluster(folder / "hosts", mbit=options.mbit, token=secrets.token_hex(32)) as cluster:
        shared = shared_memory(cluster)
        rain = Rain(cluster, folder / "rain", plan, rng, options.gap)
        thread = threading.Thread(target=rain.run, daemon=True)
        thread.start()
        began = time.time()
        submissions = submitted(cluster, configuration("rain"), folder)
        seconds = time.time() - began
        rain.over.set()
        thread.join()
        time.sleep(5)
        left = {i: sorted(files - shared.get(i, set())) for i, files in shared_memory(cluster).items()}
        left_workers = workers()
    found = json.loads((folder / "rain" / "summary.json").read_text())
    expected = alone(configuration("calm"), folder)
    kept = rows(folder / "rain")
    useful = sum(
        after["time"] - before["time"]
        for before, after in itertools.pairwise(kept)
        if all(before[key] == after[key] for key in ("restarts", "resumes"))
    )
    logged = mlflow_steps(uri, found["mlflow_run_id"])
    every = list(range(1, options.steps + 1))
    report = {
        "failures": [f"{kind} at step {step}: {took} s" for kind, step, took in rain.done],
        "number of failures": len(rain.done),
        "submissions": submissions,
        "restarts": found["restarts"],
        "same digest": found["digest"] == expected["digest"],
        "each step once in metrics.jsonl": [row["step"] for row in kept] == every,
        "each step once in MLflow": sorted(logged) == every,
        "left in shared memory": left,
        "left workers": left_workers,
        "seconds": round(seconds),
        "effective training time": round(useful / seconds, 3),
        "folder": str(folder),
    }
    print(json.dumps(report, indent=1))
    good = all(report[key] for key in report if key.startswith(("same", "each")))
    if not good or any(left.values()) or left_workers or len(rain.done) < options.kills:
        sys.exit(1)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
