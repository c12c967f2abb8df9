"""What can be known to be wrong with a launch before any worker starts."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from lowbit_dist import folders, naming
from lowbit_dist.config import ConfigError, RunConfig
from lowbit_dist.errors import why_not_writable
from lowbit_dist.machine import processors
from lowbit_dist.network import check_ray_head, ray_address
from lowbit_dist.record import METRICS, rows_of

RATES = ("schedule", "train.steps")  # what the rates of a run's steps follow from


def check(config: RunConfig) -> None:
    """ConfigError for everything that can be known to be wrong without starting Ray."""
    n = config.workers
    if address := ray_address():
        check_ray_head(address)
    else:
        n = check_workers(config, cpus=processors(), gpus=_local_gpus(), place="this machine")
        if config.precision.matmul == "fp8":
            from lowbit_dist import float8

            float8.check(float8.gpus(), "this machine")
        from lowbit_dist import compiled

        compiled.check(config, "cuda" if gpus_per_worker(config, _local_gpus()) else "cpu", "this machine")
    check_run(config)
    _check_prepared(config)
    from lowbit_dist import data

    manifest = data.check(config)
    from lowbit_dist import inputs

    inputs.check(config, manifest)
    inputs.check_parent(config, manifest)
    if not address:  # the workers' machines are this one
        data.check_cache(config.data)
    from lowbit_dist import model, products

    model.check(config, manifest.vocab_size, used=manifest.used)
    products.check(config, manifest.vocab_size)
    from lowbit_dist import tracking

    tracking.check(config)
    if finished(config) is None:
        from lowbit_dist import checkpoint, memory

        if not address:
            memory.check_memory(config.with_workers(n), manifest.vocab_size, memory.local_budget(config))
        checkpoint.check_disk(config, manifest.vocab_size)
        if not address:
            folders.for_sessions(os.getpid())
    check_folder(config)  # last: a refused launch leaves nothing behind


def _check_prepared(config: RunConfig) -> None:
    """Whoever starts without data is told how to make it."""
    path = config.data.path
    if "://" not in path and not os.path.exists(path):
        tokenizer = Path(path).parent / "tokenizer"
        raise ConfigError(
            f"data.path ({path}) does not exist; prepare it, for example with "
            f"`lowbit tokenizer train --input stdlib --vocab-size 2048 --out {tokenizer}` and "
            f"`lowbit data prepare --input stdlib --tokenizer {tokenizer} --out {path}`"
        )


def check_workers(config: RunConfig, *, cpus: float, gpus: float, place: str) -> int:
    """How many workers `place` has the processors for; ConfigError if these are too few."""
    n = config.worker_counts()[-1]
    asked = [
        ("CPUs", "cpus_per_worker", cpus, config.cluster.cpus_per_worker),
        ("GPUs", "gpus_per_worker", gpus, gpus_per_worker(config, gpus)),
    ]
    for what, field, have, per_worker in asked:
        if n <= (fit := how_many_fit(have, per_worker)):
            continue
        suggested = max((m for m in range(1, int(fit) + 1) if _divides(config, m)), default=None)
        ways = [] if suggested is None else [f"cluster.workers={suggested}"]
        if share := _share(have / n):
            ways.append(f"cluster.{field}={share:g}")
        elif what == "GPUs":
            ways.append("cluster.gpus_per_worker=0, to train on CPUs")
        elif not ways:  # of a cluster without a machine
            ways.append(
                "cluster.start_timeout=600, to wait for machines that it starts when they are asked for"
            )
        raise ConfigError(
            f"cluster.workers ({n}) x cluster.{field} ({per_worker:g}) are {n * per_worker:g} {what}, but "
            f"{place} has {have:g}: {fit or 'no'} worker{' fits' if fit <= 1 else 's fit'}; "
            f"write {' or '.join(ways)}"
        )
    if config.precision.matmul == "fp8" and not gpus_per_worker(config, gpus):
        from lowbit_dist import float8

        float8.check([], "a worker" if gpus else place)
    return next(
        m
        for m in config.worker_counts()
        if all(m <= how_many_fit(have, per_worker) for _, _, have, per_worker in asked)
    )


def how_many_fit(have: float, needed: float) -> float:
    """How often `each` is in `have`, though fractions are not exact; without end if nothing is asked."""
    return int(have / needed * (1 + 1e-9)) if needed else float("inf")


def gpus_per_worker(config: RunConfig, gpus: float) -> int:
    """What `auto` means where there are `gpus` in all."""
    asked = config.cluster.gpus_per_worker
    if asked == "auto":
        return 1 if gpus else 0
    return asked


def check_run(config: RunConfig) -> None:
    """ConfigError if the run's folder holds another run."""
    from lowbit_dist import configfile

    folder = config.run_dir
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"run.name ({config.run.name}): {folder} is a file; write another name")
    if (folder / naming.CHILDREN).exists():
        raise ConfigError(f"run.name ({config.run.name}) is a sweep's: {folder}; write another name")
    if why := why_not_writable(folder):
        raise _not_writable(config, why)
    from lowbit_dist import runs
    from lowbit_dist.checkpoint import Checkpoint, newest_first, step_of

    paths = newest_first(folder)
    # Without a checkpoint a run starts anew, and what it was begun with binds nobody.
    if paths and (folder / runs.CONFIG).exists():
        try:
            earlier = configfile.load(folder / runs.CONFIG)
        except ConfigError as mistake:
            raise ConfigError(f"run.name ({config.run.name}): {folder / runs.CONFIG}: {mistake}") from None
        _check_same(config, earlier, f"run.name ({config.run.name})", step_of(paths[0]))
    for path in paths:
        try:
            earlier = Checkpoint.open(path).config
        except ConfigError:  # damaged: no reason to refuse, the workers name it and go back to the one before
            continue
        _check_same(config, earlier, f"the checkpoint {path}", step_of(path))
        break
    latest = folder / "latest"
    if os.path.lexists(latest) and not paths:
        raise ConfigError(
            f"run.name ({config.run.name}): {latest} names a checkpoint, but none is in "
            f"{folder / 'checkpoints'}; put it back, write another run.name, or delete {latest} to start anew"
        )


def begun_otherwise(config: RunConfig) -> list[str]:
    """How the configuration differs with which rows of a run without a checkpoint were measured."""
    from lowbit_dist import configfile, runs

    folder = config.run_dir
    if newest_checkpoint(folder) is not None or not rows_of(folder / METRICS):
        return []
    try:
        return configfile.load(folder / runs.CONFIG).differences(config)
    except ConfigError as mistake:  # of an earlier version
        return [str(mistake)]


def check_folder(config: RunConfig) -> None:
    """Make the run's folder; ConfigError if that is impossible."""
    folder = config.run_dir
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _not_writable(config, error.strerror or str(error)) from None


def _not_writable(config: RunConfig, why: str) -> ConfigError:
    return ConfigError(
        f"run.dir ({config.run.dir}): {config.run_dir} cannot be written ({why}); write a folder that can"
    )


def _check_same(config: RunConfig, earlier: RunConfig, what: str, step: int) -> None:
    """ConfigError unless `config` says what `earlier` did in the steps that were made.

    So a run may be made longer, and be given another end, where that changes no rate of the steps before; and
    of a pass as many samples as fit, for sums of losses and gradients change in their last digits alone.
    """
    from lowbit_dist.optim import schedule

    is_exact = config.train.reproducible or earlier.train.reproducible
    free: tuple[str, ...] = () if is_exact else ("train.micro_batch",)
    differences, others = (earlier.differences(config, but=but) for but in (free, (*free, *RATES)))
    if schedule.agree(earlier, config, step):
        differences = others
    elif config.train.steps < step:
        raise ConfigError(
            f"train.steps ({config.train.steps:,}) is less than {what} has behind it, {step:,}; write "
            f"{step:,} or more, or another run.name"
        )
    elif differences != others:
        raise ConfigError(
            f"train.steps ({config.train.steps:,}) and schedule.name ({config.schedule.name}) give the "
            f"{step:,} steps that {what} has behind it other rates than they had "
            f"({', '.join(differences[:3])}); write the earlier values, or another run.name: only a constant "
            "rate, and the decay of wsd before it begins, can go on longer, if the method has not changed yet"
        )
    if differences:
        more = f" and {len(differences) - 5} more" if differences[5:] else ""
        raise ConfigError(
            f"{what} is there with another configuration ({', '.join(differences[:5])}{more}); "
            "write another run.name, or the earlier values"
        )


def newest_checkpoint(folder: Path) -> Path | None:
    """Unverified: the workers verify it when they load it."""
    from lowbit_dist.checkpoint import newest

    return newest(folder)


def finished(config: RunConfig) -> dict[str, Any] | None:
    """The summary of a run that has nothing left to do."""
    newest = newest_checkpoint(config.run_dir)
    if newest is None or newest.name != f"step-{config.train.steps}":
        return None
    try:
        summary: dict[str, Any] = json.loads((config.run_dir / "summary.json").read_text())
    except (OSError, ValueError):
        return None
    return summary if summary.get("steps") == config.train.steps else None


def run_lock(config: RunConfig) -> contextlib.AbstractContextManager[Any]:
    """ConfigError if this run is being launched already."""
    from lowbit_dist import runs

    return runs.locked(
        config.run_dir,
        f"run.name ({config.run.name}) is being trained by another process; wait for it, "
        "or write another name",
    )


def _divides(config: RunConfig, workers: int) -> bool:
    try:
        config.accumulation(workers)
    except ConfigError:
        return False
    return True


def _share(share: float) -> float:
    """A worker's share of the processors, rounded down to what is worth writing, so that all workers fit."""
    return int(share) if share >= 1 else int(share * 20) / 20


def _local_gpus() -> int:
    import torch

    return torch.cuda.device_count()
