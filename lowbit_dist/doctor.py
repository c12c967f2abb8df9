"""What this machine can run, and what is missing, without importing anything heavy but torch."""

import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lowbit_dist import folders, machine
from lowbit_dist.errors import ConfigError, why_not_writable
from lowbit_dist.network import ray_address, why_no_ray_head

PACKAGE = "lowbit-dist"
MEMORY = 4 << 30  # bytes that the smallest run needs: Ray and two workers, 3.9 GB when measured
SHARED_MEMORY = 256 << 20  # bytes of /dev/shm, below which Ray's object store goes to disk
DISK = 1 << 30  # bytes free, for data and checkpoints of a small run
HOME = "set HOME to a folder that can be written"


class Finding(NamedTuple):
    """One thing looked at; `status` is ok, warning (it will be slower) or error (no training can run)."""

    name: str
    status: str
    result: str
    advice: str = ""


def examine() -> dict[str, Any]:
    """Every finding; `ok` says whether a training can run here."""
    findings = list(_findings())
    return {
        "ok": all(finding.status != "error" for finding in findings),
        "checks": [
            {"name": name, "status": status, "found": result, "advice": advice}
            for name, status, result, advice in findings
        ],
    }


def _findings() -> Iterator[Finding]:
    yield _python()
    yield from _packages()
    yield _processors()
    yield _compiled_ops()
    yield _compiled_blocks()
    yield from _gpus()
    yield from _space()
    yield _caches()
    yield _sessions()
    yield _ray()
    yield _mlflow()


def _python() -> Finding:
    needed = importlib.metadata.metadata(PACKAGE)["Requires-Python"]
    if not _allows(needed, platform.python_version()):
        return Finding("Python", "error", platform.python_version(), f"install Python {needed}")
    return Finding("Python", "ok", f"{platform.python_version()} at {sys.executable}")


def _packages() -> Iterator[Finding]:
    """Every dependency's version against what the package asks for; of DeepSpeed it is one exact version."""
    from packaging.requirements import Requirement

    for text in importlib.metadata.requires(PACKAGE) or ():
        needed = Requirement(text)
        if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
            continue
        extras = f"[{','.join(sorted(needed.extras))}]" if needed.extras else ""
        install = f"pip install '{needed.name}{extras}{needed.specifier}'"
        try:
            version = importlib.metadata.version(needed.name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(needed.name, "error", "not installed", install)
            continue
        if needed.specifier.contains(version, prereleases=True):
            yield Finding(needed.name, "ok", version)
        else:
            yield Finding(needed.name, "error", version, f"{install}: other versions are not supported")


def _allows(specifier: str, version: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(specifier).contains(version, prereleases=True)


def _processors() -> Finding:
    n, n_all, fast = machine.processors(), os.cpu_count() or 1, machine.instructions()
    logical = f"{n} logical" if n == n_all else f"{n} of {n_all} logical, by affinity, cpuset or quota"
    result = f"{logical}, {fast}"
    if platform.machine() == "x86_64" and "bf16" not in fast:
        return Finding("CPUs", "warning", result, "no bf16 arithmetic: precision: fp32 may be faster on CPUs")
    return Finding("CPUs", "ok", result)


def _compiled_ops() -> Finding:
    from lowbit_dist.ops import cpu

    if cpu.available():
        return Finding("C ops", "ok", "compiled for this CPU")
    return Finding(
        "C ops", "warning", "no compiler", "install gcc: CPU workers use slow PyTorch code meanwhile"
    )


def _compiled_blocks() -> Finding:
    import torch

    from lowbit_dist import compiled

    why = compiled.why_not("cuda" if torch.cuda.is_available() else "cpu")
    if why is None:
        return Finding("train.compile", "ok", "blocks can be compiled")
    return Finding("train.compile", "warning", why[0], f"{why[1]}: blocks run uncompiled meanwhile")


def _gpus() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        yield Finding("GPUs", "ok", "none: workers train on CPUs")
        return
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        capability = f"sm_{properties.major}{properties.minor}"
        result = f"{properties.name}, {properties.total_memory / 1e9:.0f} GB, {capability}"
        if properties.major < 8:
            yield Finding(f"GPU {i}", "warning", result, "no bf16 before sm_80: write precision: fp32")
        else:
            yield Finding(f"GPU {i}", "ok", result)
    try:
        yield Finding("Triton", "ok", importlib.metadata.version("triton"))
    except importlib.metadata.PackageNotFoundError:
        yield Finding("Triton", "error", "not installed", "pip install triton: GPU workers need its kernels")


def _space() -> Iterator[Finding]:
    import psutil

    from lowbit_dist.memory.machine import available_memory

    total = min([psutil.virtual_memory().total, *(limit for limit, _ in machine.memory_limits())])
    remark = f"{total / 1e9:.1f} GB in all"
    if n_killed := machine.oom_kills():
        remark += f"; so far {n_killed} process{'' if n_killed == 1 else 'es'} killed for lack of it"
    yield _enough("memory", available_memory(), MEMORY, remark, "error")
    if os.path.isdir("/dev/shm"):
        free = shutil.disk_usage("/dev/shm").free
        yield _enough("/dev/shm", free, SHARED_MEMORY, "set by --shm-size in containers", "warning")
    folder = Path.cwd()
    yield _enough("disk", shutil.disk_usage(folder).free, DISK, str(folder), "error")
    if not os.access(folder, os.W_OK):
        yield Finding("this folder", "error", f"{folder} cannot be written", "go to a folder that can")


def _enough(name: str, free: int, needed: int, remark: str, otherwise: str) -> Finding:
    result = f"{free / 1e9:.1f} GB free ({remark})"
    if free < needed:
        return Finding(name, otherwise, result, f"{needed / 1e9:.1f} GB should be free")
    return Finding(name, "ok", result)


def _caches() -> Finding:
    """Where what can be made again is kept, when there is no home or it cannot be written."""
    provided, folder = folders.provide_home(), folders.cache()
    if why := why_not_writable(folder):
        return Finding("caches", "error", f"{folder} cannot be written ({why})", f"{HOME}, or XDG_CACHE_HOME")
    if provided and folder.is_relative_to(tempfile.gettempdir()):
        return Finding("caches", "warning", f"{folder}: there is no HOME that can be written", HOME)
    return Finding("caches", "ok", str(folder))


def _sessions() -> Finding:
    """Where Ray makes its sockets and logs."""
    try:
        folder, remark = folders.for_sessions(os.getpid())
    except ConfigError as error:
        result, _, advice = str(error).partition("; ")
        return Finding("Ray's folder", "error", result, advice)
    if remark:
        return Finding("Ray's folder", "warning", f"{folder}, for {remark}", "set RAY_TMPDIR to another")
    return Finding("Ray's folder", "ok", str(folder))


def _ray() -> Finding:
    if (address := ray_address()) is None:
        return Finding("Ray cluster", "ok", "RAY_ADDRESS is not set: Ray is started on this machine")
    if (wrong := why_no_ray_head(address)) is not None:
        return Finding("Ray cluster", "error", f"RAY_ADDRESS ({address}) {wrong[0]}", wrong[1])
    return Finding("Ray cluster", "ok", f"a Ray head answers at {address}")


def _mlflow() -> Finding:
    """The default store; a run's own `tracking.mlflow` is checked when the run starts."""
    file = Path("mlflow.db")
    if file.exists():
        with file.open("rb") as opened:
            if opened.read(15) not in (b"", b"SQLite format 3"):
                return Finding("MLflow", "error", f"{file} is no SQLite file", "move it away")
        if not os.access(file, os.W_OK):
            return Finding("MLflow", "error", f"{file} cannot be written", "change its permissions")
        return Finding("MLflow", "ok", f"sqlite:///{file}, {file.stat().st_size / 1e6:.1f} MB")
    return Finding("MLflow", "ok", f"sqlite:///{file}, made by the first run")
