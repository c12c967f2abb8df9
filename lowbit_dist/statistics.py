"""What the levels of low-bit weights tell of a training: of every method the same, in its own levels.

A layer's levels are those that its forward pass multiplies with.  Where they are the stored codes, the codes
are counted as they lie in the shard, and the update has counted its flips; where a view makes them of a
latent weight or of finer codes, `Method.levels` is asked, before and after the update.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from lowbit_dist.grid import Grid
from lowbit_dist.zero import Engine, Update

# Of the numbers of elements at each level of the grid, from the lowest up: [grid.n_levels] int64.
LAYER_METRICS: dict[str, Callable[[Tensor, Grid], float]] = {
    "zero_fraction": lambda counts, grid: _share(counts[-grid.low : 1 - grid.low], counts),
    "saturation": lambda counts, grid: _share(counts[[0, -1]], counts),
}


def viewed_levels(engine: Engine) -> dict[str, Tensor]:
    """This worker's part of each weight whose levels a view makes, as levels: int8 [numel of the shard]."""
    method = engine.config.method
    if method.forward_grid is None or method.forward_grid == method.stored:
        return {}
    shards = {shard.name: shard for shard in engine.shards}
    viewed = {}
    for name in engine.linear_weights:
        with engine.full_weight(name) as weight:
            levels = method.levels(weight)
        if levels is not None:
            shard = shards.get(name)  # a worker may have none of it
            start, n = (shard.start, shard.numel) if shard is not None else (0, 0)
            viewed[name] = levels.reshape(-1)[start : start + n].clone()
    return viewed


def measure(
    engine: Engine, before: dict[str, Tensor], update: Update
) -> tuple[dict[str, float], dict[str, float]]:
    """Of all low-bit weights: LAYER_METRICS, and `flip_rate` where a view makes the levels; then the flip
    rate of each weight in `update`.  `before` is what `viewed_levels` gave before it.
    """
    grid = engine.config.method.forward_grid
    if grid is None or (grid != engine.config.method.stored and not before):
        return {}, {}
    after = viewed_levels(engine) if before else {}
    names = list(before) if before else engine.low_bit
    rows = {name: i for i, name in enumerate(names)}
    counts = torch.zeros(len(names), grid.n_levels + 1, dtype=torch.int64, device=engine.device)
    if before:
        for name, levels in after.items():
            counts[rows[name], :-1] = torch.bincount(levels.int() - grid.low, minlength=grid.n_levels)
            counts[rows[name], -1] = (levels != before[name]).sum()
    else:
        for shard in engine.shards:
            if shard.codes is not None and shard.numel:
                counts[rows[shard.name], :-1] = shard.level_counts()
    dist.all_reduce(counts)
    levels_of, flips = counts[:, :-1].cpu(), counts[:, -1].tolist()
    total = levels_of.sum(0)
    if not total.sum():
        return {}, {}
    metrics = {name: metric(total, grid) for name, metric in LAYER_METRICS.items()}
    if before:
        metrics["flip_rate"] = sum(flips) / int(total.sum())
        return metrics, {
            name: n / int(levels_of[rows[name]].sum()) for name, n in zip(names, flips, strict=True)
        }
    return metrics, {name: n / engine.numels[name] for name, n in update.flips_of.items()}


def _share(some: Tensor, counts: Tensor) -> float:
    return int(some.sum()) / int(counts.sum())
