"""Who reads a run's folder while it trains: MLflow, W&B, TensorBoard and Ray's metrics, fed by the launcher.

The folder is the record (`lowbit_dist.record`), and workers know of no reader.  A service gets each row once:
a server that is slow or down neither slows nor stops training, rows stay in the file and are sent later, and
those it never got are sent when the run is started again.
"""

from lowbit_dist.tracking.gauges import exported
from lowbit_dist.tracking.identity import RUN_ID, noted_run_id
from lowbit_dist.tracking.parent import Parent
from lowbit_dist.tracking.stores import resolve, without_password
from lowbit_dist.tracking.tracker import Tracker, catch_up, check

__all__ = [
    "RUN_ID",
    "Parent",
    "Tracker",
    "catch_up",
    "check",
    "exported",
    "noted_run_id",
    "resolve",
    "without_password",
]
