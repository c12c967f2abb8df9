"""Whether every machine of a cluster can carry a run: asked of each before a worker starts."""

from __future__ import annotations

import contextlib
import os
import platform
import uuid
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowbit_dist.cluster.nodes import Node
from lowbit_dist.config import ConfigError, RunConfig
from lowbit_dist.errors import why_not_writable
from lowbit_dist.registry import fingerprint

if TYPE_CHECKING:  # it imports torch, and others here want to be quick
    from lowbit_dist.memory import MemoryBudget

# What must be the same everywhere: these exchange tensors, pickles or messages with one another.
PACKAGES = ("torch", "deepspeed", "ray", "mosaicml-streaming", "transformers", "numpy", "safetensors")
CHECKED = "checked: "  # the beginning of what is said once nothing is missing
MARK = ".reach"  # in the run's folder, while machines look for it
SECONDS = 120


def probe(config: RunConfig, machines: list[Node], *, gpus: int) -> MemoryBudget | None:
    """The memory of the smallest of `machines`, if known; ConfigError if one cannot carry the run.

    gpus: of each worker
    A machine that does not answer in time is left to those who watch the workers.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from lowbit_dist import configfile

    content = config.to_dict()
    mark = config.run_dir / MARK
    word = uuid.uuid4().hex
    mark.write_text(word)
    try:
        ask = ray.remote(num_cpus=0, max_retries=0)(examine)
        tasks = [
            ask.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=node.id, soft=False)
            ).remote(content, os.getcwd(), bool(gpus))
            for node in machines
        ]
        done, _ = ray.wait(tasks, num_returns=len(tasks), timeout=SECONDS)
        here, own = packages(), configfile.providers(content)
        answers = []
        for node, task in zip(machines, tasks, strict=True):
            if task in done:
                answer = ray.get(task)
                name = f"machine {node.name} ({node.ip})"
                check_packages(name, answer, here, own)
                _check_folders(config, name, answer, word)
                answers.append(answer)
    finally:
        mark.unlink(missing_ok=True)
    from lowbit_dist.memory import MemoryBudget

    least = min((answer["memory"] for answer in answers), default=0)
    if not least:  # a GPU that a task without one is not shown
        return None
    if gpus:
        return MemoryBudget("the smallest GPU of the cluster", least, on_gpu=True)
    return MemoryBudget("the smallest machine", least)


def packages() -> dict[str, str]:
    """Versions of what must be the same on all machines; of this package, a hash of its source."""
    versions = {"python": ".".join(platform.python_version_tuple()[:2])}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "absent"
    return versions | {"lowbit-dist": fingerprint([Path(__file__).parent.parent])}


def examine(content: dict[str, Any], folder: str, on_gpu: bool) -> dict[str, Any]:
    """Run on a machine of the cluster: what it has, and sees of the run's folder and of its data.

    `memory`: bytes that are free, or on GPUs those of the smallest one
    """
    from lowbit_dist import configfile, data
    from lowbit_dist.memory.machine import available_memory, smallest_gpu

    if os.path.isdir(folder):
        os.chdir(folder)
    installed = packages() | configfile.providers(content)
    try:
        config = configfile.from_dict(content)
    except ConfigError as mistake:  # a package that the run needs is absent here, or is another one
        return {"packages": installed, "mistake": str(mistake)}
    answer: dict[str, Any] = {
        "packages": installed,
        "memory": smallest_gpu() if on_gpu else available_memory(),
        "word": None,
        "data": None,
    }
    with contextlib.suppress(OSError):
        answer["word"] = (config.run_dir / MARK).read_text()
    answer["writable"] = why_not_writable(config.run_dir) if answer["word"] else None
    try:
        data.read_manifest(config.data.path)
    except Exception as error:  # in the words of whatever hinders it
        answer["data"] = str(error)
    if (pretrained := config.model.pretrained) is not None and not Path(pretrained).exists():
        answer["pretrained"] = str(pretrained)
    return answer


def check_packages(name: str, answer: dict[str, Any], here: dict[str, str], own: dict[str, str]) -> None:
    """ConfigError unless a machine has what is `here`, and the packages that the run's method and optimizer
    come from (`own`).
    """
    for package, version in (here | own).items():
        theirs = answer["packages"].get(package)
        if package in own and theirs is None:
            raise ConfigError(
                f"{name} lacks {package} {version}, from which this run's method or optimizer comes; install "
                "it on all machines"
            )
        if theirs != version:
            source = "" if package in own else ", with the versions of constraints.txt"
            raise ConfigError(
                f"{name} has {package} {theirs}, but {version} is where the run was started: install "
                f"the same packages on all machines{source}"
            )
    if "mistake" in answer:
        raise ConfigError(f"{name}: {answer['mistake']}")


def _check_folders(config: RunConfig, name: str, answer: dict[str, Any], word: str) -> None:
    if answer["word"] != word:
        raise ConfigError(
            f"run.dir ({config.run.dir}): {name} does not see {config.run_dir}; write a folder that all "
            "machines share"
        )
    if answer["writable"] is not None:
        raise ConfigError(
            f"run.dir ({config.run.dir}): {name} cannot write {config.run_dir} ({answer['writable']}); "
            "write a folder that all machines can write"
        )
    if answer["data"] is not None:
        raise ConfigError(
            f"data.path ({config.data.path}): {name} cannot read it ({answer['data']}); write a folder that "
            "all machines share, or a URL"
        )
    if "pretrained" in answer:
        raise ConfigError(
            f"model.pretrained ({answer['pretrained']}): {name} does not see it; write a folder that all "
            "machines share"
        )
