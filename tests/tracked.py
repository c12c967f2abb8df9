"""A run that is not trained: worker 0's pen and the launcher's tracker, which reads what the pen writes."""

import time

from lowbit_dist import configfile, tracking
from lowbit_dist.record import METRICS, Record


def part(**bytes_of):
    names = ("low_bit_weights", "scales", "other_weights", "gradients", "optimizer_states", "buffers")
    sizes = {name: bytes_of.get(name, 0) for name in names}
    return {
        "resident_bytes_per_worker": sum(sizes.values()),
        "components": {name: {"bytes": n_bytes} for name, n_bytes in sizes.items()},
        "workers": 2,
        "parameters": {"total": 100},
    }


SUMMARY = {
    "digest": "abc",
    "memory": part(low_bit_weights=12, optimizer_states=100)
    | {"plan_dense": part(other_weights=200), "plan_bitnet": part(other_weights=300)},
}


def configuration(uri, folder, name, **sections):
    """Of a run in `folder`, which is there."""
    made = configfile.from_dict(
        {
            "run": {"name": name, "dir": str(folder)},
            "method": {"name": "dqt"},
            "data": {"path": "data"},
            "tracking": {"mlflow": uri, "experiment": "tests"},
            **sections,
        }
    )
    made.run_dir.mkdir(parents=True, exist_ok=True)
    (made.run_dir / "config.yaml").write_text(made.to_yaml())
    return made


def client(store):
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{store}")


def steps(store, run_id, key="train/loss"):
    return sorted(point.step for point in client(store).get_metric_history(run_id, key))


def wait(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


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
        mlflow = self.tracker.mlflow
        return None if mlflow is None else mlflow.run_id

    @property
    def failed(self):
        return self.tracker.mlflow.problem is not None

    def began(self, seconds=60):
        """The number of the MLflow run, once there is one: after the first row."""
        deadline = time.monotonic() + seconds
        while self.run_id is None or self.tracker.mlflow.client is None:
            assert time.monotonic() < deadline, "the MLflow run never began"
            time.sleep(0.05)
        return self.run_id

    def close(self):
        """The worker has gone, and so has the launcher: nothing ends what services have."""
        self.record.close()
        for feeder in filter(None, (self.tracker.mlflow, *self.tracker.others)):
            feeder.close()

    def finish(self, status, summary=None):
        self.record.close()
        self.tracker.finish(status, summary)

    @property
    def file(self):
        return self.folder / METRICS
