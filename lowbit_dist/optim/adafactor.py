"""Adafactor (arXiv 1804.04235): the second moment of a matrix [rows, K] as the product of what its rows and
its columns have in common, so that a state of rows + K numbers serves all its elements.

    r  <-  b r + (1 - b) mean over a row of (g^2 + eps)           [rows]
    c  <-  b c + (1 - b) mean over a column of (g^2 + eps)        [K]
    v   =  r c / mean(r)                                          b = 1 - step^-0.8
    u   =  g / sqrt(v),  divided by max(1, rms(u) / clip_rms)

A vector is a matrix of one row, whose v is its c, a number for each element; a tensor of more dimensions is
one of the rows of its last.  The rate is `optimizer.lr` and its schedule: the paper's proportion to the
weight's size and its 1 / sqrt(step) are left out, as is its momentum, which it does without by default.

A worker has all of r and c and its shard of g, so that no gradient is gathered, but their sums are: two small
vectors a tensor.  They have the same bits however the elements are spread over workers: before it is added, a
square is rounded to a multiple of a unit, of which a float64 counts exactly as many as come together.  Roots
are taken of r and c, in float64, and each element is divided by their product.
"""

import math
from typing import Annotated, ClassVar, Literal

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor
from torch.nn.functional import pad

from lowbit_dist import ops
from lowbit_dist.ops.states import Slot, Stored
from lowbit_dist.optim.clipping import global_norm
from lowbit_dist.optim.rule import Rule
from lowbit_dist.section import Beta, setting

DECAY = 0.8
LEAST_EPS = 1e-30  # must not vanish in float32
CHUNK = 1 << 20  # elements: bounds the float64 copies


class Adafactor(Rule):
    name: Literal["adafactor"] = "adafactor"
    states: Literal["fp32"] = setting(
        "fp32", "What the means of rows and columns are kept in: they are too few to be worth rounding."
    )
    beta: Beta | None = setting(
        None, "How much of the mean squares stays in a step; null is the paper's 1 - step^-0.8."
    )
    eps: Annotated[float, Field(ge=LEAST_EPS, le=1)] = setting(
        LEAST_EPS, "What is added to the square of each gradient."
    )
    clip_rms: Annotated[float, Field(ge=0, le=100)] = setting(
        1.0,
        "Directions whose root mean square over a weight is larger are scaled down to it; 0 does not clip.",
    )

    slots: ClassVar = (Slot("rows", signed=False, per="row"), Slot("columns", signed=False, per="column"))
    scope: ClassVar = "shard"

    def kept(self, step: int) -> float:
        """The share of the mean squares that stays; a constant one is corrected for its start at zero."""
        if self.beta is None:
            return 1 - step**-DECAY
        return self.beta * (1 - self.beta ** (step - 1)) / (1 - self.beta**step)

    def step_(
        self,
        target: ops.Codes | ops.Weights,
        grad: Tensor,
        state: list[Stored],
        *,
        now: ops.Now,
        shape: tuple[int, ...],
        start: int = 0,
        over_workers: bool = False,
    ) -> Tensor:
        n, k = grad.numel(), (1, *shape)[-1]
        first, before = divmod(start if n else 0, k)  # a shard without elements is one row of zeros
        g = pad(grad.float(), (before, -(before + n) % k if n else k)).mul_(now.grad_scale).view(-1, k)
        rows, columns = (stored.values for stored in state)
        kept = self.kept(now.update)
        means = _mean_squares(g, first, len(rows), over_workers=over_workers)
        for moved, mean in zip((rows, columns), means, strict=True):
            moved.copy_(moved.double() * kept + (mean + self.eps) * (1 - kept))
        of_row = (rows.double() / _mean(rows.double())).sqrt().float()[first : first + len(g), None]
        u = g.div_(of_row * columns.double().sqrt().float()).view(-1)[before : before + n]
        if self.clip_rms:
            count = math.prod(shape)
            rms = global_norm([u], count, over_workers=over_workers) / math.sqrt(count)
            u.div_((rms / self.clip_rms).clamp_(min=1).float())
        return ops.apply_(target, u, now=now) if n else torch.zeros(1, dtype=torch.int64, device=u.device)


def _mean_squares(
    g: Tensor,  # [n, K] float32: rows `first` to `first + n - 1`, zeros where they are not of this worker
    first: int,
    rows: int,  # of the whole tensor
    *,
    over_workers: bool,
) -> tuple[Tensor, Tensor]:  # [rows], [K] float64
    """Of each row and each column of the whole tensor."""
    n, k = g.shape
    largest = torch.zeros(rows + k, dtype=torch.float64, device=g.device)
    sums = torch.zeros_like(largest)
    for of, dim in ((slice(first, first + n), 1), (slice(rows, None), 0)):
        low, high = torch.aminmax(g, dim=dim)
        largest[of] = torch.maximum(-low, high).double().square_()
    if over_workers:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    units = torch.cat([_unit(largest[:rows], k), _unit(largest[rows:], rows)])
    for at in range(0, n, step := max(1, CHUNK // k)):
        squares = g[at : at + step].double().square_()
        here = slice(first + at, first + at + len(squares))
        sums[here] = (squares / units[here, None]).round_().sum(1)
        sums[rows:] += (squares / units[rows:]).round_().sum(0)
    if over_workers:
        dist.all_reduce(sums)
    sums *= units
    return sums[:rows] / k, sums[rows:] / rows


def _mean(x: Tensor) -> Tensor:  # [N] float64, none below 0 -> []
    unit = _unit(x.max(), len(x))
    return (x / unit).round_().sum() * unit / len(x)


def _unit(largest: Tensor, count: int) -> Tensor:  # float64
    """Of which a float64 counts exactly what `count` numbers up to `largest` have together, in any order."""
    return largest.clamp(min=1e-200) * 2.0 ** (count.bit_length() - 52)
