"""A run as Ray metrics: gauges that Prometheus reads at the metrics port of Ray's nodes.

They are read from the run's folder, as everything that tells of a run is: its rows, its layers, its workers'
heartbeats, its newest checkpoint.  A thread of the process that talks to Ray hands all of them to Ray every
few seconds, since Ray forgets a gauge that was not set for two of its report intervals (10 s each), and the
age of a checkpoint grows between steps.  `launch/monitoring` draws these names.
"""

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

from lowbit_dist import heartbeat
from lowbit_dist.config import RunConfig
from lowbit_dist.record import LAYERS, METRICS, Tail, layer_name
from lowbit_dist.runs import BASELINES, content, newest_checkpoint

# Name -> its meaning, and its tags besides `run`; Ray exports it as ray_NAME.
GAUGES: dict[str, tuple[str, tuple[str, ...]]] = {
    # of the run
    "lowbit_step": ("The newest step", ()),
    "lowbit_steps": ("Steps of the whole run", ()),
    "lowbit_tokens": ("Tokens trained on", ()),
    "lowbit_loss": ("Training loss in nats per token, the mean since the last log step", ()),
    "lowbit_val_loss": ("Validation loss in nats per token, the newest", ()),
    "lowbit_learning_rate": ("Learning rate", ()),
    "lowbit_grad_norm": ("Norm of the mean gradient, before clipping", ()),
    "lowbit_tokens_per_second": ("Tokens per second of all workers, since the last log step", ()),
    "lowbit_tokens_per_second_per_worker": ("The same of each worker", ()),
    "lowbit_mfu": ("Share of a GPU's peak in bf16 that its tokens are worth (MFU); none on CPUs", ()),
    "lowbit_flip_rate": ("Share of all low-bit weights that change in a step", ()),
    "lowbit_layer_flip_rate": ("The same of one layer, in the newest log step", ("layer",)),
    "lowbit_skipped_steps": ("Steps left out because of their loss or gradient", ()),
    "lowbit_rollbacks": ("Returns to a checkpoint after a loss spike", ()),
    "lowbit_restarts": ("Starts of the workers after a failure, or for other workers to resume", ()),
    "lowbit_resumes": ("Starts of the run by its user after it had stopped, from a checkpoint", ()),
    "lowbit_workers": ("Workers that train", ()),
    "lowbit_checkpoint_step": ("Step of the newest checkpoint", ()),
    "lowbit_checkpoint_timestamp_seconds": ("When the newest checkpoint was published, in Unix time", ()),
    "lowbit_checkpoint_age_seconds": ("Seconds since the newest checkpoint was published", ()),
    "lowbit_baseline_bytes": (
        "Planned bytes of a baseline on each worker, between steps", ("baseline", "component"),
    ),
    # of each worker
    "lowbit_memory_bytes": ("Measured bytes of one component on one worker", ("rank", "component")),
    "lowbit_worker_step": ("The newest step of one worker", ("rank", "host")),
    "lowbit_worker_step_seconds": ("Median seconds of the newest steps of one worker", ("rank", "host")),
}  # fmt: skip

# A row of `metrics.jsonl` -> the gauges of its numbers.
ROW = {
    "tokens": "lowbit_tokens",
    "loss": "lowbit_loss",
    "val_loss": "lowbit_val_loss",
    "lr": "lowbit_learning_rate",
    "grad_norm": "lowbit_grad_norm",
    "tokens_per_second": "lowbit_tokens_per_second",
    "tokens_per_second_per_worker": "lowbit_tokens_per_second_per_worker",
    "mfu": "lowbit_mfu",
    "flip_rate": "lowbit_flip_rate",
    "skipped_steps": "lowbit_skipped_steps",
    "rollbacks": "lowbit_rollbacks",
}
BASELINE_NAMES = {
    "plan_dense": "AdamW fp32",
    "plan_dense_same_states": "dense, same states",
    "plan_bitnet": "BitNet STE",
}
SECONDS = 3.0  # between two times that everything is handed to Ray

Values = dict[tuple[str, tuple[str, ...]], float]  # name, values of its tags -> value


class Gauges:
    """The newest values of a run, as its folder has them."""

    def __init__(self, config: RunConfig):
        self.config, self.folder = config, config.run_dir
        self._metrics, self._layers = Tail(self.folder / METRICS), Tail(self.folder / LAYERS)
        self._of_rows: Values = {}  # what the rows have told so far

    def read(self) -> Values:
        start = heartbeat.newest_start(self.folder)
        values: Values = {
            ("lowbit_steps", ()): self.config.train.steps, ("lowbit_restarts", ()): start.restarts,
            ("lowbit_resumes", ()): start.resumes,
        }  # fmt: skip
        for row in self._metrics.rows():
            self._of_rows |= {(ROW[key], ()): float(x) for key, x in row.items() if key in ROW}
        if (newest := self._layers.newest()) is not None:
            for name, numbers in newest["layers"].items():
                if "flip_rate" in numbers:
                    self._of_rows["lowbit_layer_flip_rate", (layer_name(name),)] = numbers["flip_rate"]
        return values | self._of_rows | self._of_workers() | self._of_baselines() | self._of_checkpoint()

    def _of_workers(self) -> Values:
        values: Values = {}
        workers = heartbeat.newest(self.folder)
        if workers:
            values["lowbit_workers", ()] = len(workers)
            values["lowbit_step", ()] = max(worker["step"] for worker in workers)
        for worker in workers:
            rank, tags = str(worker["rank"]), (str(worker["rank"]), worker["host"])
            values["lowbit_worker_step", tags] = worker["step"]
            if worker["step_seconds"] is not None:
                values["lowbit_worker_step_seconds", tags] = worker["step_seconds"]
            for component, n_bytes in worker["memory"].items():
                values["lowbit_memory_bytes", (rank, component)] = n_bytes
        return values

    def _of_baselines(self) -> Values:
        plans = content(self.folder / BASELINES)
        return {
            ("lowbit_baseline_bytes", (name, component)): part["bytes"]
            for plan, name in BASELINE_NAMES.items()
            if plan in plans
            for component, part in plans[plan]["components"].items()
            if part["bytes"] is not None
        }

    def _of_checkpoint(self) -> Values:
        if (newest := newest_checkpoint(self.folder)) is None:
            return {}
        step, published = newest
        return {
            ("lowbit_checkpoint_step", ()): step,
            ("lowbit_checkpoint_timestamp_seconds", ()): published,
            ("lowbit_checkpoint_age_seconds", ()): max(0.0, time.time() - published),
        }


@contextlib.contextmanager
def exported(config: RunConfig) -> Iterator[None]:
    """Inside, in a process of Ray, the run's gauges are handed to Ray; afterwards Ray soon forgets them."""
    is_over = threading.Event()
    thread = threading.Thread(target=_export, args=(Gauges(config), is_over), name="gauges", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join(timeout=SECONDS)


def _export(gauges: Gauges, is_over: threading.Event) -> None:
    from ray.util.metrics import Gauge

    known: dict[str, Any] = {}  # name -> Ray's gauge
    is_well = True
    while not is_over.wait(SECONDS):
        try:
            for (name, tags), value in gauges.read().items():
                meaning, keys = GAUGES[name]
                if name not in known:
                    known[name] = Gauge(name, description=meaning, tag_keys=("run", *keys))
                pairs = zip(keys, tags, strict=True)
                known[name].set(value, tags={"run": gauges.config.run.name, **dict(pairs)})
            is_well = True
        except Exception as error:  # whatever happens to the metrics, training continues
            if is_well:
                why = f"{type(error).__name__}: {error}"
                # As the run's log has its lines, which the launcher shows.
                print(
                    time.strftime("%H:%M:%S"), f"Ray takes no metrics ({why}); training continues", flush=True
                )
            is_well = False
