"""Small methods that show what the interface of methods carries: each in one class, as a package from outside
would write it.  Not for use: the real ones come with tests of their papers.
"""

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from lowbit_dist import ops
from lowbit_dist.grid import GRIDS, Grid
from lowbit_dist.linear import IntPerToken, Linear
from lowbit_dist.methods import METHODS, Method
from lowbit_dist.optim import OPTIMIZERS, Rule
from lowbit_dist.packed import PackedShard, PackedTensor, representable


class FineStored(Method):
    """Int8 codes in the shard, ternary weights in the forward pass and on the wire."""

    name: Literal["fine-stored"] = "fine-stored"

    @property
    def stored(self) -> Grid:
        return GRIDS["int8"]

    @property
    def sent_grid(self) -> Grid:
        return GRIDS["ternary"]

    @property
    def forward_grid(self) -> Grid:
        return GRIDS["ternary"]

    def linear(self, layer: nn.Linear, *, name: str, is_head: bool, norm_eps: float) -> nn.Module:
        return Linear(layer, activation=None if is_head else IntPerToken(8))

    def quantize(self, weight: Tensor) -> PackedTensor:
        """Three times the mean magnitude at the end of the grid."""
        size = 3 * weight.double().abs().mean().reshape(1) / 127
        return PackedTensor.quantize(weight, representable(size.float()), self.stored)

    def sent(self, shard: PackedShard) -> PackedShard:
        """To the nearest of -1, 0, 1 times the first mean magnitude, which is 127 / 3 int8 levels."""
        levels = (shard.levels() * (3 / 127)).round_().clamp_(-1, 1).to(torch.int8)
        codes = ops.pack(levels, grid=self.sent_grid)
        scale = representable(shard.scale * (127 / 3))
        return PackedShard(codes, scale, shard.scale_every, self.sent_grid, shard.shape, shard.first_block)

    def levels(self, weight: Tensor) -> Tensor:
        return weight.sign().to(torch.int8)


class Silent(FineStored):
    """The same, without a word on its levels."""

    name: Literal["silent"] = "silent"

    def levels(self, weight: Tensor) -> None:
        return None


LAMBDA = 1e-2


class DeadZone:
    """Ternary by rows, and a bias of what they leave out: c_o = LAMBDA * the sum of row o's dead weights (the
    form of Tequila, arXiv 2509.23809).
    """

    def _parts(self, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        alpha = w.float().abs().mean(1, keepdim=True)
        levels = (w.float() / alpha).round_().clamp_(-1, 1)
        return levels, alpha, levels == 0

    def forward(self, w: Tensor) -> tuple[Tensor, Tensor]:
        levels, alpha, dead = self._parts(w)
        return (levels * alpha).to(w.dtype), LAMBDA * (w * dead).sum(1)

    def backward(self, w: Tensor, dw: Tensor, dbias: Tensor | None) -> Tensor:
        assert dbias is not None, "forward gives a bias"
        return dw + LAMBDA * dbias[:, None] * self._parts(w)[2]


class Biased(Method):
    """A latent weight whose view returns a bias and owns its backward pass."""

    name: Literal["biased"] = "biased"

    @property
    def forward_grid(self) -> Grid:
        return GRIDS["ternary"]

    def linear(self, layer: nn.Linear, *, name: str, is_head: bool, norm_eps: float) -> nn.Module:
        return Linear(layer, view=None if is_head else DeadZone())

    def levels(self, weight: Tensor) -> Tensor:
        return DeadZone()._parts(weight)[0].to(torch.int8)


class _ElasticRound(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, alpha: Tensor, top: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.alpha, ctx.top = alpha, top  # the parameter itself: its value is gathered again before `backward`
        return (x / alpha).round().clamp(-top - 1, top) * alpha

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        (x,), top = ctx.saved_tensors, ctx.top
        scaled = x / ctx.alpha
        inside = (scaled >= -top - 1) & (scaled <= top)
        slope = torch.where(inside, scaled.round() - scaled, scaled.clamp(-top - 1, top))
        return dy * inside, (dy * slope).sum().reshape(1), None


class Elastic(nn.Module):
    """Activations rounded to 4 bits of a learned size (LSQ, arXiv 1902.08153, without its gradient scale)."""

    def __init__(self, like: nn.Linear):
        super().__init__()
        self.alpha = nn.Parameter(torch.empty(1, device=like.weight.device, dtype=like.weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        return _ElasticRound.apply(x, self.alpha, 7)


class LearnedActivation(Method):
    """Full-precision weights, activations with a learned scale."""

    name: Literal["learned-activation"] = "learned-activation"

    def linear(self, layer: nn.Linear, *, name: str, is_head: bool, norm_eps: float) -> nn.Module:
        return Linear(layer, activation=None if is_head else Elastic(layer))

    def initial(self, name: str, shape: tuple[int, ...]) -> Tensor | None:
        return torch.full(shape, 0.25) if name.endswith(".activation.alpha") else None


class Rows(Rule):
    """Each row's momentum by its own length."""

    name: Literal["rows"] = "rows"
    slots: ClassVar = (ops.Slot("momentum", signed=True),)
    scope: ClassVar = "row"

    def update(self, g: Tensor, *slots: Tensor, step: int) -> tuple[Tensor, ...]:
        momentum = 0.9 * slots[0] + g
        return momentum / (momentum.square().mean(-1, keepdim=True).sqrt() + 1e-8), momentum


class Half(Rule):
    """A momentum that is kept in bfloat16 alone."""

    name: Literal["half"] = "half"
    states: Literal["bf16"] = "bf16"
    slots: ClassVar = (ops.Slot("momentum", signed=True),)

    def update(self, g: Tensor, *slots: Tensor, step: int) -> tuple[Tensor, ...]:
        momentum = 0.9 * slots[0] + g
        return momentum, momentum


TOYS = {"fine-stored": FineStored, "biased": Biased, "learned-activation": LearnedActivation}


def register() -> None:
    """Make the toys known in this process, as an installed package's entry points would."""
    METHODS.update({name: f"toys:{toy.__name__}" for name, toy in {**TOYS, "silent": Silent}.items()})
    OPTIMIZERS.update(rows="toys:Rows", half="toys:Half")
