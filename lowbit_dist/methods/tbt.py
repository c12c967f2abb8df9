"""Binary and ternary weights with elastic activations (TBT, arXiv 2306.01841), for a decoder.

Weights, by the statistics of each row, with mu its mean:

    ternary    alpha round(clip((W - mu) / alpha, -1, 1)),  alpha = 4/3 mean|W - mu|    (eq. 8)
    binary     alpha sign(W - mu),                          alpha = mean|W - mu|        (eq. 9)

(4/3 fills the three levels of a uniform distribution alike: the most information.)  `rules: paper` masks the
gradient where |W - mu| >= alpha (eq. 10); the released code leaves mu out and passes every gradient on.

Activations of 1 and 2 bits are elastic: alpha round(clip(x' / alpha, -1, 1)), or alpha sign(x'), of one
learned alpha for each layer.  The paper centres a whole tensor, x' = x - mean(x); here it is each token, so
that no token knows of later ones.  Its alpha starts at 2 mean|x| of the first batch: here at what that is
after an RMSNorm, which precedes each such layer.  8 bits are rounded for each token, as in BitNet.  The
embedding, the head and the inputs of attention's own products stay as they are.
"""

import math
from typing import Literal, Self

import torch
from pydantic import model_validator
from torch import Tensor, nn

from lowbit_dist.errors import ConfigError
from lowbit_dist.grid import GRIDS, Grid
from lowbit_dist.linear import INNER_LINEARS, IntPerToken, Linear, sub_norm_gain
from lowbit_dist.methods.method import Method
from lowbit_dist.section import setting

BINARY = Grid("binary", -1, 1, 2)
FIRST_ALPHA = 2 * math.sqrt(2 / math.pi)  # 2 mean|x| / sqrt(1), of normal x with a mean square of 1
LEAST_ALPHA = 1e-5  # the released code's


class TBT(Method):
    name: Literal["tbt"] = "tbt"
    weights: Literal["ternary", "binary"] = setting(
        "ternary", "The levels that a row's weights are rounded to."
    )
    rules: Literal["paper", "released"] = setting(
        "paper",
        "Whether rows and tokens are centred and the gradient is masked beyond the outer levels, as in the "
        "paper, or neither, as in its released code.",
    )
    activation_bits: Literal[1, 2, 8] | None = setting(
        8,
        "Inputs of these layers are rounded to so many bits: 8 for each token, 2 (three levels) and 1 with a "
        "learned scale for each layer; null does not.",
        unit="bits",
    )
    sub_norms: bool = setting(
        True, "Whether RMSNorm stands before o_proj and down_proj, too: with LLaMA's own, before every layer."
    )

    @model_validator(mode="after")
    def _inputs_are_normalised(self) -> Self:
        if self.activation_bits in (1, 2) and not self.sub_norms:
            raise ConfigError(
                f"method.sub_norms (false) must be true with activation_bits {self.activation_bits}, whose "
                "first scale is that of normalised inputs; write method.sub_norms: true or "
                "method.activation_bits: 8"
            )
        return self

    @property
    def label(self) -> str:
        return f"{self.name} {self.weights}"

    @property
    def forward_grid(self) -> Grid:
        return BINARY if self.weights == "binary" else GRIDS["ternary"]

    def linear(self, layer: nn.Linear, *, name: str, is_head: bool, norm_eps: float) -> nn.Module:
        if is_head:
            return Linear(layer)
        activation: nn.Module | None = None
        if self.activation_bits == 8:
            activation = IntPerToken(8)
        elif self.activation_bits is not None:
            activation = Elastic(layer, bits=self.activation_bits, centred=self.rules == "paper")
        has_norm = name.rpartition(".")[2] in self.normed_inputs
        return Linear(layer, view=self._view, activation=activation, norm_eps=norm_eps if has_norm else None)

    @property
    def normed_inputs(self) -> tuple[str, ...]:
        return INNER_LINEARS if self.sub_norms else ()

    @property
    def _view(self) -> "RowStatistics":
        return RowStatistics(is_binary=self.weights == "binary", as_paper=self.rules == "paper")

    def levels(self, weight: Tensor) -> Tensor:
        return self._view.rounded(weight)[0].to(torch.int8)

    def initial(self, name: str, shape: tuple[int, ...]) -> Tensor | None:
        if name.endswith(".activation.alpha"):
            return torch.full(shape, FIRST_ALPHA)
        return sub_norm_gain(name, shape)


class RowStatistics:
    """Rows rounded to two or three levels of their own mean magnitude; `as_paper`: centred, and the gradient
    masked.
    """

    def __init__(self, *, is_binary: bool, as_paper: bool):
        self.is_binary, self.as_paper = is_binary, as_paper

    def rounded(self, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Levels [N, K], alpha [N, 1], and what was rounded, in alphas [N, K]; float32."""
        rows = w.float()
        if self.as_paper:
            rows = rows - rows.mean(1, keepdim=True)
        alpha = rows.abs().mean(1, keepdim=True)
        if not self.is_binary:
            alpha = alpha * (4 / 3)
        scaled = rows / alpha.clamp(min=torch.finfo(torch.float32).tiny)  # of a row of zeros, 0
        return scaled.sign() if self.is_binary else scaled.clamp(-1, 1).round_(), alpha, scaled

    def forward(self, w: Tensor) -> tuple[Tensor, None]:
        levels, alpha, _ = self.rounded(w)
        return levels.mul_(alpha).to(w.dtype), None

    def backward(self, w: Tensor, dw: Tensor, dbias: Tensor | None) -> Tensor:
        return dw * (self.rounded(w)[2].abs() < 1) if self.as_paper else dw


class Elastic(nn.Module):
    """Inputs [..., K] rounded to alpha times -1, 0, 1 (2 bits) or -1, 1 (1 bit); alpha [1] is learned.

    The gradients are LSQ's (arXiv 1902.08153): dx = dy inside the levels, else 0; dalpha is the sum of dy
    times the level outside of them, and the rounding error in alphas inside, over sqrt(K): of a token's
    elements, where the paper has those of the whole batch, so that it does not depend on how many tokens a
    pass has.
    """

    def __init__(self, like: nn.Linear, *, bits: int, centred: bool):
        super().__init__()
        self.bits, self.centred = bits, centred
        self.alpha = nn.Parameter(torch.empty(1, device=like.weight.device, dtype=like.weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        if self.centred:
            x = x - x.mean(-1, keepdim=True)
        return _RoundElastic.apply(x, self.alpha, self.bits)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, centred={self.centred}"


class _RoundElastic(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, alpha: Tensor, bits: int) -> Tensor:  # type: ignore[no-untyped-def,override]
        ctx.save_for_backward(x)
        ctx.alpha, ctx.bits = (
            alpha,
            bits,
        )  # the parameter itself: its value is gathered again before `backward`
        a = alpha.float().clamp(min=LEAST_ALPHA)
        scaled = x.float() / a
        levels = scaled.sign() if bits == 1 else scaled.clamp_(-1, 1).round_()
        return levels.mul_(a).to(x.dtype)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[no-untyped-def,override]
        (x,) = ctx.saved_tensors
        scaled = x.float() / ctx.alpha.float().clamp(min=LEAST_ALPHA)
        inside = scaled.abs() <= 1
        if ctx.bits == 1:
            slope = scaled.sign()
        else:
            slope = torch.where(inside, scaled.round() - scaled, scaled.sign())
        dalpha = (dy.float() * slope).sum() / math.sqrt(x.shape[-1])
        return dy * inside, dalpha.reshape(1).to(ctx.alpha.dtype), None
