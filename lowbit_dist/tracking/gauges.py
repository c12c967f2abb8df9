"""A run as Ray metrics: gauges that Prometheus reads at the metrics port of each of Ray's nodes.

Training only notes values; a thread hands them to Ray, all of them every few seconds.  Ray forgets a gauge
that was not set for two of its report intervals (10 s each), and the age of a checkpoint grows between steps.
In a process without Ray, nothing is handed on.  `launch/monitoring` draws these names.
"""

import logging
import socket
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from lowbit_dist.config import RunConfig

# Name -> its meaning, and its tags besides `run`; Ray exports it as ray_NAME.
GAUGES: dict[str, tuple[str, tuple[str, ...]]] = {
    # of the run, from worker 0
    "lowbit_step": ("The newest step", ()),
    "lowbit_steps": ("Steps of the whole run", ()),
    "lowbit_tokens": ("Tokens trained on", ()),
    "lowbit_loss": ("Training loss in nats per token, the mean since the last log step", ()),
    "lowbit_val_loss": ("Validation loss in nats per token, the newest", ()),
    "lowbit_learning_rate": ("Learning rate", ()),
    "lowbit_grad_norm": ("Norm of the mean gradient, before clipping", ()),
    "lowbit_tokens_per_second": ("Tokens per second of all workers, since the last log step", ()),
    "lowbit_flip_rate": ("Share of all low-bit weights that change in a step", ()),
    "lowbit_layer_flip_rate": ("The same of one layer, in the newest log step", ("layer",)),
    "lowbit_skipped_steps": ("Steps left out because of their loss or gradient", ()),
    "lowbit_rollbacks": ("Returns to a checkpoint after a loss spike", ()),
    "lowbit_restarts": ("How often the run was started before", ()),
    "lowbit_workers": ("Workers that train", ()),
    "lowbit_checkpoint_step": ("Step of the newest checkpoint", ()),
    "lowbit_checkpoint_timestamp_seconds": ("When the newest checkpoint was published, in Unix time", ()),
    "lowbit_checkpoint_age_seconds": ("Seconds since the newest checkpoint was published", ()),
    "lowbit_baseline_bytes": (
        "Planned bytes of a baseline on each worker, between steps", ("baseline", "component"),
    ),
    # from every worker
    "lowbit_memory_bytes": ("Measured bytes of one component on one worker", ("rank", "component")),
    "lowbit_worker_step": ("The newest step of one worker", ("rank", "host")),
    "lowbit_worker_step_seconds": ("Seconds that the newest step took on one worker", ("rank", "host")),
}  # fmt: skip

# A row of `metrics.jsonl` -> the gauges of its numbers.
ROW = {
    "tokens": "lowbit_tokens",
    "loss": "lowbit_loss",
    "val_loss": "lowbit_val_loss",
    "lr": "lowbit_learning_rate",
    "grad_norm": "lowbit_grad_norm",
    "tokens_per_second": "lowbit_tokens_per_second",
    "flip_rate": "lowbit_flip_rate",
    "skipped_steps": "lowbit_skipped_steps",
    "rollbacks": "lowbit_rollbacks",
}
SECONDS = 3.0  # between two times that everything is handed to Ray
log = logging.getLogger(__name__)


class Gauges:
    """The newest values of one worker."""

    def __init__(self, config: RunConfig, *, rank: int, world: int, restarts: int):
        self.run, self.rank = config.run.name, rank
        self.latest = config.run_dir / "latest"
        self.worker = {"rank": str(rank), "host": socket.gethostname()}
        self._values: dict[tuple[str, tuple[str, ...]], float] = {}
        self._exported: dict[str, Any] = {}  # name -> Ray's gauge
        self._ends = threading.Event()
        self._thread: threading.Thread | None = None
        if rank == 0:
            self.set("lowbit_steps", config.train.steps)
            self.set("lowbit_workers", world)
            self.set("lowbit_restarts", restarts)
        if (ray := sys.modules.get("ray")) is not None and ray.is_initialized():
            self._thread = threading.Thread(target=self._hand_on_until_closed, name="gauges", daemon=True)
            self._thread.start()

    def set(self, name: str, value: float | None, **tags: str) -> None:
        """The newest value of a gauge; None leaves it as it is."""
        if value is not None:
            self._values[name, tuple(tags[key] for key in GAUGES[name][1])] = float(value)

    def stepped(self, step: int, seconds: float) -> None:
        self.set("lowbit_worker_step", step, **self.worker)
        self.set("lowbit_worker_step_seconds", seconds, **self.worker)
        if self.rank == 0:
            self.set("lowbit_step", step)

    def log(self, row: Mapping[str, float | None]) -> None:
        """The numbers of a log step, which are the same on all workers: worker 0 tells them."""
        for key, name in ROW.items():
            if self.rank == 0:
                self.set(name, row.get(key))

    def layers(self, flip_rates: Mapping[str, float]) -> None:
        """By the name of each low-bit parameter."""
        for name, rate in flip_rates.items():
            if self.rank == 0:
                layer = name.removeprefix("model.").removesuffix(".weight")
                self.set("lowbit_layer_flip_rate", rate, layer=layer)

    def memory(self, report: Mapping[str, Any]) -> None:
        """This worker's, as `memory.measure` reports it."""
        for component, part in report["components"].items():
            self.set("lowbit_memory_bytes", part["bytes"], rank=self.worker["rank"], component=component)

    def baseline(self, name: str, report: Mapping[str, Any]) -> None:
        for component, part in report["components"].items():
            self.set("lowbit_baseline_bytes", part["bytes"], baseline=name, component=component)

    def close(self) -> None:
        """Some seconds later, Ray forgets the values."""
        self._ends.set()
        if self._thread is not None:
            self._thread.join(timeout=SECONDS)

    def _hand_on_until_closed(self) -> None:
        is_well = True
        while not self._ends.wait(SECONDS):
            try:
                self._hand_on()
                is_well = True
            except Exception as error:  # whatever happens to the metrics, training goes on
                if is_well:
                    log.warning(
                        "Ray takes no metrics (%s: %s); training goes on", type(error).__name__, error
                    )
                is_well = False

    def _hand_on(self) -> None:
        from ray.util.metrics import Gauge

        if self.rank == 0:
            self._look_at_checkpoint()
        for (name, values), value in self._values.copy().items():
            meaning, tags = GAUGES[name]
            if name not in self._exported:
                self._exported[name] = Gauge(name, description=meaning, tag_keys=("run", *tags))
            self._exported[name].set(value, tags={"run": self.run, **dict(zip(tags, values, strict=True))})

    def _look_at_checkpoint(self) -> None:
        """The file `latest` names the newest one, and is as old as that is."""
        try:
            published = self.latest.stat().st_mtime
            step = int(self.latest.read_text().removeprefix("step-"))
        except (OSError, ValueError):  # there is none yet, or a shared file system is away
            return
        self.set("lowbit_checkpoint_step", step)
        self.set("lowbit_checkpoint_timestamp_seconds", published)
        self.set("lowbit_checkpoint_age_seconds", max(0.0, time.time() - published))
