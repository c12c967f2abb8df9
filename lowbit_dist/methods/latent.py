"""What methods share whose weights are latent floats that the forward pass rounds to ternary levels."""

from typing import Protocol

import torch
from torch import Tensor

from lowbit_dist.grid import GRIDS, Grid
from lowbit_dist.linear import View
from lowbit_dist.methods.method import Method


class Rounding(View, Protocol):
    """A view that says of a weight which levels it sees."""

    def rounded(self, w: Tensor) -> tuple[Tensor, Tensor]:  # of [N, K]
        """Levels, float32, in any shape of as many elements, and what a level is worth, float32."""
        ...


class LatentTernary(Method):
    """Latent float weights, seen through `view`."""

    @property
    def forward_grid(self) -> Grid:
        return GRIDS["ternary"]

    @property
    def view(self) -> Rounding:
        raise NotImplementedError(f"method {self.name} has no view")

    def levels(self, weight: Tensor) -> Tensor:
        return self.view.rounded(weight)[0].view(weight.shape).to(torch.int8)
