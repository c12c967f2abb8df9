"""Tequila (arXiv 2509.23809): ternary weights in groups, whose zeros still act, as a bias of their row.

    y = x . Q(W)^T + c,    c_o = reactivation * the sum of W_oj over row o's dead zone D, where Q(W) is 0

The gradient goes straight through Q; to that of a weight in the dead zone reactivation * dL/dc_o is added.
In the end c is a constant of each row: `finished` makes a bias of it, and what leaves is a ternary layer with
a bias.

The authors start from a pretrained model and train without weight decay at a constant or decaying rate of
1e-4; activations are not quantised.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from lowbit_dist import ops
from lowbit_dist.grid import PLANE
from lowbit_dist.linear import IntPerToken, Linear
from lowbit_dist.methods.latent import LatentTernary
from lowbit_dist.methods.method import GROUP, Group
from lowbit_dist.packed import PackedTensor, representable
from lowbit_dist.section import setting


class Tequila(LatentTernary):
    name: Literal["tequila"] = "tequila"
    group: Group = setting(
        GROUP, f"How many consecutive weights of a row share a scale; a multiple of {PLANE}.", unit="weights"
    )
    reactivation: Annotated[float, Field(ge=0, le=1)] = setting(
        1e-3, "The share of each weight in the dead zone that its row's bias has (the paper's lambda)."
    )
    activation_bits: Literal[8] | None = setting(
        None,
        "Inputs of ternary layers are rounded to so many bits for each token; null does not.",
        unit="bits",
    )

    def linear(self, layer: nn.Linear, *, name: str, is_head: bool, norm_eps: float) -> nn.Module:
        if is_head:
            return Linear(layer)
        if layer.in_features % self.group:
            raise ValueError(f"a group of {self.group:,} does not divide a row of {layer.in_features:,}")
        activation = None if self.activation_bits is None else IntPerToken(self.activation_bits)
        return Linear(layer, view=self.view, activation=activation)

    @property
    def view(self) -> "DeadZoneBias":
        return DeadZoneBias(self.group, self.reactivation)

    def finished(self, name: str, weight: PackedTensor | Tensor) -> dict[str, PackedTensor | Tensor]:
        """A ternary weight and the bias that its dead zone was."""
        assert isinstance(weight, Tensor), "the weights of this method are latent"
        levels, alpha = self.view.rounded(weight)
        grid = self.forward_grid
        codes = ops.pack(levels.to(torch.int8).view(-1), grid=grid)
        ternary = PackedTensor(codes, representable(alpha.view(-1)), self.group, grid, tuple(weight.shape))
        return {name: ternary, f"{name.removesuffix('weight')}bias": self.view.bias(weight, levels)}


class DeadZoneBias:
    """Ternary in groups along the rows: alpha = mean|w|, +-alpha where |w| >= alpha / 2, else 0 (the dead
    zone), and the bias of what is 0.
    """

    def __init__(self, group: int, reactivation: float):
        self.group, self.reactivation = group, reactivation

    def rounded(self, w: Tensor) -> tuple[Tensor, Tensor]:  # of [N, K]: [groups, group], [groups, 1]
        groups = w.float().reshape(-1, self.group)
        alpha = groups.abs().mean(1, keepdim=True)
        return (groups >= alpha / 2).float() - (groups <= -alpha / 2).float(), alpha

    def bias(self, w: Tensor, levels: Tensor) -> Tensor:  # [N] float32
        return self.reactivation * w.float().masked_fill(levels.view(w.shape) != 0, 0).sum(1)

    def forward(self, w: Tensor) -> tuple[Tensor, Tensor]:
        levels, alpha = self.rounded(w)
        bias = self.bias(w, levels)
        return levels.mul_(alpha).view(w.shape).to(w.dtype), bias

    def backward(self, w: Tensor, dw: Tensor, dbias: Tensor | None) -> Tensor:
        assert dbias is not None, "forward gives a bias"
        is_dead = self.rounded(w)[0].view(w.shape) == 0
        return dw + is_dead * (self.reactivation * dbias[:, None]).to(dw.dtype)
