"""The norm of all gradients, with the same bits however they are spread, and what it scales them by."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def clip_factor(norm: float, clip_norm: float) -> float:
    """What to multiply a gradient of norm `norm` with; a `clip_norm` of 0 does not clip."""
    return min(1.0, clip_norm / (norm + 1e-6)) if clip_norm else 1.0


def global_norm(gradients: Sequence[Tensor], *, copies: int = 1, over_workers: bool = True) -> Tensor:
    """L2 norm over the gradients of all workers (or of this process), float64 [1]: the same bits however the
    elements are spread over workers.  `copies` of each element are there, where workers hold the same ones.

    Squares are rounded to integers in units of max^2 / 2^k, whose sum does not depend on its order; k leaves
    headroom for as many elements as there are, so the error of a sum is below its count in those units.
    """
    device = gradients[0].device
    largest = torch.zeros(1, dtype=torch.float64, device=device)
    count = torch.zeros(1, dtype=torch.int64, device=device)
    for g in gradients:
        if g.numel():
            low, high = torch.aminmax(g)
            # maximum, unlike max(), keeps a NaN
            largest = torch.maximum(largest, torch.maximum(-low, high).double())
            count += g.numel()
    # gloo's MAX drops NaN; infinity survives it
    largest = torch.where(torch.isfinite(largest), largest, torch.inf)
    if over_workers:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        dist.all_reduce(count)
    if not torch.isfinite(largest).item() or largest.item() == 0.0:
        return largest
    unit = 2.0 ** (62 - max(1, int(count.item()) - 1).bit_length())
    total = torch.zeros(1, dtype=torch.int64, device=device)
    for g in gradients:
        for chunk in g.reshape(-1).split(1 << 20):  # bounds the float64 copies
            total += (chunk.double() / largest).square_().mul_(unit).round_().long().sum()
    if over_workers:
        dist.all_reduce(total)
    return ((total // copies).double() / unit).sqrt() * largest
