"""Which checkpoint of a run to use: the newest that is whole."""

import logging
import os
import shutil
from pathlib import Path

from lowbit_dist.checkpoint.layout import MANIFEST, REPLACED
from lowbit_dist.checkpoint.reading import Checkpoint
from lowbit_dist.config import ConfigError
from lowbit_dist.naming import RUNS, find_step

log = logging.getLogger(__name__)


def newest_first(run_dir: Path) -> list[Path]:
    """A run's published checkpoints, unverified; `latest` in its folder is for people, and may name what
    is gone.
    """
    paths = [path for path in (run_dir / "checkpoints").glob("step-*") if path.name[5:].isdecimal()]
    return sorted(paths, key=step_of, reverse=True)


def newest(run_dir: Path) -> Path | None:
    """The newest published checkpoint, unverified: the workers verify it when they load it."""
    return next(iter(newest_first(run_dir)), None)


def step_of(path: Path) -> int:
    return int(path.name[5:])


def latest(run_dir: Path | str, every: int = 1) -> Path | None:
    """The newest checkpoint of a run that is complete and undamaged; damaged ones are named in a warning.

    every: of a step that is a multiple of it
    None if the run has no such checkpoint yet; ConfigError if all are damaged.
    """
    whole, damaged = _newest_whole(Path(run_dir), every)
    for problem in damaged:
        log.warning("DAMAGED CHECKPOINT %s", problem)
    if damaged and whole is None:
        raise ConfigError(
            f"{run_dir} has no checkpoint that is not damaged ({damaged[0]}); bring one back, or remove "
            f"{Path(run_dir) / 'checkpoints'} to begin again"
        )
    return whole


def _newest_whole(run_dir: Path, every: int = 1) -> tuple[Path | None, list[str]]:
    """The newest undamaged checkpoint, and what is wrong with the newer ones."""
    damaged: list[str] = []
    for path in (path for path in newest_first(run_dir) if step_of(path) % every == 0):
        try:
            problems = Checkpoint.open(path).verify()
        except ConfigError as error:
            problems = [str(error)]
        if not problems:
            return path, damaged
        damaged.append(f"{path} is not used: {'; '.join(problems)}")
    return None, damaged


def resolve(run_or_checkpoint: str | Path, runs_dir: Path | str = RUNS, *, verify: bool = True) -> Path:
    """The checkpoint folder meant by a run's name or folder, by RUN@STEP, or by a checkpoint's folder.

    Of a run the newest that is not damaged.  One that is named itself, by its step or its folder, is refused
    if it is, unless it is not to be verified.
    """
    path = Path(os.path.expanduser(run_or_checkpoint))
    if os.path.exists(path / MANIFEST):  # unlike Path.exists, it takes what no file could be called
        return _whole(path) if verify else path
    run_dir, step = find_step(run_or_checkpoint, runs_dir, "a checkpoint's folder")
    if step is not None:
        path = _of_step(run_dir, step)
        return _whole(path) if verify else path
    whole, damaged = _newest_whole(run_dir)
    if whole is None:
        why = f": {'; '.join(damaged)}" if damaged else " yet"
        raise ConfigError(f"{run_dir} has no usable checkpoint{why}; train it, or write another run's name")
    for problem in damaged:
        log.warning("DAMAGED CHECKPOINT %s", problem)
    return whole


def _whole(path: Path) -> Path:
    if problems := Checkpoint.open(path).verify():
        raise ConfigError(f"{path} is damaged: {'; '.join(problems)}; name another checkpoint of the run")
    return path


def _of_step(run_dir: Path, step: int) -> Path:
    path = run_dir / "checkpoints" / f"step-{step}"
    if not (path / MANIFEST).exists():
        steps = sorted(step_of(known) for known in newest_first(run_dir))
        there = f"write @{', @'.join(map(str, steps))}" if steps else "train it"
        raise ConfigError(f"{run_dir} has no checkpoint of step {step:,}; {there}, or another run's name")
    return path


def clear_partial(run_dir: Path) -> None:
    """Remove what a killed save left behind; call before training, while nobody writes."""
    for path in (run_dir / "checkpoints").glob(".step-*"):
        name, _, end = path.name[1:].rpartition(".")
        if end == REPLACED and not path.with_name(name).exists():  # killed before the new one had its name
            path.rename(path.with_name(name))
        else:
            shutil.rmtree(path)
