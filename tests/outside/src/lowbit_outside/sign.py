"""Sign weights: latent float weights, of which the forward pass sees the signs and one size.

    F(W) = mean|W| * sign(W),  sign(0) = 1        dW = dF where |W| <= clip, else 0

as in XNOR-Net (arXiv 1603.05279, eq. 6), with one size per tensor.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from lowbit_dist.grid import Grid
from lowbit_dist.linear import Linear
from lowbit_dist.methods import Method

GRID = Grid("sign", -1, 1, 2)  # no weight is at its level 0


class Sign(Method):
    name: Literal["sign"] = "sign"
    clip: Annotated[float, Field(gt=0, le=1e6)] = 1.0

    @property
    def label(self) -> str:
        return "sign weights"

    @property
    def forward_grid(self) -> Grid:
        return GRID

    def linear(self, layer: nn.Linear, *, name: str, is_head: bool, norm_eps: float) -> nn.Module:
        return Linear(layer) if is_head else Linear(layer, view=Signs(self.clip))

    def levels(self, weight: Tensor) -> Tensor:
        return torch.where(weight < 0, -1, 1).to(torch.int8)


class Signs:
    def __init__(self, clip: float):
        self.clip = clip

    def forward(self, w: Tensor) -> tuple[Tensor, None]:  # [N, K]
        size = w.float().abs().mean().to(w.dtype)
        return torch.where(w < 0, -size, size), None

    def backward(self, w: Tensor, dw: Tensor, dbias: Tensor | None) -> Tensor:
        return torch.where(w.abs() <= self.clip, dw, 0)
