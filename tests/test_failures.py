"""What a failed attempt is said to have failed of."""

import pytest
from test_cluster import Told

from lowbit_dist import cluster, configfile, heartbeat
from lowbit_dist.cluster import attempts, failures

SHORT = (
    "The actor died unexpectedly before finishing this task. Task was killed due to the node running low "
    "on memory. Memory on the node (IP: 10.0.0.1) where the task was running was 15.27GB / 15.91GB (0.96), "
    "which exceeds the memory usage threshold of 0.95. Ray killed this worker because ..."
)
GONE = "Worker exit type: SYSTEM_ERROR Worker exit detail: Worker unexpectedly exits. End of file."


@pytest.mark.parametrize(
    ("text", "kernel", "expected", "final_error"),
    [
        (SHORT, None, "worker 1 was killed for lack of memory by Ray (15.27GB / 15.91GB were used); free "
         "memory there, write a smaller train.micro_batch", "killed for lack of memory"),
        (GONE, "by the kernel of host7", "worker 1 was killed for lack of memory by the kernel of host7; "
         "free memory there, write a smaller train.micro_batch", "killed for lack of memory"),
        (GONE, None, "worker 1 died (Worker unexpectedly exits)", None),
    ],
    ids=["ray", "kernel", "neither"],
)  # fmt: skip
def test_a_worker_that_was_killed_for_lack_of_memory_is_said_to_be(text, kernel, expected, final_error):
    from ray.exceptions import OutOfMemoryError
    from ray.train import WorkerGroupError

    lost = RuntimeError("[gloo] Connection closed by peer")
    error = WorkerGroupError("", {0: lost, 1: OutOfMemoryError(text)})
    failure = failures.failure(error, lambda: kernel)
    assert failure.text.startswith(expected)
    assert failure.error == final_error  # twice at the same checkpoint ends the run
    assert not failure.is_final


def test_a_worker_that_fails_by_itself_is_not_asked_about():
    from ray.train import WorkerGroupError

    def asked():
        raise AssertionError

    failure = failures.failure(WorkerGroupError("", {0: ValueError("wrong shape")}), asked)
    assert failure.text == "worker 0: ValueError: wrong shape"


@pytest.mark.integration
def test_a_ray_that_cannot_be_joined_is_tried_twice_and_said(small, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "nonsense")  # which `check` refuses
    config, told = configfile.from_dict(small()), Told()
    config.run_dir.mkdir()
    with pytest.raises(cluster.RunFailed) as error:
        attempts.train_until_done(config, told)
    assert str(error.value).startswith("Ray cannot be joined (ValueError: ")
    assert "nonsense) after 1 restart; see " in str(error.value)
    assert heartbeat.count_starts(config.run_dir) == 2
