"""A linear layer inside a compiled block: what PyTorch's compiler sees of linear.py.

    norm | round | decode, multiply | ... | round | decode, multiply | +       one graph a block, one backward

The weight that goes into the graph is an ordinary parameter, or the stub of a low-bit one, which has its
shape and one element (zero/shards.py).  An operation that the compiler cannot look into finds the codes by
the stub's address, and decodes and multiplies as the layer does; so no weight's values are known to the
compiler, which would keep them for the backward pass.  Tokens are rounded in the graph, where it becomes one
with the norm or the product of gate and up before it, and once for all layers that read them; integers are
what the graph keeps.

Letters: T tokens, K in_features, N out_features.
"""

import weakref
from typing import Any

import torch
from torch import Tensor

from lowbit_dist import ops
from lowbit_dist.linear import IntPerToken, Linear, int8_input_gradient, plain_product, values_again
from lowbit_dist.ops import tokens

# Where the compiler's code for it is faster than ours.
ROUNDED_IN_GRAPHS = ("cuda",)
# Address of the stub of a gathered weight -> what has its codes.
_packed: "weakref.WeakValueDictionary[int, Any]" = weakref.WeakValueDictionary()


def take(layer: Linear) -> bool:
    """Let a layer's products be parts of the graph that its block is compiled to, if they can be.

    A view is a method's own code, of which nobody knows what the compiler keeps; products of 8-bit floats
    find their scales anew.
    """
    rounds = layer.activation is None or type(layer.activation) is IntPerToken
    if layer.view is not None or layer.product is not plain_product or not rounds:
        return False
    packed: Any = getattr(layer.weight, "packed", None)
    if packed is not None and packed.in_layer:
        _packed[packed.stub.data_ptr()] = packed
        layer.is_low_bit = True
    layer.in_graph = multiply
    return True


def multiply(layer: Linear, x: Tensor) -> Tensor:  # [..., K] -> [..., N]
    """`Linear.forward` behind its norm, of what a compiler traces."""
    bits = None if layer.activation is None else layer.activation.bits
    ways = layer.is_low_bit, layer.in_integers, layer.grad_in_integers
    y = _Linear.apply(x.reshape(-1, x.shape[-1]), layer.weight, layer.bias, bits, *ways)
    return y.view(*x.shape[:-1], y.shape[-1])


class _Linear(torch.autograd.Function):
    """Of linear.py, in operations that a compiler knows, or knows that it does not know them."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # [T, K]
        weight: Tensor,  # [N, K], or its stub
        bias: Tensor | None,  # [N]
        bits: int | None,
        is_low_bit: bool,
        in_integers: bool,
        grad_in_integers: bool,
    ) -> Tensor:  # [T, N]
        ctx.is_low_bit, ctx.grad_in_integers = is_low_bit, grad_in_integers
        ctx.has_bias = bias is not None
        rounding: Any = tokens if x.device.type in ROUNDED_IN_GRAPHS else ops
        kept: tuple[Tensor, ...] = (x,)
        if in_integers:
            kept = rounding.round_tokens(x, bits)
            y = _level_product(*kept, weight)
        else:
            if bits is not None:
                levels, per_unit, x = rounding.rounded_tokens(x, bits)
                kept = levels, per_unit
            y = _product(x, weight) if is_low_bit else x @ weight.t()
        ctx.save_for_backward(weight, *kept)
        return y if bias is None else y + bias

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        weight, x, *per_unit = ctx.saved_tensors
        dx = _input_gradient(dy, weight, ctx.grad_in_integers) if ctx.is_low_bit else dy @ weight
        if per_unit:
            dw = _weight_gradient(dy, x, *per_unit)
        else:
            dw = plain_product(dy.t(), x.t(), of_gradient=True)
        return dx, dw, _column_sums(dy) if ctx.has_bias else None, None, None, None, None


@ops.named(
    "product(Tensor x, Tensor stub) -> Tensor",
    lambda x, stub: x.new_empty(len(x), len(stub)),
    takes_strides=True,
)
def _product(x: Tensor, stub: Tensor) -> Tensor:
    return plain_product(x, _packed[stub.data_ptr()].dense(stub.shape, stub.dtype))


@ops.named(
    "level_product(Tensor levels, Tensor per_unit, Tensor stub) -> Tensor",
    lambda levels, per_unit, stub: stub.new_empty(len(levels), len(stub)),
)
def _level_product(levels: Tensor, per_unit: Tensor, stub: Tensor) -> Tensor:
    weight, scale = _packed[stub.data_ptr()].levels(stub.shape)
    return ops.int8_product(levels, per_unit, weight, scale, stub.dtype)  # type: ignore[no-any-return]


@ops.named(
    "input_gradient(Tensor dy, Tensor stub, bool in_integers) -> Tensor",
    lambda dy, stub, in_integers: dy.new_empty(len(dy), stub.shape[1]),
)
def _input_gradient(dy: Tensor, stub: Tensor, in_integers: bool) -> Tensor:
    packed = _packed[stub.data_ptr()]
    if in_integers:
        return int8_input_gradient(dy, *packed.levels(stub.shape))
    return plain_product(dy, packed.dense(stub.shape, stub.dtype).t(), of_gradient=True)


@ops.named(
    "weight_gradient(Tensor dy, Tensor levels, Tensor per_unit) -> Tensor",
    lambda dy, levels, per_unit: dy.new_empty(dy.shape[1], levels.shape[1]),
)
def _weight_gradient(dy: Tensor, levels: Tensor, per_unit: Tensor) -> Tensor:
    values = values_again(levels, per_unit, dy.dtype)
    return plain_product(dy.t(), values.t(), of_gradient=True)


# For inductor in PyTorch 2.15, sums of several layers that become one pass may be C++ that does not compile.
@ops.named("column_sums(Tensor x) -> Tensor", lambda x: x.new_empty(x.shape[1]), takes_strides=True)
def _column_sums(x: Tensor) -> Tensor:
    return x.sum(0)
