"""A low-bit tensor at rest, whole or a worker's part of it: what initialisation, checkpoints, evaluation and
exports hand to each other.
"""

from dataclasses import dataclass
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor

from lowbit_dist import ops
from lowbit_dist.grid import BLOCK, PLANE, Grid

# Scales live in float16: every export format stores them so, and a scale that survives the trip unchanged
# makes the export bit-exact.  The smallest normal number keeps a tensor of zeros from having no scale at
# all.
SMALLEST_SCALE = 2.0**-14


def representable(scale: Tensor) -> Tensor:
    """`scale` rounded to the nearest positive normal float16, as float32."""
    return scale.clamp(SMALLEST_SCALE, 65504.0).half().float()


@dataclass(frozen=True)
class PackedTensor:
    """weight = scale * level, element by element of the flattened tensor: element e has the scale number
    e // scale_every.  Levels are packed as grid.py describes, 256 to a block.

        [2, 512], scale_every 128:   row 0  | s0  | s1  | s2  | s3  |      scale [8]
                                     row 1  | s4  | s5  | s6  | s7  |

    With more than one plane the weight is their sum: codes and scales of all follow one another, plane by
    plane.
    """

    codes: Tensor  # [planes * numel / 256 * grid.bytes_per_block] uint8
    scale: Tensor  # [planes * numel / scale_every] float32; of a stored weight float16-representable
    scale_every: int  # elements that a scale serves: of a group (64, 128, ...), a row, or the whole tensor
    grid: Grid
    shape: tuple[int, ...]
    planes: int = 1

    @classmethod
    def quantize(cls, weight: Tensor, scale: Tensor, grid: Grid) -> "PackedTensor":
        """Each weight [rows, K] or [K] rounded to the nearest level (ties to even), saturating at the
        grid's ends; each of the `scale`s [any number that divides the elements] serves as many of them.
        """
        every = weight.numel() // len(scale)
        check_shape(weight.shape, every)
        codes = ops.encode(weight.reshape(-1).float(), scale, grid=grid, scale_every=every)
        return cls(codes, scale, every, grid, tuple(weight.shape))

    @classmethod
    def of_levels(cls, levels: Tensor, scale: Tensor, grid: Grid) -> "PackedTensor":
        """Levels [rows, K] of any type, and scales of any shape, each of as many consecutive elements.

        One of several rows, but not of all, stands for each of them.  A scale of 0, whose levels are all 0,
        is 1 then: readers may divide by it.
        """
        scale = scale.reshape(-1)
        if 1 < len(scale) < len(levels):
            scale = scale.repeat_interleave(len(levels) // len(scale))
        every = levels.numel() // len(scale)
        check_shape(levels.shape, every)
        scale = scale.where(scale > 0, torch.ones_like(scale))
        codes = ops.pack(levels.reshape(-1).to(torch.int8), grid=grid)
        return cls(codes, scale, every, grid, tuple(levels.shape))

    @property
    def numel(self) -> int:
        return prod(self.shape)

    def levels(self) -> Tensor:  # `shape` int8; of several planes [planes, *shape]
        return ops.unpack(self.codes, grid=self.grid).view(self._stored)

    @property
    def _stored(self) -> tuple[int, ...]:
        return self.shape if self.planes == 1 else (self.planes, *self.shape)

    def as_shard(self) -> "PackedShard":
        """All of it, which one process has, whatever others have; it shares memory."""
        if self.planes > 1:
            raise ValueError(f"a weight of {self.planes} planes has no shards: it is not trained")
        return PackedShard(self.codes, self.scale, self.scale_every, self.grid, self.shape, first_block=0)

    def dequantize(self, dtype: torch.dtype) -> Tensor:  # `shape` float32 or bfloat16
        decoded = dtype if self.planes == 1 else torch.float32  # a sum is rounded once
        out = torch.empty(self.planes * self.numel, dtype=decoded, device=self.codes.device)
        ops.decode(
            self.codes, self.scale, grid=self.grid, first_block=0, scale_every=self.scale_every, out=out
        )
        out = out.view(self._stored)
        return out if self.planes == 1 else out.sum(0).to(dtype)


@dataclass(frozen=True)
class PackedShard:
    """A worker's run of whole blocks of a packed tensor, with the whole tensor's scales."""

    codes: Tensor  # [blocks * grid.bytes_per_block] uint8
    scale: Tensor  # [numel / scale_every] float32, of the whole tensor
    scale_every: int
    grid: Grid
    shape: tuple[int, ...]  # of the whole tensor
    first_block: int
    over_workers: bool = False  # others have the rest of the blocks, and compute the same of theirs

    def levels(self) -> Tensor:  # [256 * blocks] int8
        return ops.unpack(self.codes, grid=self.grid)

    def summed(self, counts: Tensor) -> Tensor:  # of whole numbers: the same on any number of workers
        """What has been counted in this part, over the whole tensor; changed in place."""
        if self.over_workers:
            dist.all_reduce(counts)
        return counts


def check_shape(shape: torch.Size | tuple[int, ...], scale_every: int) -> None:
    """ValueError unless a tensor of this shape can be packed with a scale for each `scale_every` elements.

    Its elements fill whole blocks of 256, on whose borders shards are cut; a scale serves whole planes of 64
    (a quarter of a block), and whole rows or a whole part of one.
    """
    numel = prod(shape)
    if numel % BLOCK:
        raise ValueError(
            f"a low-bit tensor must have a multiple of {BLOCK} elements, not {numel:,} {tuple(shape)}"
        )
    if scale_every != numel and (scale_every % PLANE or shape[-1] % scale_every):
        raise ValueError(
            f"a scale must serve the whole tensor, or a multiple of {PLANE} elements that divides a row of "
            f"{shape[-1]:,}, not {scale_every:,}"
        )
