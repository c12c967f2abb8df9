"""Rules that must see whole rows or the whole matrix, where every worker has a part: of as many matrices as
there are workers, each sees one.

                    parts of                               parts of the directions
    worker 0        A B C                A, computes       of A B C
    worker 1        A B C   all-to-all   B, computes       of A B C
    worker 2        A B C                C, computes       of A B C
"""

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from lowbit_dist.optim.rule import Rule


class Matrix(NamedTuple):
    """What `Rule.update` asks for, on one of the workers."""

    rule: Rule
    shape: tuple[int, ...]
    padded: int  # elements of a worker's part with padding, as many on each
    parts: list[Tensor]  # this worker's of the gradient and of each slot: [n] float32, n up to `padded`


def updated(matrices: Sequence[Matrix], *, step: int) -> list[list[Tensor]]:
    """This worker's parts of the direction and of each slot's new value, for each of some matrices, at most
    as many as there are workers; on every worker.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    sizes = [len(m.parts) * m.padded for m in matrices] + [0] * (world - len(matrices))
    own_sizes = [sizes[rank]] * world
    sent = torch.cat([pad(part, (0, m.padded - len(part))) for m in matrices for part in m.parts])
    whole = _exchanged(sent, sizes, own_sizes)
    del sent
    if rank < len(matrices):
        whole = _update(matrices[rank], whole, step)
    moved = _exchanged(whole, own_sizes, sizes).split(sizes)
    return [
        [values[: len(part)] for values, part in zip(flat.view(-1, m.padded), m.parts, strict=True)]
        for m, flat in zip(matrices, moved, strict=False)
    ]


def _update(m: Matrix, whole: Tensor, step: int) -> Tensor:  # [workers * parts * padded], of both
    """From the parts of all workers those of what the rule makes of them."""
    n, n_parts, world = prod(m.shape), len(m.parts), dist.get_world_size()
    by_part = whole.view(world, n_parts, m.padded).transpose(0, 1).reshape(n_parts, world * m.padded)
    moved = m.rule.update(*(values[:n].view(m.shape) for values in by_part), step=step)
    flat = pad(torch.stack([x.reshape(-1) for x in moved]), (0, world * m.padded - n))
    return flat.view(n_parts, world, m.padded).transpose(0, 1).reshape(-1)


def _exchanged(sent: Tensor, to_each: list[int], from_each: list[int]) -> Tensor:
    received = sent.new_empty(sum(from_each))
    dist.all_to_all_single(received, sent, from_each, to_each)
    return received
