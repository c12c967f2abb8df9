"""BitNet b1.58 (arXiv 2402.17764): latent float weights, rounded to ternary in the forward pass,
straight-through.

Details follow the authors' training tips and the 1bitLLM reproduction: one absmean scale per tensor, int8
activations per token, RMSNorm before every BitLinear (`sub_norms` adds the two that LLaMA lacks: before
o_proj and down_proj).
"""

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from lowbit_dist.linear import INNER_LINEARS, Linear
from lowbit_dist.methods.method import Method


class BitNet(Method):
    name: Literal["bitnet"] = "bitnet"
    activation_bits: Literal[8] | None = 8
    sub_norms: bool = True
    low_bit: ClassVar[bool] = False

    def linear(self, layer: nn.Linear, *, name: str, is_head: bool, norm_eps: float) -> nn.Module:
        if is_head:
            return Linear(layer)
        inner = self.sub_norms and name.rsplit(".", 1)[-1] in INNER_LINEARS
        return Linear(
            layer,
            activation_bits=self.activation_bits,
            transform=ternary_absmean,
            norm_eps=norm_eps if inner else None,
        )


def ternary_absmean(weight: Tensor) -> Tensor:
    """gamma * clip(round(W / gamma), -1, 1), gamma = max(mean|W|, 1e-5) over the tensor (arXiv
    2402.17764, eq. 1-3).
    """
    w = weight.float()
    gamma = w.abs().mean().clamp(min=1e-5)
    return (w / gamma).round_().clamp_(-1, 1).mul_(gamma).to(weight.dtype)


def ternary_levels(weight: Tensor) -> Tensor:  # int8
    """The codes that the forward pass sees, for flip rates and zero fractions."""
    w = weight.float()
    return (w / w.abs().mean().clamp(min=1e-5)).round_().clamp_(-1, 1).to(torch.int8)
