"""TriLM of Spectra (arXiv 2407.12327): latent float weights, rounded to ternary in the forward pass, straight
through; activations are not quantised.

Its recipe beside the layer: AdamW with betas (0.9, 0.95), a line down from peak A that becomes one from a
lower peak B at half of the tokens, and no weight decay from two thirds on (`schedule.name: two_stage`,
`second_lr_ratio`, `weight_decay_until`).
"""

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn

from lowbit_dist.linear import Linear
from lowbit_dist.methods.latent import LatentTernary
from lowbit_dist.section import setting


class TriLM(LatentTernary):
    name: Literal["trilm"] = "trilm"
    slices: Annotated[int, Field(ge=1, le=64)] = setting(
        1,
        "How many scales a matrix has, each of as many rows; the released models have one for each of the "
        "1 to 6 devices that they were trained on.",
        unit="scales",
    )

    def linear(self, layer: nn.Linear, *, name: str, is_head: bool, norm_eps: float) -> nn.Module:
        if is_head:
            return Linear(layer)
        if layer.out_features % self.slices:
            raise ValueError(f"{self.slices} slices do not divide {layer.out_features:,} rows")
        return Linear(layer, view=self.view)

    @property
    def view(self) -> "TernarySlices":
        return TernarySlices(self.slices)


class TernarySlices:
    """gamma * round(clip(W / gamma, -1, 1)), gamma = 1e-5 + mean|W| over a slice of rows (arXiv 2407.12327,
    section 3.1 and its released code), straight through.
    """

    def __init__(self, slices: int):
        self.slices = slices

    def rounded(self, w: Tensor) -> tuple[Tensor, Tensor]:  # of [N, K]: [slices, N K / slices], [slices, 1]
        slices = w.float().reshape(self.slices, -1)
        gamma = slices.abs().mean(1, keepdim=True) + 1e-5
        return (slices / gamma).clamp_(-1, 1).round_(), gamma

    def forward(self, w: Tensor) -> tuple[Tensor, None]:
        levels, gamma = self.rounded(w)
        return levels.mul_(gamma).view(w.shape).to(w.dtype), None

    def backward(self, w: Tensor, dw: Tensor, dbias: Tensor | None) -> Tensor:
        return dw
