"""How much memory there is for a run's workers."""

from typing import NamedTuple

import psutil
import torch

from lowbit_dist import machine
from lowbit_dist.config import RunConfig

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
    """What this machine has for a run: its smallest GPU, or the memory that is free."""
    gpus = torch.cuda.device_count()
    if device_of(config) == "cpu":
        return MemoryBudget("this machine", max(0, available_memory() - RAY))
    return MemoryBudget("a GPU of this machine", smallest_gpu(), on_gpu=True, most_workers=gpus)


def device_of(config: RunConfig) -> str:
    """On what workers of this machine train: `cuda` or `cpu`."""
    return "cuda" if torch.cuda.device_count() and config.cluster.gpus_per_worker != 0 else "cpu"


def smallest_gpu() -> int:
    """Bytes of the smallest of this machine's GPUs; 0 without one."""
    gpus = range(torch.cuda.device_count())
    return min((torch.cuda.get_device_properties(i).total_memory for i in gpus), default=0)


def available_memory() -> int:
    """Bytes that processes of this machine, or of this container, can take before Ray objects."""
    memory = psutil.virtual_memory()
    limits = [(memory.total, memory.available), *machine.memory_limits()]
    return max(0, min(int(free - LEFT * total) for total, free in limits))
