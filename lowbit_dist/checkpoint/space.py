"""The disk that a run's checkpoints take, known before it starts."""

import shutil
from functools import lru_cache

import torch

from lowbit_dist.config import ConfigError, RunConfig
from lowbit_dist.errors import in_bytes
from lowbit_dist.grid import BLOCK
from lowbit_dist.model import linear_weights, low_bit_names, n_scales, shapes

# Names, shapes and offsets, measured on written checkpoints: of a parameter in each worker's file and in the
# manifest, and of the configuration and the hashes.
PER_SHARD, PER_PARAMETER, PER_CHECKPOINT = 420, 100, 4000


def check_disk(config: RunConfig, vocab_size: int) -> None:
    """ConfigError unless the run's checkpoints fit where they are to be written."""
    size = checkpoint_bytes(config, vocab_size)
    n = at_once(config)
    folder = config.run_dir / "checkpoints"
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    # The next checkpoints follow or replace those that are there.
    held = sum(file.stat().st_size for file in folder.glob("step-*/*") if file.is_file())
    missing = n * size - held - free
    if missing <= 0:
        return
    ways = [f"free {in_bytes(missing)}", "write a run.dir with more room"]
    for words, changes in (
        ("train.keep_last=1", {"keep_last": 1}),
        ("train.keep_last=1 train.keep_every=null", {"keep_last": 1, "keep_every": None}),
    ):
        fewer = config.model_copy(update={"train": config.train.model_copy(update=changes)})
        if at_once(fewer) * size - held - free <= 0:
            ways.insert(0, f"write {words}")
            break
    there = f" beside the {in_bytes(held)} there" if held else ""
    kept = f", train.keep_every {config.train.keep_every:,}" if config.train.keep_every else ""
    raise ConfigError(
        f"run.dir ({config.run.dir}) must have room for {n:,} checkpoint{'' if n == 1 else 's'} at once of "
        f"{in_bytes(size)} (train.keep_last {config.train.keep_last:,}{kept}), {in_bytes(n * size)} in all, "
        f"but {place} has {in_bytes(free)} free{there}; {', '.join(ways[:-1])} or {ways[-1]}"
    )


def at_once(config: RunConfig) -> int:
    """Checkpoints that are on the disk together: those kept, and the one that is written before one goes."""
    train = config.train
    saves = -(-train.steps // train.save_every)
    older = max(0, saves - train.keep_last - 1)
    for_good = older * train.save_every // train.keep_every if train.keep_every else 0
    return saves - older + for_good


@lru_cache(maxsize=64)
def checkpoint_bytes(config: RunConfig, vocab_size: int) -> int:
    """Bytes of one checkpoint of the run, all workers' files together."""
    model = shapes(config, vocab_size)
    low_bit, workers = set(low_bit_names(model, config.method)), config.workers
    linear = set(linear_weights(model))
    stored, total = config.method.stored, 0
    for name, p in model.named_parameters():
        total += config.optimizer.of(is_linear=name in linear).state_bytes(tuple(p.shape))
        if stored is not None and name in low_bit:
            total += p.numel() // BLOCK * stored.bytes_per_block
            if (kept := config.method.accumulator) is not None:
                total += p.numel() * kept.dtype.itemsize
            total += torch.float16.itemsize * n_scales(config.method, tuple(p.shape))
        else:
            total += torch.float32.itemsize * p.numel()
    n = len(list(model.parameters()))
    return total + n * (PER_SHARD * workers + PER_PARAMETER) + PER_CHECKPOINT
