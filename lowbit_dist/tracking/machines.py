"""How busy a run's machines are: MLflow's system metrics of each host, from its workers' heartbeats.

MLflow's own monitor sees the launcher's machine alone, which may train nothing.
"""

import os
import time
from pathlib import Path
from typing import Any

from lowbit_dist import heartbeat

EVERY = 10.0  # seconds between two looks, as MLflow's own monitor has them
SWITCH = "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING"  # MLflow's own; unset, they are on


class Machines:
    """The machines that train a run."""

    def __init__(self, run_dir: Path):
        self._run_dir = run_dir
        self._looked = float("inf") if os.environ.get(SWITCH, "").lower() in ("false", "0") else 0.0
        self._newest: dict[str, float] = {}  # host -> when it was measured, in Unix time

    @property
    def are_due(self) -> bool:
        return time.monotonic() > self._looked + EVERY

    def metrics(self) -> list[Any]:
        """What is new, as `system/HOST/NAME`; the step is where a worker of the host was."""
        from mlflow.entities import Metric

        self._looked, points = time.monotonic(), []
        for host, worker in {worker["host"]: worker for worker in heartbeat.newest(self._run_dir)}.items():
            at, step, numbers = worker["time"], worker["step"], worker.get("machine", {})
            if at > self._newest.get(host, 0.0):
                points += [
                    Metric(f"system/{host}/{key}", x, int(at * 1000), step) for key, x in numbers.items()
                ]
                self._newest[host] = at
        return points
