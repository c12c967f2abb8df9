"""The norm of all gradients, with the same bits however they are spread, and what it scales them by."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lowbit_dist import ops


def clip_factor(norm: float, clip_norm: float) -> float:
    """What to multiply a gradient of norm `norm` with; a `clip_norm` of 0 does not clip."""
    return min(1.0, clip_norm / (norm + 1e-6)) if clip_norm else 1.0


def global_norm(
    gradients: Sequence[Tensor], count: int, *, copies: int = 1, over_workers: bool = True
) -> Tensor:  # [1] float64, on their device; infinity if an element is not finite
    """L2 norm over the `count` elements of the gradients of all workers (or of this process): the same bits
    however they are spread over workers.  `copies` of each element are among them, where workers hold the
    same ones.  Nothing waits for the device.

    Squares are rounded to integers in units of max^2 / 2^k, whose sum does not depend on its order; k leaves
    headroom for as many elements as there are, so the error of a sum is below its count in those units.
    """
    largest = ops.largest(gradients)
    if over_workers:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    unit = 2.0 ** (62 - max(1, count - 1).bit_length())
    total = ops.square_sum(gradients, torch.where(largest > 0, largest, 1.0), unit)
    if over_workers:
        dist.all_reduce(total)
    norm = ((total // copies).double() / unit).sqrt() * largest
    return torch.where(torch.isfinite(largest), norm, largest)
