"""The norm of all gradients, with the same bits however they are spread, and what it scales them by."""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lowbit_dist import ops


def clip_factor(norm: float, clip_norm: float) -> float:
    """What to multiply a gradient of norm `norm` with; a `clip_norm` of 0 does not clip."""
    return min(1.0, clip_norm / (norm + 1e-6)) if clip_norm else 1.0


def global_norm(gradients: Sequence[Tensor], *, copies: int = 1, over_workers: bool = True) -> Tensor:
    """L2 norm over the gradients of all workers (or of this process), float64 [1]: the same bits however the
    elements are spread over workers.  `copies` of each element are there, where workers hold the same ones.

    Squares are rounded to integers in units of max^2 / 2^k, whose sum does not depend on its order; k leaves
    headroom for as many elements as there are, so the error of a sum is below its count in those units.
    """
    largest = ops.largest(gradients)
    n = sum(g.numel() for g in gradients)
    count = torch.full((1,), n, dtype=torch.int64, device=largest.device)
    if over_workers:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        dist.all_reduce(count)
    if (most := largest.item()) == 0.0 or not math.isfinite(most):
        return largest
    unit = 2.0 ** (62 - max(1, int(count.item()) - 1).bit_length())
    total = ops.square_sum(gradients, largest, unit)
    if over_workers:
        dist.all_reduce(total)
    return ((total // copies).double() / unit).sqrt() * largest
