"""Tokens in integers: what rounding and multiplying them means, as a part of reference.py.

Letters: T tokens, K elements of each, N rows of a weight.
"""

import torch
from torch import Tensor

# The maximum that a token counts as at least, so that one of zeros is not divided by them.
LEAST_MAXIMUM = 1e-5  # of the 1bitLLM reproduction of BitNet b1.58
LEAST_OF_GRADIENT = 1e-30  # a gradient is of any size: it is divided by the number of a batch's tokens


def round_tokens(
    x: Tensor,  # [T, K]
    bits: int = 8,
    least: float = LEAST_MAXIMUM,
) -> tuple[Tensor, Tensor]:  # [T, K] int8, [T] float32
    """Each token (row) in integers of `bits` bits, and how many of them a 1 is:

    q = clip(round(a x), -2^(b-1), 2^(b-1) - 1)    a = (2^(b-1) - 1) / max(max|x|, least)

    Nothing is left to clip: of the largest element a x is 2^(b-1) - 1 to a float's last digits.  Of a token
    that is not finite a is NaN, and q is 0.
    """
    top = 2 ** (bits - 1) - 1
    largest = x.abs().amax(-1, keepdim=True).float()
    per_unit = top / largest.clamp(min=least)
    per_unit.masked_fill_(~largest.isfinite(), torch.nan)
    scaled = x * per_unit
    levels = torch.where(scaled.isnan(), 0.0, scaled).round_()
    return levels.to(torch.int8), per_unit.squeeze(-1)


def rounded_tokens(
    x: Tensor,  # [T, K]
    bits: int = 8,
) -> tuple[Tensor, Tensor, Tensor]:  # [T, K] int8, [T] float32, [T, K] of x's type
    """`round_tokens`, and `token_values` of it in x's precision."""
    levels, per_unit = round_tokens(x, bits)
    return levels, per_unit, token_values(levels, per_unit, x.dtype)


def token_values(
    levels: Tensor,  # [T, K] int8
    per_unit: Tensor,  # [T] float32
    dtype: torch.dtype,
) -> Tensor:  # [T, K], of `dtype`
    """The numbers that rounded tokens stand for, q / a; there is one zero, +0."""
    wide = levels.to(torch.promote_types(dtype, torch.float32))
    return wide.div_(per_unit.unsqueeze(-1)).to(dtype)


def int8_product(
    levels: Tensor,  # [T, K] int8
    per_unit: Tensor,  # [T] float32
    weight: Tensor,  # [N, K] int8, of any strides
    scale: Tensor,  # [1] | [N] float32
    dtype: torch.dtype,
) -> Tensor:  # [T, N], of `dtype`
    """Rounded tokens times a weight's levels, in numbers:

    y[t, n] = ((sum over k of levels[t, k] weight[n, k]) * scale[n]) * (1 / per_unit[t])

    The sum is exact, then rounded to float32, as are the quotient and both products, the last of which is
    rounded to `dtype`.  So an element has the same bits whatever the order of the sum is, and whatever other
    tokens and rows stand beside it.
    """
    sums = levels.double() @ weight.double().t()  # below 2^53
    return ((sums.float() * scale) * (1 / per_unit[:, None])).to(dtype)
