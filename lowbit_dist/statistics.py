"""What the levels of low-bit weights tell of a training: of every method the same, in its own levels.

A layer's levels are those that its forward pass multiplies with.  Where they are the stored codes, the codes
are counted as they lie in the shard, and the update has counted its flips; where a view makes them of a
latent weight or of finer codes, `Method.levels` is asked, before and after the update.

    layers.jsonl, of each layer and log step:
    flip_rate       share of the levels that this step changed
    zero_fraction   share of the levels that are 0
    saturation      share of the levels at an end of the grid
    entropy         of the levels' distribution, in bits: log2(n_levels) where all are used alike
    distance        mean of |level - the first level|, over a sample of some 4,096 elements; the run's folder
                    keeps that of the first levels, which a resumed run does not make again
    grad_norm       of the mean gradient, before clipping
"""

import math
from collections.abc import Callable
from contextlib import suppress

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowbit_dist import ops
from lowbit_dist.files import atomic_write
from lowbit_dist.grid import BLOCK, Grid
from lowbit_dist.zero import Engine, Shard, Update

# Of the numbers of elements at each level of the grid, from the lowest up: [grid.n_levels] int64.
LAYER_METRICS: dict[str, Callable[[Tensor, Grid], float]] = {
    "zero_fraction": lambda counts, grid: _share(counts[-grid.low : 1 - grid.low], counts),
    "saturation": lambda counts, grid: _share(counts[[0, -1]], counts),
    "entropy": lambda counts, grid: _entropy(counts),
}
SAMPLE_BLOCKS = 16  # of each layer, whose first levels are kept on the host
FIRST_LEVELS = ".first_levels.safetensors"  # in a run's folder: the same, as GRID/WEIGHT

Levels = dict[str, Tensor]  # weight -> this worker's part of it as levels: int8 [numel of the shard]


class Layers:
    """The layers of a model in training, and a sample of the levels with which they began."""

    def __init__(self, engine: Engine):
        """Before anything is measured, `remember` or `recall` must know the first levels."""
        self.engine = engine
        self.first: dict[str, Levels] = {}  # by the grid that the forward pass has: of whole tensors, samples
        self.file = engine.config.run_dir / FIRST_LEVELS

    def remember(self) -> None:
        """The levels of the weights as they are now are the run's first; on every worker."""
        for step in (self.engine.config.train.steps, 1):
            viewed = self.viewed(step)
            if self.grid is not None and self.grid.name not in self.first:
                self.first[self.grid.name] = self._whole_sample(viewed)
        if self.engine.rank != 0 or not self.first:
            return
        named = {f"{grid}/{name}": part for grid, parts in self.first.items() for name, part in parts.items()}
        with suppress(OSError, SafetensorError):  # a full disk is reported elsewhere
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(self.file) as draft:
                save_file(named, draft)

    def recall(self) -> bool:
        """Know the first levels from the run's folder; on every worker, as worker 0 has read them.

        False if they are not there, as in the folder of an earlier version's run.
        """
        read = [self._read() if self.engine.rank == 0 else None]
        dist.broadcast_object_list(read)
        self.first = read[0] or {}
        return read[0] is not None

    def _read(self) -> dict[str, Levels] | None:
        config = self.engine.config
        grids = [method.forward_grid for method in config.method.stages(config.train.steps)]
        first: dict[str, Levels] = {grid.name: {} for grid in grids if grid is not None}
        try:
            for key, part in load_file(self.file).items() if first else ():
                grid, _, name = key.partition("/")
                first[grid][name] = part
                if len(part) != len(_sampled(self.engine.numels[name])):
                    return None
        except (OSError, KeyError, SafetensorError):
            return None
        return first if all(first.values()) else None

    @property
    def grid(self) -> Grid | None:
        return self.engine.method.forward_grid

    @property
    def are_viewed(self) -> bool:
        return self.grid is not None and self.grid != self.engine.method.stored

    def viewed(self, step: int) -> Levels:
        """The weights whose levels a view makes in step `step`; empty where levels are the stored codes."""
        self.engine.turn(step)
        return self._viewed()

    def _viewed(self) -> Levels:
        if not self.are_viewed:
            return {}
        levels: Levels = {}
        shards = {shard.name: shard for shard in self.engine.shards}
        for name in self.engine.linear_weights:
            with self.engine.full_weight(name) as weight:
                whole = self.engine.method.levels(weight)
            if whole is not None:
                shard = shards.get(name)  # a worker may have none of it
                start, n = (shard.start, shard.numel) if shard is not None else (0, 0)
                levels[name] = whole.reshape(-1)[start : start + n].clone()
        return levels

    def measure(self, before: Levels, update: Update) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
        """After an update: LAYER_METRICS of all low-bit weights together, with `flip_rate` where a view makes
        the levels; and the numbers of each layer.  `before` is what `viewed` gave before the update.
        """
        names = self.engine.low_bit if not self.are_viewed else list(before)
        layers: dict[str, dict[str, float]] = {name: {} for name in names}
        metrics: dict[str, float] = {}
        if self.grid is not None and names:
            after = self._viewed()
            counts, flips = self._counts(names, before, after, update)
            if not (total := counts.sum(0)).sum():
                return {}, {}
            metrics = {name: metric(total, self.grid) for name, metric in LAYER_METRICS.items()}
            if self.are_viewed:
                metrics["flip_rate"] = sum(flips) / int(total.sum())
            distances = self._distances(names, after)
            for name, of_layer, n_flips, distance in zip(names, counts, flips, distances, strict=True):
                layers[name] = {
                    "flip_rate": n_flips / int(of_layer.sum()),
                    **{metric: of(of_layer, self.grid) for metric, of in LAYER_METRICS.items()},
                    "distance": distance,
                }
        for name in {*self.engine.linear_weights, *names}:
            if math.isfinite(norm := update.norms_of.get(name, math.nan)):  # JSON has no word for others
                layers.setdefault(name, {})["grad_norm"] = norm
        return metrics, {name: layers[name] for name in self.engine.numels if layers.get(name)}

    def _counts(
        self, names: list[str], before: Levels, after: Levels, update: Update
    ) -> tuple[Tensor, list[int]]:
        """Over all workers: how many elements of each layer are at each level, and how many flipped."""
        assert self.grid is not None, "there are levels"
        rows = {name: i for i, name in enumerate(names)}
        counts = torch.zeros(len(names), self.grid.n_levels + 1, dtype=torch.int64, device=self.engine.device)
        for name, levels in after.items():
            counts[rows[name], :-1] = torch.bincount(
                levels.int() - self.grid.low, minlength=self.grid.n_levels
            )
            counts[rows[name], -1] = (levels != before[name]).sum()
        if not self.are_viewed:
            for shard in self.engine.shards:
                if shard.codes is not None and shard.numel:
                    counts[rows[shard.name], :-1] = shard.level_counts()
        dist.all_reduce(counts)
        if not self.are_viewed:
            return counts[:, :-1].cpu(), [update.flips_of.get(name, 0) for name in names]
        return counts[:, :-1].cpu(), counts[:, -1].tolist()

    def _distances(self, names: list[str], after: Levels) -> list[float]:
        """Over all workers, of the sampled elements."""
        assert self.grid is not None, "there are levels"
        now, first = self._sample(after), self.first[self.grid.name]
        sums = torch.zeros(len(names), 2, dtype=torch.int64)
        shards = {shard.name: shard for shard in self.engine.shards}
        for i, name in enumerate(names):
            if name in now:
                moved = (now[name].int() - first[name][_is_here(shards[name])].int()).abs()
                sums[i, 0], sums[i, 1] = moved.sum(), len(moved)
        sums = sums.to(self.engine.device)
        dist.all_reduce(sums)
        return [moved / max(n, 1) for moved, n in sums.tolist()]

    def _sample(self, viewed: Levels) -> Levels:  # of this worker's shards, on the host
        samples: Levels = {}
        for shard in self.engine.shards:
            at = _sampled(math.prod(shard.shape))[_is_here(shard)] - shard.start
            if shard.name in viewed:
                samples[shard.name] = viewed[shard.name][at.to(self.engine.device)].cpu()
            elif shard.codes is not None and shard.grid is not None and not self.are_viewed:
                blocks = shard.codes.view(-1, shard.grid.bytes_per_block)[at[::BLOCK] // BLOCK]
                samples[shard.name] = ops.unpack(blocks.reshape(-1), grid=shard.grid).cpu()
        return samples

    def _whole_sample(self, viewed: Levels) -> Levels:  # of whole tensors, on the host
        here = self._sample(viewed)
        names = list(viewed) if self.are_viewed else self.engine.low_bit
        least = torch.iinfo(torch.int8).min  # of an element that is on other workers; some may be on several
        whole = {
            name: torch.full(_sampled(self.engine.numels[name]).shape, least, dtype=torch.int8)
            for name in names
        }
        for shard in self.engine.shards:
            if shard.name in here:
                whole[shard.name][_is_here(shard)] = here[shard.name]
        if not whole:
            return {}
        flat = torch.cat(list(whole.values())).to(self.engine.device)
        dist.all_reduce(flat, op=dist.ReduceOp.MAX)
        parts = flat.cpu().split([len(part) for part in whole.values()])
        return dict(zip(whole, parts, strict=True))


def _sampled(numel: int) -> Tensor:
    """Elements of a tensor that are in its sample: whole blocks, evenly spread over it."""
    n_blocks = -(-numel // BLOCK)
    blocks = torch.arange(0, n_blocks, max(1, n_blocks // SAMPLE_BLOCKS))
    at = (blocks[:, None] * BLOCK + torch.arange(BLOCK)).reshape(-1)
    return at[at < numel]


def _is_here(shard: Shard) -> Tensor:  # bool
    """Which elements of its tensor's sample a shard has."""
    at = _sampled(math.prod(shard.shape))
    return (at >= shard.start) & (at < shard.start + shard.numel)


def _share(some: Tensor, counts: Tensor) -> float:
    return int(some.sum()) / int(counts.sum())


def _entropy(counts: Tensor) -> float:
    shares = counts[counts > 0].double() / counts.sum()
    return float(-(shares * shares.log2()).sum())
