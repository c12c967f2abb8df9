"""What an MLflow server that goes away for a minute costs: one run with many outages.

    python tests/outage.py --steps 1500 --how stop

Each outage is compared with the calm minutes right before and after it, by the clock of metrics.jsonl: `away`
is the minute without an answer (the server is stopped, so that it takes connections and never answers, or
it is killed), `start` the time that a killed one needs until it answers again, `back` the half-minute in
which it gets the rows that waited, `whole` all of them.

A shared machine's processors may be a third slower in one minute than in the next, more than an outage costs.
So a piece of work that is always the same is done on each of them four times a second, and its processor time
is the unit of time in which steps are counted; the speeds by the clock are reported beside it.

Exit code 1 if MLflow does not have each row once in the end, the run is not FINISHED, or `whole` is on
average more than 5 % slower than the calm minutes.
"""

import argparse
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from mlflow_server import Server
from soak import prepared, written

from lowbit_dist.record import METRICS, rows_of

AWAY, BACK, CALM = 60.0, 30.0, 60.0  # seconds
LEAST = 0.95
KEYS = ("train/lr", "train/loss", "speed/tokens_per_second")


def training(folder, uri, steps):
    """Start the run."""
    configuration = {
        "run": {"name": "outage", "dir": str(folder)},
        "model": {"preset": "tiny"},
        "data": {"path": str(folder / "data"), "seq_len": 64},
        "train": {
            "steps": steps, "batch_tokens": 4096, "micro_batch": 32, "log_every": 1, "eval_every": steps,
            "eval_samples": 4, "save_every": steps,
        },
        "cluster": {"workers": 2},
        "tracking": {"mlflow": uri},
    }  # fmt: skip
    command = [sys.executable, "-m", "lowbit_dist", "train", written(configuration, folder), "--json"]
    with (folder / "outage.json").open("w") as summary, (folder / "outage.txt").open("w") as log:
        return subprocess.Popen(command, stdout=summary, stderr=log, start_new_session=True)


def times_of(folder):
    """When each step of the run ended."""
    return [row["time"] for row in rows_of(folder / "outage" / METRICS)]


class Pace(threading.Thread):
    """How fast the processors are from moment to moment."""

    def __init__(self):
        super().__init__(daemon=True)
        self.samples = []  # (moment, seconds that the work took)

    def run(self):
        torch.set_num_threads(1)
        matrix, vector = torch.randn(192, 192), torch.randn(2_000_000)
        processors = sorted(os.sched_getaffinity(0))
        while True:
            for each in processors:
                os.sched_setaffinity(0, {each})  # of this thread
                began = time.thread_time()
                for _ in range(6):
                    matrix @ matrix
                vector.sum()
                self.samples.append((time.time(), time.thread_time() - began))
            time.sleep(0.25)

    def mean(self, since, until):
        """Seconds that the work took on average between two moments."""
        return statistics.mean(seconds for moment, seconds in self.samples if since <= moment < until)


def outage(server, how):
    """Take the server away and bring it back; the moments at which each stretch ended, by its name."""
    ends = {}
    server.signal(signal.SIGSTOP if how == "stop" else signal.SIGKILL)
    time.sleep(AWAY)
    ends["away"] = time.time()
    if how == "stop":
        server.signal(signal.SIGCONT)
    else:
        server.start()
        ends["start"] = time.time()
    time.sleep(BACK)
    ends["back"] = time.time()
    return ends


def watched(folder, server, train, options):
    """Calm stretches, as moments of their beginning and end, and between them the outages."""
    while train.poll() is None and len(times_of(folder)) < 20:
        time.sleep(0.5)  # the first steps are slower
    stretches = []
    while True:
        since = time.time()
        time.sleep(CALM)
        if train.poll() is not None:
            return stretches  # the last outage has no calm minute after it, and does not count
        stretches.append((since, time.time()))
        times = times_of(folder)
        left = (options.steps - len(times)) * (times[-1] - times[19]) / (len(times) - 20)
        if left < 1.2 * (AWAY + BACK + CALM) + (60 if options.how == "kill" else 0):
            return stretches
        print(
            f"{time.strftime('%H:%M:%S')} outage {len(stretches) // 2 + 1} at step {len(times)}", flush=True
        )
        stretches.append(outage(server, options.how))


def speed(times, since, until):
    """Steps per second between two moments; `times`: when each step ended."""

    def progress(moment):
        i = next(i for i, at in enumerate(times) if at >= moment)
        return i - (times[i] - moment) / (times[i] - times[i - 1])

    return (progress(until) - progress(since)) / (until - since)


def costs(speed, stretches):
    """Each outage's stretches, their speeds as shares of that of the calm minutes around it, by name."""
    found = {}
    for (calm_since, began), ends, (over, calm_until) in zip(
        stretches[::2], stretches[1::2], stretches[2::2], strict=False
    ):
        calm = (speed(calm_since, began) + speed(over, calm_until)) / 2
        for (_, since), (name, until) in itertools.pairwise([("", began), *ends.items()]):
            found.setdefault(name, []).append(speed(since, until) / calm)
        found.setdefault("whole", []).append(speed(began, over) / calm)
    return found


def summary_of(shares):
    found = {"mean": round(statistics.mean(shares), 4), "each": [round(share, 3) for share in shares]}
    if len(shares) > 1:
        found["standard error"] = round(statistics.stdev(shares) / len(shares) ** 0.5, 4)
    return found


def report_of(folder, server, pace, stretches, options):
    from mlflow.tracking import MlflowClient

    run_id = json.loads((folder / "outage.json").read_text())["mlflow_run_id"]
    every = list(range(1, options.steps + 1))
    times = times_of(folder)

    def by_clock(since, until):
        return speed(times, since, until)

    def by_work(since, until):
        return speed(times, since, until) * pace.mean(since, until)

    found = costs(by_work, stretches)
    return {
        "how": options.how,
        "outages": len(found["whole"]),
        "calm steps per second": [round(by_clock(*stretch), 3) for stretch in stretches[::2]],
        "calm steps per unit of work": [round(by_work(*stretch), 6) for stretch in stretches[::2]],
        "share of the calm speed": {name: summary_of(each) for name, each in found.items()},
        "by the clock": {name: summary_of(each) for name, each in costs(by_clock, stretches).items()},
        "each step once in MLflow": all(sorted(server.steps(run_id, key)) == every for key in KEYS),
        "status": MlflowClient(server.uri).get_run(run_id).info.status,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=1500, help="as many outages as fit into them")
    parser.add_argument("--how", choices=("stop", "kill"), default="stop")
    parser.add_argument("--folder", type=Path, help="where its data are, or are made")
    options = parser.parse_args()
    folder = (options.folder or Path(tempfile.mkdtemp(prefix="outage-"))).absolute()
    print(f"in {folder}", flush=True)
    if not (folder / "data").exists():
        prepared(folder, "stdlib", 2048)
    server = Server(folder, under=("nice", "-n", "19"))
    server.start()
    pace = Pace()
    pace.start()
    train = training(folder, server.uri, options.steps)
    try:
        stretches = watched(folder, server, train, options)
        if train.wait():
            sys.exit(f"the run failed; see {folder}/outage.txt")
        if len(stretches) < 3:
            sys.exit(f"{options.steps} steps are too few for one outage and its calm minutes; give it more")
        report = report_of(folder, server, pace, stretches, options)
    finally:
        train.send_signal(signal.SIGTERM)
        train.wait()
        server.signal(signal.SIGKILL)
    print(json.dumps(report, indent=1))
    whole = report["share of the calm speed"]["whole"]["mean"]
    if not report["each step once in MLflow"] or report["status"] != "FINISHED" or whole < LEAST:
        sys.exit(1)


if __name__ == "__main__":
    main()
