"""Where a run stands when its workers start: at a checkpoint of its own, or at its beginning.

Worker 0 looks, and all take what it has found: on a shared file system another one may see a moment later.
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from lowbit_dist import checkpoint, compiled, inputs, products
from lowbit_dist.checkpoint import Checkpoint, Position
from lowbit_dist.config import ConfigError, RunConfig
from lowbit_dist.statistics import Layers
from lowbit_dist.zero import Engine, Initial

log = logging.getLogger(__name__)


def start(
    config: RunConfig,
    engine: Engine,  # without values
    initial: Initial,
    layers: Layers,
    heartbeat: Callable[[], object],
) -> Position:
    """Resume, or begin at step 0: with first weights of its own, or with those of the run it starts from.

    First weights are made only where no checkpoint has others.  Layers multiply integers from now on, and
    blocks are compiled, if the run asks for it, or was until now.
    """
    position = _start(config, engine, initial, layers, heartbeat)
    device, n_parameters, is_new = engine.device.type, sum(engine.numels.values()), position.step == 0
    in_integers = products.settle_(engine.left_open, device, is_new=is_new, before=position.in_integers)
    if in_integers:
        log.info("low-bit layers multiply integers (precision.matmul: auto)")
    instructions = compiled.decide(config, device, n_parameters, is_new=is_new, before=position.compiled)
    if instructions is not None:
        engine.compile(heartbeat)
    return replace(position, compiled=instructions, in_integers=in_integers)


def _start(
    config: RunConfig, engine: Engine, initial: Initial, layers: Layers, heartbeat: Callable[[], object]
) -> Position:
    if (path := _newest(config, engine)) is not None:
        if not layers.recall():
            engine.initialize(initial, heartbeat)
            layers.remember()
        position = _load(path, engine)
        log.info("resumes from step %d", position.step)
        return position
    begin = Position(step=0, samples=0, tokens=0)
    if (path := _chosen(lambda: inputs.parent(config))) is None:
        engine.initialize(initial, heartbeat)
        log.info("begins at step 0")
    else:
        parent, with_states = Checkpoint.open(path), config.run.with_states
        parent.load_into(engine.shards, with_states=with_states)
        engine.refresh(1)
        log.info("starts from %s", path)
        begin = replace(begin, updates_before=parent.position.updates) if with_states else begin
    layers.remember()
    return begin


def go_back(config: RunConfig, engine: Engine) -> Position | None:
    """Load the newest undamaged checkpoint that a run has however often it is stopped: one of
    `train.save_every`; None if there is none yet.
    """
    path = _newest(config, engine, config.train.save_every)
    return None if path is None else _load(path, engine)


def _newest(config: RunConfig, engine: Engine, every: int = 1) -> Path | None:
    if engine.rank == 0:
        checkpoint.clear_partial(config.run_dir)
    return _chosen(lambda: checkpoint.latest(config.run_dir, every))


def _load(path: Path, engine: Engine) -> Position:
    opened = Checkpoint.open(path)
    opened.load_into(engine.shards)
    engine.refresh(max(1, opened.position.step))
    return opened.position


def _chosen(choose: Callable[[], Path | None]) -> Path | None:
    """What worker 0 chooses, for all; its ConfigError is every worker's."""
    choice: list[Path | ConfigError | None] = [None]
    if dist.get_rank() == 0:
        try:
            choice = [choose()]
        except ConfigError as error:
            choice = [error]
    dist.broadcast_object_list(choice)
    if isinstance(choice[0], ConfigError):
        raise choice[0]
    return choice[0]
