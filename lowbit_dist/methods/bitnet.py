"""BitNet b1.58 (arXiv 2402.17764): latent float weights, rounded to ternary in the forward pass,
straight-through.

Details follow the authors' training tips and the 1bitLLM reproduction: one absmean scale per tensor, int8
activations per token, RMSNorm before every BitLinear (`sub_norms` adds the two that LLaMA lacks: before
o_proj and down_proj).
"""

from typing import Literal

from torch import Tensor, nn

from lowbit_dist.linear import INNER_LINEARS, IntPerToken, Linear, sub_norm_gain
from lowbit_dist.methods.latent import LatentTernary
from lowbit_dist.section import setting


class BitNet(LatentTernary):
    name: Literal["bitnet"] = "bitnet"
    activation_bits: Literal[8] | None = setting(
        8, "Inputs of ternary layers are rounded to so many bits for each token; null does not.", unit="bits"
    )
    sub_norms: bool = setting(
        True, "Whether RMSNorm stands before o_proj and down_proj, too: with LLaMA's own, before every layer."
    )

    def linear(self, layer: nn.Linear, *, name: str, is_head: bool, norm_eps: float) -> nn.Module:
        if is_head:
            return Linear(layer)
        return Linear(
            layer,
            view=self.view,
            activation=None if self.activation_bits is None else IntPerToken(self.activation_bits),
            norm_eps=norm_eps if name.rpartition(".")[2] in self.normed_inputs else None,
        )

    @property
    def normed_inputs(self) -> tuple[str, ...]:
        return INNER_LINEARS if self.sub_norms else ()

    @property
    def view(self) -> "TernaryAbsmean":
        return TernaryAbsmean()

    def initial(self, name: str, shape: tuple[int, ...]) -> Tensor | None:
        return sub_norm_gain(name, shape)


class TernaryAbsmean:
    """gamma * clip(round(W / gamma), -1, 1), gamma = max(mean|W|, 1e-5) over the tensor (arXiv 2402.17764,
    eq. 1-3), straight through.
    """

    def rounded(self, w: Tensor) -> tuple[Tensor, Tensor]:  # [N, K], []
        w = w.float()
        gamma = w.abs().mean().clamp(min=1e-5)
        return (w / gamma).round_().clamp_(-1, 1), gamma

    def forward(self, w: Tensor) -> tuple[Tensor, None]:
        levels, gamma = self.rounded(w)
        return levels.mul_(gamma).to(w.dtype), None

    def backward(self, w: Tensor, dw: Tensor, dbias: Tensor | None) -> Tensor:
        return dw
