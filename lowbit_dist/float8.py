"""Matrix products in 8-bit floats (arXiv 2209.05433): each factor has one scale, found anew for each product.

    a8 = a * top / max|a|, rounded        a . b^T  =  a8 . b8^T * (max|a| / top_a) (max|b| / top_b)

Gradients are e5m2 (5 bits of exponent, 2 of mantissa, top 57344), all else is e4m3 (4 and 3 bits, top 448).
A ternary weight with one scale loses nothing: its levels become -448, 0 and 448.

GPUs multiply so from compute capability 8.9 on; `torch._scaled_mm` is that product, and on a CPU the same
in float32.  It wants the inner dimension and the columns of its result in multiples of 16, and both factors
laid out along the inner one; so factors are padded with zeros, and copied where they are transposed.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from lowbit_dist.errors import ConfigError

LEAST = (8, 9)  # Ada; Hopper is 9.0
MULTIPLE = 16
LEAST_MAXIMUM = 1e-30  # of a tensor of zeros, which is not divided by 0


def product(a: Tensor, b: Tensor, *, of_gradient: bool = False) -> Tensor:  # [M, K], [N, K] -> [M, N]
    """a . b^T, in a's precision.  `of_gradient`: a is the gradient of a layer's output."""
    if not a.numel() or not b.numel():
        return a.new_zeros(len(a), len(b))
    a8, a_one = _rounded(a, torch.float8_e5m2 if of_gradient else torch.float8_e4m3fn)
    b8, b_one = _rounded(b, torch.float8_e4m3fn)
    y = torch._scaled_mm(
        a8, b8.t(), scale_a=a_one, scale_b=b_one, out_dtype=a.dtype,
        use_fast_accum=not of_gradient,  # as in torchao: sums of gradients are kept in full float32
    )  # fmt: skip
    return y[: len(a), : len(b)].contiguous()


def _rounded(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x [rows, K] in 8 bits, padded to multiples of 16, and what a 1 of them is worth: [] float32."""
    top = torch.finfo(dtype).max
    low, high = torch.aminmax(x)
    one = torch.maximum(-low, high).float().clamp(min=LEAST_MAXIMUM) / top
    missing = [-n % MULTIPLE for n in x.shape]
    x = pad(x, (0, missing[1], 0, missing[0])) if any(missing) else x
    # A divisor with dimensions makes quotients in float32; what is beyond `top` by a rounding becomes it.
    return (x / one.view(1, 1)).to(dtype).contiguous(), one


def gpus() -> list[tuple[int, int]]:
    """The compute capability of each GPU that this process sees."""
    return [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]


def check(capabilities: Sequence[tuple[int, int]], place: str) -> None:
    """ConfigError unless `place` has GPUs, and all of these multiply 8-bit floats."""
    if capabilities and min(capabilities) >= LEAST:
        return
    of_worst = "one of {}.{}".format(*min(capabilities)) if capabilities else "none"
    raise ConfigError(
        "precision (fp8) must go with GPUs of compute capability {}.{} or more for all workers, but {} has "
        "{}; write precision: bf16".format(*LEAST, place, of_worst)
    )
