"""What went wrong with a worker group, in one line."""

from lowbit_dist.cluster.driver import Failure
from lowbit_dist.config import ConfigError
from lowbit_dist.guard import Diverged


def failure(error: BaseException) -> Failure:
    """What went wrong first, in one line; a user's mistake is raised again as what it is."""
    from ray.train import WorkerGroupError

    if not isinstance(error, WorkerGroupError):
        cause = getattr(error, "controller_failure", error)
        return Failure(
            f"the workers could not be started, or Ray was lost ({last_line(cause)})", ray_failed=True
        )
    failures = sorted(error.worker_failures.items())
    for _, worker_error in failures:
        if isinstance(worker_error, ConfigError):
            raise ConfigError(str(worker_error))
    for _, worker_error in failures:
        if isinstance(worker_error, Diverged):
            return Failure(str(worker_error), str(worker_error), is_final=True)
    for rank, worker_error in failures:
        if (how := _death(worker_error)) is not None:
            return Failure(f"worker {rank} died ({how})")
    # When one worker fails, the others' collectives fail after it: those say nothing of the reason.
    rank, worker_error = min(failures, key=lambda item: (_is_collective(item[1]), item[0]))
    what = f"{type(worker_error).__name__}: {last_line(worker_error)}"
    return Failure(f"worker {rank}: {what}", None if _is_collective(worker_error) else what)


def _death(error: BaseException) -> str | None:
    """How a worker's process ended, in Ray's words; None if it lives."""
    from ray.exceptions import RayError

    cause = getattr(error, "health_check_failure", error)
    if not isinstance(cause, RayError):
        return None
    text = " ".join(str(cause).split())
    for start in ("Worker exit detail: ", "The actor died because ", "The actor is dead because "):
        if start in text:
            return text.split(start, 1)[1].split(". ")[0][:200]
    return text[:200]


def _is_collective(error: BaseException) -> bool:
    text = str(error)
    return type(error).__name__.startswith("Dist") or any(
        word in text for word in ("gloo", "NCCL", "Connection closed by peer", "Connection reset")
    )


def last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:500] if lines else type(error).__name__
