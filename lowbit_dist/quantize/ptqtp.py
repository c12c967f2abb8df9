"""PTQTP (arXiv 2509.16989): each group of a row is a sum of ternary planes, found without any data.

    w = a_1 T_1 + a_2 T_2      T in {-1, 0, 1}^G;  two planes: nine levels

The authors have published no code.  This follows their algorithm 1: all planes begin as sign(w); then in turn
the scales are solved for, a = (S S^T + ridge)^-1 S w with S = [T_1, T_2], and each element takes the nearest
of all combinations of trits.  Neither makes the error larger, so it falls until a group stops.  The planes
begin equal, and S S^T singular: the ridge is what makes the first solution possible, and of combinations
of trits with one sum the sparser is taken, then that of the later plane, by which planes part.

`tied`: scales of planes are 9 : 3 : 1, so that the levels of a group are evenly spaced (two planes: -4 to 4)
and the weight is a tensor of whole numbers, which exports know.
"""

from __future__ import annotations

from itertools import product
from typing import Annotated, Literal

import torch
from pydantic import BeforeValidator
from torch import Tensor

from lowbit_dist import ops
from lowbit_dist.grid import GRIDS, Grid
from lowbit_dist.methods.dqt import DQT
from lowbit_dist.methods.method import GROUP, Group
from lowbit_dist.packed import PackedTensor, representable
from lowbit_dist.quantize.quantizer import Gram, Quantizer, uniform
from lowbit_dist.section import no_truth

ROUNDS = 50  # at most
STILL = 1e-4  # of a group's mean magnitude: scales that move less have been found
CONDITION = 1e6  # of S S^T: what is worse gets ten times the ridge
SMALLEST_RIDGE, LARGEST_RIDGE = 1e-8, 1.0
AT_ONCE = 1 << 22  # weights


class PTQTP(Quantizer):
    name: Literal["ptqtp"] = "ptqtp"
    planes: Annotated[Literal[1, 2, 3], BeforeValidator(no_truth)] = 2
    tied: bool = False
    group: Group = GROUP

    @property
    def method(self) -> DQT:
        return uniform(self._grid.name, "group", self.group)

    @property
    def summed_planes(self) -> int:
        return 1 if self.tied else self.planes

    @property
    def _highest(self) -> int:
        """Of the levels of tied planes: 1, 4 or 13."""
        return (3**self.planes - 1) // 2

    @property
    def _grid(self) -> Grid:
        """The smallest that has the levels."""
        if self.summed_planes == self.planes:
            return GRIDS["ternary"]
        holding = (grid for grid in GRIDS.values() if -grid.low >= self._highest <= grid.high)
        return min(holding, key=lambda grid: grid.bits)

    def layer(self, weight: Tensor, gram: Gram | None) -> PackedTensor:
        scales, levels = [], []
        for groups in weight.reshape(-1, self.group).split(max(1, AT_ONCE // self.group)):
            if self.summed_planes == self.planes:
                scale, level = fit(groups, self.planes)
            else:
                scale, level = fit_tied(groups, self._highest)
            scales.append(scale)
            levels.append(level)
        return PackedTensor(
            ops.pack(torch.cat(levels, dim=1).reshape(-1), grid=self._grid),
            torch.cat(scales, dim=1).reshape(-1),
            self.group,
            self._grid,
            tuple(weight.shape),
            self.summed_planes,
        )


def fit(w: Tensor, planes: int, rounds: int = ROUNDS) -> tuple[Tensor, Tensor]:
    """Of groups [P, G]: scales [planes, P] float32, float16-representable, and trits [planes, P, G] int8; the
    plane of the largest scale is the first.
    """
    trits = w.sign().expand(planes, -1, -1)
    scale = torch.zeros(planes, len(w), device=w.device)
    error = torch.full((len(w),), torch.inf, device=w.device)
    moving = torch.arange(len(w), device=w.device)
    trits = trits.clone()
    for _ in range(rounds):
        part = w[moving]
        new = _scales(part, trits[:, moving])
        chosen = _nearest(part, new)
        cost = squared_error(part, new, chosen)
        is_better = cost < error[moving]
        distance = (new - scale[:, moving]).abs().amax(0)
        better = moving[is_better]
        scale[:, better], trits[:, better] = new[:, is_better], chosen[:, is_better]
        error[better] = cost[is_better]
        moving = moving[is_better & (distance >= STILL * part.abs().mean(1))]
        if not len(moving):
            break
    scale = representable(scale.abs().sort(dim=0, descending=True).values)
    return scale, _nearest(w, scale).to(torch.int8)


def fit_tied(w: Tensor, highest: int, rounds: int = ROUNDS) -> tuple[Tensor, Tensor]:
    """Of groups [P, G]: the size of a level [1, P], float16-representable, and levels from -highest to
    highest [1, P, G] int8.
    """
    tiny = torch.finfo(torch.float32).tiny
    scale = (w.abs().amax(1) / highest).clamp(min=tiny)
    levels = _rounded(w, scale, highest)
    error = squared_error(w, scale[None], levels[None])
    for _ in range(rounds):
        new = ((levels * w).sum(1) / levels.square().sum(1).clamp(min=1)).clamp(min=tiny)
        chosen = _rounded(w, new, highest)
        cost = squared_error(w, new[None], chosen[None])
        is_better = cost < error
        if not is_better.any():
            break
        scale, error = torch.where(is_better, new, scale), torch.where(is_better, cost, error)
        levels = torch.where(is_better[:, None], chosen, levels)
    scale = representable(scale)
    return scale[None], _rounded(w, scale, highest).to(torch.int8)[None]


def squared_error(w: Tensor, scale: Tensor, trits: Tensor) -> Tensor:  # [P]
    """Of each group [P, G], of scales [planes, P] and trits [planes, P, G]."""
    return (w - (scale[..., None] * trits).sum(0)).double().square().sum(1).float()


def _scales(w: Tensor, trits: Tensor) -> Tensor:  # [planes, P] float32
    """The least-squares scales of these trits."""
    products = torch.einsum("ipg,jpg->pij", trits, trits).double()
    with_weight = torch.einsum("ipg,pg->pi", trits, w).double()
    eigenvalues = torch.linalg.eigvalsh(products).clamp(min=0)  # ascending
    smallest, largest = eigenvalues[:, 0], eigenvalues[:, -1]
    ridge = torch.full_like(smallest, SMALLEST_RIDGE)
    while (is_bad := (largest + ridge > CONDITION * (smallest + ridge)) & (ridge < LARGEST_RIDGE)).any():
        ridge = torch.where(is_bad, (10 * ridge).clamp(max=LARGEST_RIDGE), ridge)
    products.diagonal(dim1=1, dim2=2).add_(ridge[:, None])
    return torch.linalg.solve(products, with_weight).t().float()


def _nearest(w: Tensor, scale: Tensor) -> Tensor:  # [planes, P, G] float32
    """The trits whose sum is nearest to each weight, of equal sums the first of `_combinations`."""
    combinations = torch.tensor(_combinations(len(scale)), dtype=torch.float32, device=w.device)
    sums, order = (scale.t() @ combinations.t()).sort(dim=1, stable=True)
    place = torch.searchsorted((sums[:, 1:] + sums[:, :-1]) / 2, w)  # between two: the nearer one
    first = torch.searchsorted(sums, sums)
    return combinations[order.gather(1, first.gather(1, place))].movedim(-1, 0)


def _combinations(planes: int) -> list[tuple[int, ...]]:
    """Of trits: zero, then those of one plane, the last plane first, then those of two."""
    return sorted(
        product((1, 0, -1), repeat=planes), key=lambda trits: [sum(map(abs, trits)), *map(abs, trits)]
    )


def _rounded(w: Tensor, scale: Tensor, highest: int) -> Tensor:
    return (w / scale[:, None]).round().clamp(-highest, highest)
