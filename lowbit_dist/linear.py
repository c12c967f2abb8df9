"""The linear layers of a model, whatever the method: activation quantisation and the matmul.

Under ZeRO-3 a weight exists only from its gather to its release, so nothing may keep its values between
forward and backward.  `nn.functional.linear` on a CPU does (it saves the transposed *view*); `linear` below
saves the parameter itself, whose values DeepSpeed gathers again before the backward pass.

Letters: T tokens, K in_features, N out_features.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

WeightTransform = Callable[[Tensor], Tensor]

# The linears of a LLaMA block whose inputs no RMSNorm precedes; SubLN (as in BitNet) adds one there.
INNER_LINEARS = ("o_proj", "down_proj")


class _Linear(torch.autograd.Function):
    """y = Q(x) . F(W)^T, with the gradient passed straight through both quantisers (BitNet b1.58, arXiv
    2402.17764).

    Gradients are those at the quantised operands: dx = dy . F(W), dW = dy^T . Q(x).
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        x: Tensor,  # [..., K]
        weight: Tensor,  # [N, K]
        bias: Tensor | None,  # [N]
        activation_bits: int | None,
        transform: WeightTransform | None,
    ) -> Tensor:
        x = x.reshape(-1, x.shape[-1]) if activation_bits is None else _quantize_tokens(x, activation_bits)
        ctx.save_for_backward(x)
        # Not among the saved tensors: activation checkpointing aliases each, values and all, from its second
        # forward pass on, although DeepSpeed releases the weight after it and gathers it again.
        ctx.weight = weight  # type: ignore[attr-defined]
        ctx.has_bias = bias is not None  # type: ignore[attr-defined]
        ctx.transform = transform  # type: ignore[attr-defined]
        y = x @ (weight if transform is None else transform(weight)).t()
        return y if bias is None else y + bias

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def,override]
        (x,), weight = ctx.saved_tensors, ctx.weight
        dy = dy.reshape(-1, dy.shape[-1])
        dx = dweight = dbias = None
        if ctx.needs_input_grad[0]:
            dx = dy @ (weight if ctx.transform is None else ctx.transform(weight))
        if ctx.needs_input_grad[1]:
            dweight = dy.t() @ x
        if ctx.has_bias and ctx.needs_input_grad[2]:
            dbias = dy.sum(0)
        return dx, dweight, dbias, None, None


def linear(
    x: Tensor,  # [..., K]
    weight: Tensor,  # [N, K]
    bias: Tensor | None = None,
    *,
    activation_bits: int | None = None,
    transform: WeightTransform | None = None,
) -> Tensor:  # [..., N]
    """`x . transform(weight)^T + bias`, `x` rounded per token to `activation_bits` first when that is
    given.
    """
    tokens = x.reshape(-1, x.shape[-1])
    y = _Linear.apply(tokens, weight, bias, activation_bits, transform)
    return y.view(*x.shape[:-1], y.shape[-1])


def _quantize_tokens(x: Tensor, bits: int) -> Tensor:
    """Each token (row) of x [T, K] rounded to `bits` symmetric levels of its own absolute maximum; same
    dtype.

    xq = clip(round(a x), -2^(b-1), 2^(b-1) - 1) / a with a = (2^(b-1) - 1) / max(max|x|, 1e-5)
    (arXiv 2402.17764; the epsilon is the 1bitLLM reproduction's).
    """
    top = 2 ** (bits - 1) - 1
    scale = top / x.abs().amax(-1, keepdim=True).float().clamp_(min=1e-5)
    return (x * scale).round_().clamp_(-top - 1, top).div_(scale).to(x.dtype)


class Linear(nn.Module):
    """A linear layer for every method: optional norm before it, quantised activations, a transformed weight.

    `weight` [N, K] and `bias` [N] keep the names and shapes of the `nn.Linear` it replaces, so that
    pretrained files and exports need no translation.
    """

    def __init__(
        self,
        like: nn.Linear,
        *,
        activation_bits: int | None = None,
        transform: WeightTransform | None = None,
        norm_eps: float | None = None,  # RMSNorm(K) before the activation quantiser (SubLN); None: no norm
    ):
        super().__init__()
        self.in_features, self.out_features = like.in_features, like.out_features
        self.weight = like.weight
        self.bias = like.bias
        self.activation_bits = activation_bits
        self.transform = transform
        self.norm: nn.Module | None = None
        if norm_eps is not None:
            self.norm = nn.RMSNorm(
                like.in_features, eps=norm_eps, device=like.weight.device, dtype=like.weight.dtype
            )

    def forward(self, x: Tensor) -> Tensor:
        if self.norm is not None:
            x = self.norm(x)
        return linear(
            x, self.weight, self.bias, activation_bits=self.activation_bits, transform=self.transform
        )

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, activation_bits={self.activation_bits}"
