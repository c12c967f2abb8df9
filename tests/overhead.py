"""What Ray, Streaming and MLflow cost: a launched run, in turns with the bare engine.

    python tests/overhead.py --steps 100 --turns 3

The run is launched by Ray, reads its tokens by Streaming and is recorded by MLflow; in each turn it goes on
for so many steps more. The bare engine makes as many steps with the same options in as many processes, of
tokens that lie in memory, and does nothing else. Between the two, the training loop makes them without Ray
and MLflow, of the tokens that Streaming reads, so that one sees whose the difference is. The first tenth of
a turn does not count: it has the first allocations.

Exit code 1 if the run takes more than 2 % longer than the engine, on average.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ranks import Ranks, start_server
from soak import prepared, written

from lowbit_dist.record import METRICS, rows_of

MOST = 1.02
VOCABULARY, SEQ_LEN = 2048, 256


def configuration(folder, preset, workers, steps):
    return {
        "run": {"name": "launched", "dir": str(folder)},
        "model": {"preset": preset},
        "data": {"path": str(folder / "data"), "seq_len": SEQ_LEN},
        "schedule": {"name": "constant", "warmup_steps": 10},
        "train": {
            "steps": steps, "batch_tokens": 8 * workers * SEQ_LEN, "micro_batch": 8, "log_every": steps // 10,
            "eval_every": steps, "eval_samples": 4, "save_every": steps,
        },
        "cluster": {"workers": workers},
        "tracking": {"mlflow": f"sqlite:///{folder}/mlflow.db"},
    }  # fmt: skip


def launched(content, folder, turn, steps):
    """Seconds of a step."""
    every = content["train"]["log_every"]
    content["train"] |= {"steps": turn * steps, "eval_every": turn * steps, "save_every": turn * steps}
    command = [sys.executable, "-m", "lowbit_dist", "train", written(content, folder), "--json"]
    with (folder / "launched.txt").open("a") as log:
        subprocess.run(command, stdout=log, stderr=log, check=True)
    return between_rows(folder / "launched", (turn - 1) * steps + every, turn * steps - every)


def between_rows(folder, first, last):
    """Seconds of a step.  A turn's last row waits for the evaluation of its step, and is not asked for."""
    rows = {row["step"]: row for row in rows_of(folder / METRICS)}
    return (rows[last]["time"] - rows[first]["time"]) / (last - first)


def looped(content, folder):
    """Seconds of a step of the loop alone, in the processes of its workers."""
    from lowbit_dist import configfile, loop

    train = content["train"]
    loop.run(configfile.from_dict(content | {"run": {"name": "looped", "dir": folder}}))
    return between_rows(Path(folder) / "looped", train["log_every"], train["steps"] - train["log_every"])


def bare(content, steps):
    """Seconds of a step."""
    import torch.distributed as dist

    from lowbit_dist import bench_training, configfile

    step = bench_training.step_of(configfile.from_dict(content), "cpu", VOCABULARY)
    for _ in range(steps // 10):
        step()
    dist.barrier()
    began, n = time.perf_counter(), steps - steps // 10
    for _ in range(n):
        step()
    dist.barrier()
    return (time.perf_counter() - began) / n


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=100, help="of each turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--preset", default="13m")
    parser.add_argument("--workers", type=int, default=2, help="as many as processors: Ray shares them")
    parser.add_argument("--folder", type=Path, help="where its data are, or are made")
    options = parser.parse_args()
    folder = (options.folder or Path(tempfile.mkdtemp(prefix="overhead-"))).absolute()
    print(f"in {folder}", flush=True)
    if not (folder / "data").exists():
        prepared(folder, "stdlib", VOCABULARY, seq_len=SEQ_LEN)
    content = configuration(folder, options.preset, options.workers, options.steps)
    start_server()
    ratios = []
    for turn in range(1, options.turns + 1):
        of_run = launched(content, folder, turn, options.steps)
        with tempfile.TemporaryDirectory() as store:
            ranks = Ranks(options.workers, f"{store}/file")
            of_engine = max(ranks.run(bare, content, options.steps))
            once = configuration(folder, options.preset, options.workers, options.steps)
            of_loop = max(ranks.run(looped, once, store))
            ranks.close()
        ratios.append(of_run / of_engine)
        print(
            f"turn {turn}: {1000 * of_run:.1f} ms a step, {1000 * of_loop:.1f} of the loop alone, "
            f"{1000 * of_engine:.1f} of the bare engine, {ratios[-1]:.4f}",
            flush=True,
        )
    mean = statistics.mean(ratios)
    spread = statistics.stdev(ratios) / len(ratios) ** 0.5 if len(ratios) > 1 else float("nan")
    print(json.dumps({"ratio": round(mean, 4), "standard error": round(spread, 4), "each": ratios}))
    if mean > MOST:
        sys.exit(1)


if __name__ == "__main__":
    main()
