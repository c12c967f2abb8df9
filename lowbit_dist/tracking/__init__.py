"""Where a run's numbers go: `metrics.jsonl` in its folder at once, MLflow from a thread of its own.

The file is the record.  MLflow gets each row of it once: a server that is slow or down neither slows nor
stops training, rows wait and are sent later, and those it never got are sent when the run is resumed.
A full disk stops training no more than that: rows wait in memory until there is room.  Ray gets the newest
values from another thread (`gauges`).
"""

from lowbit_dist.tracking.gauges import Gauges
from lowbit_dist.tracking.mlflow_run import RUN_ID, noted_run_id
from lowbit_dist.tracking.parent import Parent
from lowbit_dist.tracking.record import METRICS
from lowbit_dist.tracking.stores import check, resolve, without_password
from lowbit_dist.tracking.tracker import Tracker, bytes_per_parameter, catch_up, end

__all__ = [
    "METRICS",
    "RUN_ID",
    "Gauges",
    "Parent",
    "Tracker",
    "bytes_per_parameter",
    "catch_up",
    "check",
    "end",
    "noted_run_id",
    "resolve",
    "without_password",
]
