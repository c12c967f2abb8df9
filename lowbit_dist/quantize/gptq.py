"""GPTQ (arXiv 2210.17323), symmetric, as QuantLM has it (Spectra, arXiv 2407.12327).

A weight is rounded column by column, and the columns that are still to come make up for what each rounding
has cost the layer's output, as far as its calibration inputs x tell:

    H = 2/n sum x x^T + damping * mean(diag H)      U = upper Cholesky factor of H^-1
    q_j = nearest level of w_j                       e = (w_j - q_j) / U_jj
    w_k = w_k - e U_jk    for k > j

With a diagonal H nothing is made up for: it is rounding to nearest.  An input that is always zero has no
weight.  The scale of a group is that of its weights as they are when its first column is reached.

`act_order`: columns whose inputs are large are rounded first, while many are left to make up for them: within
their group, and whole groups.  So no group is torn, and where a column stands need not be stored.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from lowbit_dist.grid import GRIDS
from lowbit_dist.methods.dqt import DQT
from lowbit_dist.methods.method import GROUP, Group
from lowbit_dist.packed import PackedTensor, representable
from lowbit_dist.quantize.quantizer import Bits, Gram, Granularity, Quantizer, uniform

COLUMNS = 128  # between two updates of all that are left, where groups do not say


class GPTQ(Quantizer):
    name: Literal["gptq"] = "gptq"
    bits: Bits = 4
    granularity: Granularity = "group"
    group: Group = GROUP
    damping: Annotated[float, Field(gt=0, le=1)] = 0.01
    act_order: bool = True
    needs_calibration: ClassVar[bool] = True

    @property
    def method(self) -> DQT:
        return uniform(f"int{self.bits}", self.granularity, self.group)

    def layer(self, weight: Tensor, gram: Gram | None) -> PackedTensor:
        if gram is None or not gram.is_enough:
            return self.method.quantize(weight)
        grid, (n_rows, n_columns) = GRIDS[f"int{self.bits}"], weight.shape
        size = self.group if self.granularity == "group" else n_columns
        hessian = gram.total * (2 / gram.n_tokens)
        order = torch.arange(n_columns, device=weight.device)
        if self.act_order:
            order = _order(hessian.diagonal(), size)
        w, hessian = weight[:, order], hessian[order][:, order]
        dead = hessian.diagonal() == 0
        hessian[dead, dead] = hessian.diagonal().mean() if not dead.all() else 1.0
        w[:, dead] = 0
        u = inverse_factor(hessian, self.damping)

        step = size if size < n_columns else min(size, COLUMNS)
        levels = torch.empty(n_rows, n_columns, dtype=torch.int8, device=w.device)
        scales = torch.empty(n_rows, n_columns // size, device=w.device)
        for first in range(0, n_columns, step):
            last = min(first + step, n_columns)
            if first % size == 0:
                scale = absmax(w[:, first : first + size], grid.high)
                scales[:, order[first] // size] = scale
            errors = torch.empty(n_rows, last - first, device=w.device)
            for j in range(first, last):
                level = (w[:, j] / scale).round().clamp(grid.low, grid.high)
                levels[:, order[j]] = level.to(torch.int8)
                error = (w[:, j] - level * scale) / u[j, j]
                w[:, j:last] -= error[:, None] * u[j, j:last]
                errors[:, j - first] = error
            w[:, last:] -= errors @ u[first:last, last:]
        return PackedTensor.of_levels(levels, scales, grid)


def absmax(weight: Tensor, high: int) -> Tensor:  # [N, G] -> [N] float32
    """The size of a level of each row: the largest weight is at the highest level, as rounding to nearest has
    it.
    """
    return representable((weight.double().abs().amax(1) / high).float())


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:  # [K, K] float32, upper
    """The Cholesky factor of H^-1, which is damped more, up to once its mean diagonal, until there is one.

    ValueError if there is none.
    """
    mean = hessian.diagonal().mean()
    identity = torch.eye(len(hessian), device=hessian.device)
    while True:
        lower, wrong = torch.linalg.cholesky_ex(hessian + damping * mean * identity)
        if not wrong:
            upper, wrong = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not wrong and bool(upper.isfinite().all()):
                return upper
        if damping >= 1:
            raise ValueError(
                "its Hessian stays singular when its mean diagonal is added to it, so its inputs are not "
                "finite, or too large"
            )
        damping = min(1.0, 2 * damping)


def _order(diagonal: Tensor, group: int) -> Tensor:  # [K] -> [K] int64
    """Columns by falling diagonal within their group, groups by falling sum; ties as they stand."""
    groups = diagonal.view(-1, group)
    inside = groups.argsort(dim=1, descending=True, stable=True)
    columns = inside + torch.arange(0, len(diagonal), group, device=diagonal.device)[:, None]
    return columns[groups.sum(1).argsort(descending=True, stable=True)].view(-1)
