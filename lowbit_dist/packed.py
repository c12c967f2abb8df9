"""A low-bit tensor at rest: what initialisation, checkpoints, evaluation and exports hand to each other."""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from lowbit_dist import ops
from lowbit_dist.grid import BLOCK, Grid

# Scales live in float16: every export format stores them so, and a scale that survives the trip unchanged
# makes the export bit-exact.  The smallest normal number keeps a tensor of zeros from having no scale at
# all.
SMALLEST_SCALE = 2.0**-14


def representable(scale: Tensor) -> Tensor:
    """`scale` rounded to the nearest positive normal float16, as float32."""
    return scale.clamp(SMALLEST_SCALE, 65504.0).half().float()


@dataclass(frozen=True)
class PackedTensor:
    """weight[i, j] = scale[i or 0] * level[i, j], the levels packed as ARCHITECTURE describes: 256 to a
    block.
    """

    codes: Tensor  # [numel / 256 * grid.bytes_per_block] uint8
    scale: Tensor  # [1] or [rows] float32, float16-representable
    grid: Grid
    shape: tuple[int, ...]

    @classmethod
    def quantize(cls, weight: Tensor, scale: Tensor, grid: Grid) -> "PackedTensor":
        """Each weight [rows, K] or [K] rounded to the nearest level (ties to even), saturating at the
        grid's ends.
        """
        check_shape(weight.shape)
        levels = ops.quantize(
            weight.reshape(-1).float(),
            scale,
            grid=grid,
            first_block=0,
            blocks_per_scale=weight.numel() // BLOCK // len(scale),
        )
        return cls(ops.pack(levels, grid=grid), scale, grid, tuple(weight.shape))

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def blocks_per_scale(self) -> int:
        return self.numel // BLOCK // len(self.scale)

    def levels(self) -> Tensor:  # `shape` int8
        return ops.unpack(self.codes, grid=self.grid).view(self.shape)

    def dequantize(self, dtype: torch.dtype) -> Tensor:  # `shape` float32 or bfloat16
        out = torch.empty(self.numel, dtype=dtype, device=self.codes.device)
        ops.decode(
            self.codes,
            self.scale,
            grid=self.grid,
            first_block=0,
            blocks_per_scale=self.blocks_per_scale,
            out=out,
        )
        return out.view(self.shape)


def check_shape(shape: torch.Size | tuple[int, ...]) -> None:
    """A block never crosses a row, so that a row's scale serves whole blocks and exports cut rows freely."""
    if shape[-1] % BLOCK:
        raise ValueError(f"a low-bit tensor's last dimension must be a multiple of {BLOCK}, not {shape[-1]}")
