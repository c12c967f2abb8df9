"""A soak run: `lowbit train` under a rain of kill -9, against the same run left alone.

    python tests/soak.py --kills 20 --seed 1

Kills workers, the driver and Ray's own processes at random steps, and workers in each phase of a save, and
starts the command again when it has died. It ends with what was seen, and with exit code 1 if the digest
differs, a step is missing or logged twice (in metrics.jsonl or MLflow), or anything is left behind.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import yaml

KINDS = ("worker", "driver", "save: folder", "save: file", "save: published", "start", "ray")
WEIGHTS = (10, 5, 1, 1, 1, 1, 1)  # of each kind among twenty
MARK = "lowbit-ray-"


def command(configuration, folder):
    file = folder / f"{configuration['run']['name']}.yaml"
    file.write_text(yaml.safe_dump(configuration))
    code = "from lowbit_dist.cli import main; main()"
    return [sys.executable, "-c", code, "train", str(file), "--json"]


def family(pid):
    found = {}
    try:
        for each in psutil.Process(pid).children(recursive=True):
            try:
                found[each.pid] = " ".join(each.cmdline())
            except psutil.Error:
                continue
    except psutil.Error:
        pass
    return found


def workers(pid):
    return [child for child, line in family(pid).items() if "RayTrainWorker" in line]


def last_step(run_dir):
    try:
        return json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    except (OSError, ValueError, IndexError):
        return 0


class Rain:
    """Kills, one after another, each when its moment has come."""

    def __init__(self, run_dir, plan, rng, every):
        self.run_dir, self.plan, self.rng, self.every = run_dir, plan, rng, every
        self.done = []  # (kind, step)
        self.driver = None
        self.over = threading.Event()

    def kill(self, *pids):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def run(self):
        for kind in self.plan:
            if not self._one(kind):
                return

    def _one(self, kind):
        target = last_step(self.run_dir) + self.rng.randint(1, self.every)
        seen = {path.name for path in self.run_dir.glob("checkpoints/step-*")}
        while not self.over.is_set():
            time.sleep(0.001 if kind.startswith("save") else 0.02)
            if self.driver is None or self.driver.poll() is not None:
                continue
            pid = self.driver.pid
            if kind == "start":  # while the workers of the next attempt start
                victims = workers(pid)
            elif kind.startswith("save"):
                partial = list(self.run_dir.glob("checkpoints/.step-*.partial"))
                files = [file for each in partial for file in each.glob("shard-*") if file.stat().st_size]
                published = {path.name for path in self.run_dir.glob("checkpoints/step-*")} - seen
                now = {"save: folder": partial, "save: file": files, "save: published": published}[kind]
                victims = workers(pid) if now else []
            elif last_step(self.run_dir) < target:
                continue
            elif kind == "worker":
                victims = self.rng.sample(workers(pid), 1) if workers(pid) else []
            elif kind == "driver":
                victims = [pid]
            else:
                names = ("raylet/raylet", "gcs_server")
                victims = [
                    c for c, line in family(pid).items() if self.rng.choice(names) in line.split(" ")[0]
                ]
            if victims:
                step = last_step(self.run_dir)
                self.kill(*victims)
                self.done.append((kind, step))
                print(
                    f"{time.strftime('%H:%M:%S')} killed {kind} at step {step}", file=sys.stderr, flush=True
                )
                self._wait_for_training(step)
                return True
        return False

    def _wait_for_training(self, step):
        """Until a row is written by workers that were started after the kill."""
        file = self.run_dir / "starts.jsonl"
        before = file.read_text().count("\n") if file.exists() else 0
        while not self.over.is_set():
            if file.exists() and file.read_text().count("\n") > before and workers_train(self.run_dir):
                return
            time.sleep(0.05)


def workers_train(run_dir):
    """Whether a row is younger than the newest start."""
    try:
        row = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
        start = json.loads((run_dir / "starts.jsonl").read_text().splitlines()[-1])
        return row["time"] > start["time"]
    except (OSError, ValueError, IndexError):
        return False


def left_behind(shared_before):
    found = [f"/tmp/{path.name}" for path in Path("/tmp").glob(f"{MARK}*")]
    found += [str(path) for path in Path("/dev/shm").glob("*") if path.name not in shared_before]
    for each in psutil.process_iter(["cmdline"]):
        line = " ".join(each.info["cmdline"] or ())
        if MARK in line or "RayTrainWorker" in line:
            found.append(f"process {each.pid}: {line[:80]}")
    return found


def mlflow_steps(uri, run_id):
    from mlflow.tracking import MlflowClient

    return [point.step for point in MlflowClient(tracking_uri=uri).get_metric_history(run_id, "lr")]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=20, help="at most 20, unless --kinds are given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=12, help="steps between kills, at most")
    parser.add_argument("--kinds", nargs="*", choices=KINDS)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    folder = Path(tempfile.mkdtemp(prefix="soak-"))

    from lowbit_dist import data, tokenizer

    source = str(Path(json.__file__).parent)
    tokenizer.train([source], 512, folder / "tokenizer")
    data.prepare([source], folder / "tokenizer", folder / "data", seq_len=64, workers=1, val_fraction=0.1)
    steps = max(60, options.kills * options.every)
    base = {
        "model": {"hidden_size": 256, "intermediate_size": 512, "layers": 2, "heads": 4, "kv_heads": 2},
        "data": {"path": str(folder / "data"), "seq_len": 64},
        "precision": "fp32",
        "train": {
            "steps": steps, "batch_tokens": 1024, "micro_batch": 2, "reproducible": True, "log_every": 1,
            "eval_every": steps, "eval_samples": 4, "save_every": 5, "keep_last": 2,
        },
        "cluster": {"workers": 2, "max_failures": 1000},
    }  # fmt: skip
    shared = {path.name for path in Path("/dev/shm").glob("*")}
    uri = f"sqlite:///{folder}/mlflow.db"

    def configuration(name):
        return {**base, "run": {"name": name, "dir": str(folder)}, "tracking": {"mlflow": uri}}

    began = time.monotonic()
    calm = subprocess.run(command(configuration("calm"), folder), capture_output=True, text=True)
    assert calm.returncode == 0, calm.stderr
    calm_seconds = time.monotonic() - began
    expected = json.loads(calm.stdout)

    kinds = options.kinds or [kind for kind, n in zip(KINDS, WEIGHTS, strict=True) for _ in range(n)]
    plan = (kinds * options.kills)[: options.kills] if options.kinds else rng.sample(kinds, options.kills)
    rain = Rain(folder / "rain", plan, rng, options.every)
    thread = threading.Thread(target=rain.run, daemon=True)
    thread.start()
    began, launches = time.monotonic(), 0
    log = (folder / "log.txt").open("w")
    while True:
        launches += 1
        rain.driver = subprocess.Popen(
            command(configuration("rain"), folder), stdout=subprocess.PIPE, stderr=log, text=True
        )
        stdout, _ = rain.driver.communicate()
        if rain.driver.returncode == 0:
            break
        if launches > 3 * options.kills + 3:
            print(f"the run never ends; see {log.name}", file=sys.stderr)
            sys.exit(1)
    rain.over.set()
    thread.join()
    seconds = time.monotonic() - began
    found = json.loads(stdout)
    time.sleep(3)

    rows = [json.loads(line)["step"] for line in (folder / "rain" / "metrics.jsonl").read_text().splitlines()]
    logged = mlflow_steps(uri, found["mlflow_run_id"])
    report = {
        "kills": len(rain.done),
        "kinds": {kind: sum(each == kind for each, _ in rain.done) for kind in KINDS},
        "launches": launches,
        "restarts": found["restarts"],
        "same digest": found["digest"] == expected["digest"],
        "each step once in metrics.jsonl": rows == list(range(1, steps + 1)),
        "each step once in MLflow": sorted(logged) == list(range(1, steps + 1)),
        "left behind": left_behind(shared),
        "seconds, calm": round(calm_seconds),
        "seconds, rain": round(seconds),
        "folder": str(folder),
    }
    print(json.dumps(report, indent=1))
    good = (
        all(report[key] for key in report if key.startswith(("same", "each"))) and not report["left behind"]
    )
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
