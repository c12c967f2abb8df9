"""How much memory there is for a run's workers."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from lowbit_dist.config import RunConfig

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")
# The files of a control group's limit and use, and the count of pages that are given back.
VERSION_2 = "memory.max", "memory.current", "inactive_file"
VERSION_1 = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"

# Ray's own processes on a machine that trains: controller, actors, agents, dashboard and the object store.
# The sum of their proportional shares (PSS in smaps), without the launcher's, in a run of two workers.
RAY = 2_200_000_000
# Ray kills workers when less of the machine's (or the container's) memory is left.
LEFT = 0.05


class MemoryBudget(NamedTuple):
    """Memory for workers that are spread evenly over machines which are alike."""

    place: str  # what a message calls it
    bytes: int  # on CPUs: of one machine, for all its workers; on GPUs: for one worker
    on_gpu: bool = False
    machines: int = 1
    most_workers: int = 0  # that there are places for, if known

    def workers_on_one(self, workers: int) -> int:
        return -(-workers // self.machines)

    def per_worker(self, workers: int) -> int:
        """Bytes for each of `workers` in all."""
        return self.bytes if self.on_gpu else self.bytes // self.workers_on_one(workers)


def local_budget(config: RunConfig) -> MemoryBudget:
    """What this machine has for a run: of its smallest GPU a worker's share, or the memory that is free."""
    gpus, asked = torch.cuda.device_count(), config.cluster.gpus_per_worker
    if not gpus or asked == 0:
        return MemoryBudget("this machine", max(0, available_memory() - RAY))
    share = 1 if asked == "auto" else asked
    least = int(smallest_gpu() * min(1, share))
    return MemoryBudget("a GPU of this machine", least, on_gpu=True, most_workers=int(gpus / share))


def smallest_gpu() -> int:
    """Bytes of the smallest of this machine's GPUs; 0 without one."""
    gpus = range(torch.cuda.device_count())
    return min((torch.cuda.get_device_properties(i).total_memory for i in gpus), default=0)


def available_memory() -> int:
    """Bytes that processes of this machine, or of this container, can take before Ray objects."""
    memory = psutil.virtual_memory()
    limits = [(memory.total, memory.available), *_cgroups()]
    return max(0, min(int(free - LEFT * total) for total, free in limits))


def _cgroups() -> Iterator[tuple[int, int]]:
    """Limit, and limit less use, of each control group that this process is in (versions 1 and 2)."""
    try:
        lines = OWN_CGROUPS.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            yield from _limits(CGROUPS, path, *VERSION_2)
        elif "memory" in controllers.split(","):
            yield from _limits(CGROUPS / "memory", path, *VERSION_1)


def _limits(root: Path, path: str, limit: str, use: str, cache: str) -> Iterator[tuple[int, int]]:
    # Inside a container its own group is mounted at the root, and `path` names one that is not there.
    own = root / path.strip("/")
    for folder in (own, *own.parents) if own.is_dir() else (root,):
        if not folder.is_relative_to(root):
            return
        try:
            allowed = int((folder / limit).read_text())  # "max" is no number: no limit
            used = int((folder / use).read_text())
            counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        # Pages of files that nobody has used lately are given back when memory is short.
        yield allowed, allowed - max(0, used - int(counts.get(cache, 0)))
