"""What went wrong with a worker group, in one line."""

import re
from collections.abc import Callable

from lowbit_dist.cluster.driver import MORE_MEMORY, Failure
from lowbit_dist.config import ConfigError
from lowbit_dist.guard import Diverged

RAYS_LIMIT = "running low on memory"  # Ray says so of a worker that its memory monitor has killed


def failure(error: BaseException, out_of_memory: Callable[[], str | None]) -> Failure:
    """What went wrong first, in one line; a user's mistake is raised again as what it is.

    out_of_memory: asks on which machines the kernel has killed processes for lack of memory meanwhile
    """
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
            if (killer := _killed_by_ray(how) or out_of_memory()) is not None:
                text = f"worker {rank} was killed for lack of memory {killer}; {MORE_MEMORY}"
                return Failure(text, "killed for lack of memory")  # at the same place it would be again
            return Failure(f"worker {rank} died ({how[:200]})")
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
        if start in text and RAYS_LIMIT not in text:
            return text.split(start, 1)[1].split(". ")[0]
    return text


def _killed_by_ray(how: str) -> str | None:
    """Ray's numbers, if its memory monitor has killed a worker."""
    if RAYS_LIMIT not in how:
        return None
    used = re.search(r"[\d.]+ ?GB ?/ ?[\d.]+ ?GB", how)
    return "by Ray" + (f" ({used[0]} were used)" if used else "")


def _is_collective(error: BaseException) -> bool:
    text = str(error)
    return type(error).__name__.startswith("Dist") or any(
        word in text for word in ("gloo", "NCCL", "Connection closed by peer", "Connection reset")
    )


def last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:500] if lines else type(error).__name__
