"""A run that is not trained: worker 0's pen and the launcher's tracker, which reads what the pen writes."""

import time

from lowbit_dist import tracking
from lowbit_dist.record import METRICS, Record


class Tracked:
    """A start of a run after step `step`, in this process."""

    def __init__(self, config, step=0):
        self.config, self.folder = config, config.run_dir
        self.tracker = tracking.Tracker(config)
        self.record = Record(config.run_dir, step=step, writes=True)

    def log(self, step, metrics, layers=()):
        self.record.log(step, metrics, dict(layers))

    def rewind(self, step):
        self.record.rewind(step)

    @property
    def run_id(self):
        mlflow = self.tracker._mlflow
        return None if mlflow is None else mlflow.run_id

    @property
    def failed(self):
        return self.tracker._mlflow.failed

    def began(self, seconds=60):
        """The number of the MLflow run, once there is one: after the first row."""
        deadline = time.monotonic() + seconds
        while self.run_id is None or self.tracker._mlflow.client is None:
            assert time.monotonic() < deadline, "the MLflow run never began"
            time.sleep(0.05)
        return self.run_id

    def close(self):
        """The worker has gone, and so has the launcher: nothing ends the MLflow run."""
        self.record.close()
        if self.tracker._mlflow is not None:
            self.tracker._mlflow.close()

    def finish(self, status, summary=None):
        self.record.close()
        self.tracker.finish(status, summary)

    @property
    def file(self):
        return self.folder / METRICS
