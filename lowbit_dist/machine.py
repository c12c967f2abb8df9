"""What the system gives this process, processors and the limits of its control groups (cgroups); its load."""

import math
import os
import platform
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")
VMSTAT = Path("/proc/vmstat")
CPUS = Path("/proc/cpuinfo")
STATUS = Path("/proc/self/status")
# The files of a control group's limit and use, and the count of pages that are given back.
MEMORY = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}


def processors() -> int:
    """How many this process may use: those of its affinity and cpuset, at most its quota, rounded up."""
    try:
        allowed = len(os.sched_getaffinity(0))
    except AttributeError:  # another system than Linux
        allowed = os.cpu_count() or 1
    return max(1, min([allowed, *(math.ceil(quota) for quota in _quotas())]))


def instructions() -> str:
    """Of this processor, those that decide how fast it computes, and on what bits."""
    flags = _flags()
    fast = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]
    return ", ".join(fast) or platform.machine()


def multiplies_integers_faster() -> bool:
    """Whether products of 8-bit integers are faster here than those of bfloat16: where they have instructions
    and matrices have none.  (With AMX they were slower by as much as rounding takes.)
    """
    flags = _flags()
    return "avx512_vnni" in flags and "amx_bf16" not in flags


def _flags() -> set[str]:
    """Instruction sets of this processor, as Linux names them."""
    try:
        lines = CPUS.read_text().splitlines()
    except OSError:  # another system
        lines = []
    return next((set(line.split()) for line in lines if line.startswith("flags")), set())


def memory_limits() -> Iterator[tuple[int, int]]:
    """Limit, and limit less use, in bytes, of each control group that this process is in."""
    for folder, version in _groups("memory"):
        limit, use, cache = MEMORY[version]
        try:
            allowed = int((folder / limit).read_text())  # "max" is no number: no limit
            used = int((folder / use).read_text())
        except (OSError, ValueError):
            continue
        # Pages of files that nobody has used lately are given back when memory is short.
        yield allowed, allowed - max(0, used - _counts(folder / "memory.stat").get(cache, 0))


def peak_memory() -> int:
    """The most bytes that this process has had in memory, pages of files that it reads included."""
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:  # another system than Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    # Not what `getrusage` says, which begins with what the process that started this one had.
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def oom_kills() -> int:
    """Processes that the kernel has killed so far for lack of memory: of this one's control group, or, where
    that has no count, of the machine.
    """
    for folder, version in _groups("memory"):
        counts = _counts(folder / ("memory.events" if version == 2 else "memory.oom_control"))
        if "oom_kill" in counts:
            return counts["oom_kill"]
    return _counts(VMSTAT).get("oom_kill", 0)


def load() -> dict[str, float]:
    """How busy the machine is, under MLflow's names, or nothing where the system does not say.

    Of processors it is the time since this thread last asked; the first answer is 0.
    """
    import psutil

    try:
        memory = psutil.virtual_memory()
        return {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": round(memory.used / 1e6, 1),
            "system_memory_usage_percentage": round(100 * memory.used / memory.total, 1),
        }
    except Exception:  # of the system, or of psutil: a container may hide what it reads
        return {}


def _quotas() -> Iterator[float]:
    """Processors' worth of time that each control group may use."""
    for folder, version in _groups("cpu"):
        try:
            if version == 2:
                quota, period = (folder / "cpu.max").read_text().split()
            else:
                quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            share = int(quota) / int(period)  # "max" is no number: no limit
        except (OSError, ValueError, ZeroDivisionError):
            continue
        if share > 0:  # version 1 writes -1 for no limit
            yield share


def _groups(controller: str) -> Iterator[tuple[Path, int]]:
    """The folder of each control group around this process, its own first, and the version, 1 or 2."""
    try:
        lines = OWN_CGROUPS.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, version = CGROUPS, 2
        elif controller in controllers.split(","):
            root, version = CGROUPS / controller, 1
        else:
            continue
        # Inside a container its own group is mounted at the root, and `path` names one that is not there.
        own = root / path.strip("/")
        for folder in (own, *own.parents) if own.is_dir() else (root,):
            if not folder.is_relative_to(root):
                break
            yield folder, version


def _counts(file: Path) -> dict[str, int]:
    """The lines `name number` of a file; none if it cannot be read."""
    try:
        words = [line.split() for line in file.read_text().splitlines()]
    except OSError:
        return {}
    return {name: int(number) for name, number in (line for line in words if len(line) == 2)}


# Needed in the environment, before CUDA starts, for `repeat_on_gpus`: so many KiB for cuBLAS, and how many of
# them, for each stream.
REPEATING = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}


@contextmanager
def in_any_order() -> Iterator[None]:
    """Inside, additions to the places of a tensor are made in whatever order, for sums that are the same in
    any: of whole numbers, and of one number for each place.  Where a GPU's order must repeat, PyTorch sorts.
    """
    import torch

    before = torch.get_deterministic_debug_mode()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)


def repeat_on_gpus() -> None:
    """Let a GPU's operations have the same bits each time, or fail: those whose sums depend on which thread
    comes first are left out, of attention's backward pass too, and float32 is multiplied in float32.

    cuBLAS needs `REPEATING` for it.
    """
    import torch

    torch.use_deterministic_algorithms(True)
    # Nothing here reads memory before it is written, and to fill each new tensor with NaN takes a launch.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.set_float32_matmul_precision("highest")  # no TF32
    torch.backends.cudnn.allow_tf32 = False
