"""What an MLflow server that goes away for a minute costs, in a run beside a twin without MLflow.

    sysctl kernel.sched_autogroup_enabled=1      # as root: each run has the same share of the processors
    python tests/outage.py --steps 900 --how stop

The speed of a machine drifts by more than an outage costs.  So two runs share all processors, one with the
server and one without, and a speed is the first one's in steps of the second: what befalls the machine, or
what the server itself takes (it would be another machine's), falls on both.  Each outage is compared with the
calm minutes right before and after it, by the clocks of metrics.jsonl: `away` is the minute without an answer
(the server is stopped, so that it takes connections and never answers, or it is killed), `start` the time
that a killed one needs until it answers again, `back` the half-minute in which it gets the rows that waited,
`whole` all of them.

Exit code 1 if MLflow does not have each row once in the end, the run is not FINISHED, or `whole` is on
average more than 5 % slower than the calm minutes.
"""

import argparse
import itertools
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mlflow_server import Server
from soak import prepared, written

from lowbit_dist.tracking.record import METRICS, rows_of

AWAY, BACK, CALM = 60.0, 30.0, 60.0  # seconds
LEAST = 0.95
KEYS = ("lr", "loss", "tokens_per_second")


def training(folder, name, uri, steps):
    """Start a run."""
    configuration = {
        "run": {"name": name, "dir": str(folder)},
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
    with (folder / f"{name}.json").open("w") as summary, (folder / f"{name}.txt").open("w") as log:
        return subprocess.Popen(command, stdout=summary, stderr=log, start_new_session=True)


def times_of(folder, name):
    """When each step of a run ended."""
    return [row["time"] for row in rows_of(folder / name / METRICS)]


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
    while train.poll() is None and min(len(times_of(folder, name)) for name in ("outage", "twin")) < 20:
        time.sleep(0.5)  # the first steps are slower
    stretches = []
    while True:
        since = time.time()
        time.sleep(CALM)
        if train.poll() is not None:
            return stretches  # the last outage has no calm minute after it, and does not count
        stretches.append((since, time.time()))
        times = times_of(folder, "outage")
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


def report_of(folder, server, stretches, options):
    from mlflow.tracking import MlflowClient

    run_id = json.loads((folder / "outage.json").read_text())["mlflow_run_id"]
    every = list(range(1, options.steps + 1))
    ours, twins = times_of(folder, "outage"), times_of(folder, "twin")

    def share(since, until):
        return speed(ours, since, until) / speed(twins, since, until)

    found = costs(share, stretches)
    return {
        "how": options.how,
        "outages": len(found["whole"]),
        "calm steps per second": [round(speed(ours, *stretch), 3) for stretch in stretches[::2]],
        "calm steps in steps of the twin": [round(share(*stretch), 3) for stretch in stretches[::2]],
        "speed, as a share of the calm minutes'": {name: summary_of(each) for name, each in found.items()},
        "each step once in MLflow": all(sorted(server.steps(run_id, key)) == every for key in KEYS),
        "status": MlflowClient(server.uri).get_run(run_id).info.status,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=900, help="as many outages as fit into them")
    parser.add_argument("--how", choices=("stop", "kill"), default="stop")
    parser.add_argument("--folder", type=Path, help="where its data are, or are made")
    options = parser.parse_args()
    folder = (options.folder or Path(tempfile.mkdtemp(prefix="outage-"))).absolute()
    print(f"in {folder}", flush=True)
    if not (folder / "data").exists():
        prepared(folder, "stdlib", 2048)
    server = Server(folder, under=("nice", "-n", "19"))
    server.start()
    train = training(folder, "outage", server.uri, options.steps)
    twin = training(folder, "twin", None, 2 * options.steps)  # it is ended with the other one
    try:
        stretches = watched(folder, server, train, options)
        if train.wait():
            sys.exit(f"the run failed; see {folder}/outage.txt")
        report = report_of(folder, server, stretches, options)
    finally:
        for each in (train, twin):
            each.send_signal(signal.SIGTERM)
            each.wait()
        server.signal(signal.SIGKILL)
    print(json.dumps(report, indent=1))
    whole = report["speed, as a share of the calm minutes'"]["whole"]["mean"]
    if not report["each step once in MLflow"] or report["status"] != "FINISHED" or whole < LEAST:
        sys.exit(1)


if __name__ == "__main__":
    main()
