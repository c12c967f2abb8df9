"""The linear layers of a model, whatever the method: a view of the weight, quantised activations, the matmul.

    y = Q(x) . F(W)^T + b        F: the layer's view of its weight;  Q: its activation quantiser

The layer decodes, not the gather: a low-bit weight is a stub of one element, its codes wait in
`weight.packed`, and `values` asks for what is multiplied with.  So a weight's values exist only inside
`linear`, in its forward and again in its backward pass.

What is safe under ZeRO-3, where weights are gathered before a module runs and released after it:

* A view may read `w` only while it is called, forward and backward; it keeps nothing between the two.  It
  has no parameters of its own, and gives the same values for the same `w`.
* An activation quantiser is a module, so DeepSpeed gathers its parameters around its own forward and
  backward.  It may let autograd save a parameter itself, never a view or a copy of one: a parameter's values
  are gathered again before the backward pass, a copy of them is a weight that stays.

Inputs that are rounded to integers are saved as these, a byte an element, and computed once for all layers
that are given the same tensor, as the projections of an attention are.

`nn.functional.linear` on a CPU saves the transposed *view* of its weight; `linear` below saves the parameter.

A layer that multiplies integers (products.py) makes y of the rounded inputs and of the weight's levels, in
exact sums; its gradients are those at the numbers that both stand for, as without.  With `grad_in_integers`
that of its input is one of integers, too, of rounded rows of dy (SwitchBack, arXiv 2304.13013):

    dx = Q(dy s) . L       L: levels;  s: their scale, which is left to the sums where it is one for all

Letters: T tokens, K in_features, N out_features.
"""

import threading
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lowbit_dist import ops

_WORTH_TRANSPOSING = 1 << 19  # elements; products of less are made sooner than a call of ours
# The linears of a LLaMA block whose inputs no RMSNorm precedes; SubLN (as in BitNet) adds one there.
INNER_LINEARS = ("o_proj", "down_proj")


class View(Protocol):
    """A method's sight of a latent or decoded weight; asked again in the backward pass."""

    def forward(self, w: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the forward pass multiplies with [N, K], and a bias [N] that it adds, if any."""
        ...

    def backward(self, w: Tensor, dw: Tensor, dbias: Tensor | None) -> Tensor:
        """The gradient of w [N, K], of those at the values that `forward` gave.  Straight through: dw."""
        ...


def values(weight: Tensor) -> Tensor:  # [N, K]
    """A weight's numbers: those of an ordinary parameter, or what the codes of a low-bit one stand for."""
    packed = getattr(weight, "packed", None)
    return weight if packed is None or not packed.in_layer else packed.dense(weight.shape, weight.dtype)


def decodes(module: nn.Module) -> bool:
    """Whether a module multiplies with `values` of its weight; one that reads the weight itself is handed it
    decoded.
    """
    return isinstance(module, Linear) and type(module).forward is Linear.forward


class Product(Protocol):
    """How a layer multiplies: in its own precision, or in 8-bit floats (float8.py)."""

    def __call__(self, a: Tensor, b: Tensor, *, of_gradient: bool = False) -> Tensor:
        """a [M, K] . b [N, K]^T, in a's precision; `of_gradient`: a is the gradient of a layer's output."""
        ...


def plain_product(a: Tensor, b: Tensor, *, of_gradient: bool = False) -> Tensor:
    is_slow = a.dtype == torch.bfloat16 and a.device.type == "cpu" and a.numel() >= _WORTH_TRANSPOSING
    if is_slow and not a.is_contiguous() and a.t().is_contiguous():
        a = ops.transposed(a.t())
    return a @ b.t()


class _Latest:
    """The latest result that was computed of a tensor's memory, kept while that lives and is unchanged.

    Layers that read one tensor ask one after the other, and DeepSpeed hands each of them a view of its own.
    """

    def __init__(self) -> None:
        self.entry: tuple[Any, ...] = (
            None,
            None,
            None,
        )  # a reference to the memory, what was asked, the result

    def of(self, x: Tensor, *asked: object, compute: Callable[[], Any]) -> Any:
        if x.is_inference() or torch.compiler.is_compiling():  # no version says whether it was changed
            return compute()
        memory = x.untyped_storage()
        asked = (*asked, x._version, x.storage_offset(), x.shape, x.stride(), x.dtype)
        known, of, result = self.entry
        if known is None or known() is not memory or of != asked:
            result = compute()
            self.entry = (weakref.ref(memory, self._forget), asked, result)
        return result

    def _forget(self, reference: object) -> None:
        if self.entry[0] is reference:
            self.entry = (None, None, None)


class _Recent(threading.local):
    """Of a thread: autograd has its own for each GPU."""

    def __init__(self) -> None:
        self.rounded, self.values = _Latest(), _Latest()


_recent = _Recent()


def _round(x: Tensor, bits: int, *, in_numbers: bool) -> tuple[Tensor, Tensor, Tensor]:
    """x [T, K] in integers as `ops.round_tokens` gives them, and the numbers that these stand for, in x's
    precision, or x itself.
    """

    def compute() -> tuple[Tensor, Tensor, Tensor | None]:
        if in_numbers:
            return ops.rounded_tokens(x.contiguous(), bits)
        return *ops.round_tokens(x.contiguous(), bits), None

    levels, per_unit, numbers = _recent.rounded.of(x, bits, in_numbers, compute=compute)
    return levels, per_unit, x if numbers is None else numbers


def values_again(levels: Tensor, per_unit: Tensor, dtype: torch.dtype) -> Tensor:
    """For the backward passes of layers that were given the same tensor."""
    compute = partial(ops.token_values, levels, per_unit, dtype)
    return _recent.values.of(levels, dtype, compute=compute)  # type: ignore[no-any-return]


class _Linear(torch.autograd.Function):
    """y = Q(x) . F(W)^T + b.  Gradients are those at the view's values, through the view: dx = dy . F(W),
    dW = view.backward(dy^T . Q(x)).
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        x: Tensor,  # [T, K]
        weight: Tensor,  # [N, K]
        bias: Tensor | None,  # [N]
        view: View | None,
        dtype: torch.dtype | None,  # of the products, where autocast asks for another than the operands'
        product: Product,
        bits: int | None,  # to which each token is rounded
        in_integers: bool,  # y is made of rounded tokens and levels
        grad_in_integers: bool,  # and so is the gradient of x
    ) -> Tensor:
        given = x.dtype
        if bits is None:
            x = x if dtype is None else x.to(dtype)
            ctx.save_for_backward(x)
        else:
            levels, per_unit, x = _round(x, bits, in_numbers=not in_integers)
            ctx.save_for_backward(levels, per_unit)
            x = x if in_integers else x.to(dtype or given)
        # Not among the saved tensors: activation checkpointing aliases each, values and all, from its second
        # forward pass on, although DeepSpeed releases the weight after it and gathers it again.
        ctx.weight, ctx.view, ctx.product = weight, view, product  # type: ignore[attr-defined]
        dtype = x.dtype if bits is None else dtype or given
        ctx.given, ctx.dtype, ctx.has_bias = given, dtype, bias is not None  # type: ignore[attr-defined]
        ctx.grad_in_integers = grad_in_integers  # type: ignore[attr-defined]
        own = None
        if in_integers:
            w, scale = weight.packed.levels(weight.shape)  # type: ignore[attr-defined]
            y = ops.int8_product(levels, per_unit, w, scale, dtype)
        else:
            w = values(weight)
            if view is not None:
                w, own = view.forward(w)
            y = product(x, w.to(dtype))
        for term in (bias, own):
            y = y if term is None else y + term.to(y.dtype)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def,override]
        (x, *per_unit), view, product = ctx.saved_tensors, ctx.view, ctx.product
        dy = dy.reshape(-1, dy.shape[-1])
        dx = dweight = dbias = w = own = None
        if not ctx.grad_in_integers:
            w = values(ctx.weight)
            viewed, own = (w, None) if view is None else view.forward(w)
            if ctx.needs_input_grad[0]:
                dx = product(dy, viewed.to(dy.dtype).t(), of_gradient=True)
            del viewed
        elif ctx.needs_input_grad[0]:
            dx = int8_input_gradient(dy, *ctx.weight.packed.levels(ctx.weight.shape))
        if ctx.has_bias and ctx.needs_input_grad[2]:
            dbias = dy.sum(0)
        if ctx.needs_input_grad[1]:
            if per_unit:
                x = values_again(x, per_unit[0], ctx.given).to(ctx.dtype)
            dweight = product(dy.t(), x.t(), of_gradient=True)
            if view is not None:
                dweight = view.backward(w, dweight, None if own is None else dy.sum(0))
        return dx, dweight, dbias, None, None, None, None, None, None


def int8_input_gradient(
    dy: Tensor,  # [T, N]
    levels: Tensor,  # [N, K] int8
    scale: Tensor,  # [1] | [N] float32
) -> Tensor:  # [T, K], of dy's type
    """dy . (scale * levels), each row of dy rounded to 8 bits."""
    if len(scale) > 1:  # the sum is over what has scales of its own
        scaled = torch.mul(dy, scale, out=torch.empty_like(dy))  # without one in float32
        dy, scale = scaled, torch.ones_like(scale[:1])
    rounded = ops.round_tokens(dy.contiguous(), least=ops.LEAST_OF_GRADIENT)
    return ops.int8_product(*rounded, levels.t(), scale, dy.dtype)


def linear(
    x: Tensor,  # [..., K]
    weight: Tensor,  # [N, K]
    bias: Tensor | None = None,
    *,
    view: View | None = None,
    product: Product = plain_product,
    bits: int | None = None,  # to which each token is rounded
    in_integers: bool = False,
    grad_in_integers: bool = False,
) -> Tensor:  # [..., N]
    """`x . view(weight)^T + bias`; with `bits`, each token of x is rounded as `IntPerToken` says, and
    `in_integers` it is multiplied so (`ops.int8_product`) with a packed weight, which has no view; with
    `grad_in_integers` its gradient is made so, too.
    """
    device, tokens = x.device.type, x.reshape(-1, x.shape[-1])
    integers = bits, in_integers, grad_in_integers
    if torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            dtype = torch.get_autocast_dtype(device)
            y = _Linear.apply(tokens, weight, bias, view, dtype, product, *integers)
    else:
        y = _Linear.apply(tokens, weight, bias, view, None, product, *integers)
    return y.view(*x.shape[:-1], y.shape[-1])


class IntPerToken(nn.Module):
    """Each token (row) of x [..., K] rounded to `bits` symmetric levels of its own absolute maximum, straight
    through.

    xq = clip(round(a x), -2^(b-1), 2^(b-1) - 1) / a with a = (2^(b-1) - 1) / max(max|x|, 1e-5)
    (arXiv 2402.17764; the epsilon is the 1bitLLM reproduction's).  `bits` is from 2 to 8.

    `Linear` rounds by itself where this is its quantiser, so that it can keep integers.
    """

    def __init__(self, bits: int = 8):
        super().__init__()
        if not 2 <= bits <= 8:
            raise ValueError(f"bits is {bits}; tokens are rounded to integers of 2 to 8 bits")
        self.bits = bits

    def forward(self, x: Tensor) -> Tensor:
        return _RoundTokens.apply(x, self.bits)

    def extra_repr(self) -> str:
        return f"bits={self.bits}"


class _RoundTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, bits: int) -> Tensor:
        *_, values = ops.rounded_tokens(x.reshape(-1, x.shape[-1]).contiguous(), bits)
        return values.view(x.shape)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def,override]
        return dy, None


class Linear(nn.Module):
    """A linear layer for every method: optional norm before it, quantised activations, a view of its weight.

    `weight` [N, K] and `bias` [N] keep the names and shapes of the `nn.Linear` it replaces, so that
    pretrained files and exports need no translation.
    """

    def __init__(
        self,
        like: nn.Linear,
        *,
        view: View | None = None,
        activation: nn.Module | None = None,  # [..., K] -> [..., K]
        norm_eps: float | None = None,  # RMSNorm(K) before the activation quantiser (SubLN); None: no norm
    ):
        super().__init__()
        self.in_features, self.out_features = like.in_features, like.out_features
        self.weight = like.weight
        self.bias = like.bias
        self.view = view
        self.activation = activation
        self.product: Product = plain_product
        # Whether y is made of rounded inputs and levels, and the gradient of x of rounded ones (products.py).
        self.in_integers = self.grad_in_integers = False
        # How a compiled block multiplies (compiled_linear.py), and whether its weight is the stub of codes.
        self.in_graph: Callable[[Linear, Tensor], Tensor] | None = None
        self.is_low_bit = False
        self.norm: nn.Module | None = None
        if norm_eps is not None:
            self.norm = nn.RMSNorm(
                like.in_features, eps=norm_eps, device=like.weight.device, dtype=like.weight.dtype
            )

    def forward(self, x: Tensor, multiply: Callable[..., Tensor] = linear) -> Tensor:
        """`multiply`: what is made of the operands in the place of their product (loss.py)."""
        if self.norm is not None:
            x = self.norm(x)
        if self.in_graph is not None and torch.compiler.is_compiling():
            return self.in_graph(self, x)
        operands: Any = {"view": self.view, "product": self.product}
        if type(self.activation) is IntPerToken and multiply is linear:
            trains = self.training  # a model is measured by products of numbers
            operands |= {
                "in_integers": self.in_integers and trains,
                "grad_in_integers": self.grad_in_integers and trains,
            }
            return linear(x, self.weight, self.bias, bits=self.activation.bits, **operands)
        if self.activation is not None:
            x = self.activation(x)
        return multiply(x, self.weight, self.bias, **operands)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


def sub_norm_gain(name: str, shape: tuple[int, ...]) -> Tensor | None:
    """For `Method.initial`: ones for the gain of a norm that `Linear` has, None for any other parameter."""
    owner = name.removesuffix(".norm.weight")
    return torch.ones(shape) if owner != name and owner.rpartition(".")[2] in INNER_LINEARS else None
