"""Linear layers of a trained model that multiply integers: inputs of 8 bits with packed codes.

A method that rounds what its layers are given to 8 bits for each token has integers on both sides:

    y = Q(x) . (s L)^T  =  s / a * (q . L^T)        q: integers of a token, a of them to 1;  L: levels

So the sums are exact, a weight has one scale's share of rounding and no more, and no weight ever becomes a
float: what a ternary layer reads is 2 bits a weight.  Layers whose inputs are not rounded keep weights in the
model's precision.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowbit_dist import ops
from lowbit_dist.convert import PackedLinear, pack_
from lowbit_dist.grid import BLOCK, PLANE
from lowbit_dist.linear import IntPerToken, Linear, decodes, plain_product
from lowbit_dist.methods.method import Method
from lowbit_dist.packed import PackedTensor


class IntegerLinear(PackedLinear):
    """The method's layer, for inference alone."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]  # [..., K] -> [..., N]
        if self.norm is not None:
            x = self.norm(x)
        t = self.weight.packed.tensor
        y = ops.matmul(
            x.reshape(-1, x.shape[-1]).contiguous(),
            t.codes,
            t.scale,
            grid=t.grid,
            scale_every=t.scale_every,
            n=self.out_features,
        ).view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias


@dataclass(frozen=True)
class Integers:
    """What a layer multiplies with, as codes."""

    weight: PackedTensor
    bias: Tensor | None = None  # [N] float32, of the layer's view


def takes_integers(layer: Linear) -> bool:
    """Whether a layer rounds its inputs to 8 bits, and does nothing else with them."""
    return (
        decodes(layer)
        and type(layer.activation) is IntPerToken
        and layer.activation.bits == 8
        and layer.product is plain_product
        and layer.in_features <= ops.LONGEST_ROW
    )


def integers(layer: Linear, weight: PackedTensor | Tensor, method: Method) -> Integers | None:
    """What a layer, its view included, makes of its weight [N, K]; None if it does not multiply integers."""
    if not takes_integers(layer):
        return None
    if isinstance(weight, PackedTensor):
        # Of a sum of planes each would be multiplied alone.
        return Integers(weight) if layer.view is None and weight.planes == 1 else None
    grid, latent = method.forward_grid, weight.float()
    levels = None if grid is None else method.levels(latent)
    if layer.view is None or grid is None or levels is None or levels.numel() % BLOCK:
        return None
    values, bias = layer.view.forward(latent)
    for every in _parts(latent.shape):
        parts, of_levels = values.reshape(-1, every), levels.reshape(-1, every)
        scale = parts.abs().amax(1) / of_levels.abs().amax(1).clamp(min=1)
        if torch.equal(of_levels * scale[:, None], parts):
            return Integers(PackedTensor.of_levels(levels, scale, grid), bias)
    return None


def _parts(shape: torch.Size) -> Iterator[int]:
    """How many elements may share a scale: all, those of a row, or fewer."""
    yield shape.numel()
    yield from (n for n in range(shape[-1], 0, -1) if n % PLANE == 0 and shape[-1] % n == 0)


def multiplies_integers(network: nn.Module) -> bool:
    return any(isinstance(module, IntegerLinear) for module in network.modules())


def multiply_integers_(layer: Linear, with_: Integers) -> None:
    """Let a layer multiply with these."""
    pack_(layer, with_.weight)
    layer.__class__ = IntegerLinear
    if with_.bias is not None:
        own = with_.bias.to(layer.weight.dtype)
        layer.bias = nn.Parameter(own if layer.bias is None else own + layer.bias, requires_grad=False)
