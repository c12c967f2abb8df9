"""What the Triton kernels of kernels.py are made of: codes, slots, rules, scales and rounding of blocks.

All are inlined into the kernels. What makes their bytes those of the reference is said there.
"""

# Triton gives the parameters of these functions their types when it compiles them.
# mypy: disable-error-code="no-untyped-def"

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl

from lowbit_dist.ops.fused import RULES
from lowbit_dist.ops.reference import LARGEST_STEP
from lowbit_dist.ops.states import (
    SIGNED_SQUARE,
    SMALLEST_SCALE,
    UNSIGNED_FOURTH,
)

# A kernel reads globals of this type only.
_LARGEST_STEP = tl.constexpr(LARGEST_STEP)
_SMALLEST_SCALE = tl.constexpr(SMALLEST_SCALE)
# The largest number of a block in 8 bits, in units of its scale.
LARGEST_SIGNED = tl.constexpr(SIGNED_SQUARE)
LARGEST_UNSIGNED = tl.constexpr(UNSIGNED_FOURTH)
# Of a launch whose programs go through a tensor by turns: several for each multiprocessor of a large GPU.
PROGRAMS = 1024
ADAMW = tl.constexpr(RULES.index("adamw"))
APPLY = tl.constexpr(RULES.index(None))


def on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, whatever the tensors' own; on a CPU it is the interpreter."""
    is_there = device.type == "cpu" or device.index == torch.cuda.current_device()
    return nullcontext() if is_there else torch.cuda.device(device)


@triton.jit
def _loaded(pointer, mask):
    if mask is None:
        return tl.load(pointer)
    else:
        return tl.load(pointer, mask=mask, other=0)


@triton.jit
def load(pointer, mask):
    """float32 from float32 or bfloat16, exactly; 0 where `mask` is not, which may be None."""
    x = _loaded(pointer, mask)
    if x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x


@triton.jit
def store(pointer, x, mask, FINITE: tl.constexpr = False):
    """float32 to float32, or to bfloat16 with round to nearest even; any NaN stays one."""
    if pointer.dtype.element_ty == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        if not FINITE:
            bits = tl.where(x == x, bits, 0x7FC0)
        tl.store(pointer, bits.to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=mask)
    else:
        tl.store(pointer, x, mask=mask)


@triton.jit
def philox(seed, c0, c1, c2, c3):
    """The four words of Philox4x32-10. One product of 64 bits gives both halves; `tl.philox` makes two."""
    key0 = seed.to(tl.uint32)
    key1 = (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p2 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p2 >> 32).to(tl.uint32) ^ c1 ^ key0
        c1 = p2.to(tl.uint32)
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ key1
        c3 = p0.to(tl.uint32)
        key0 += 0x9E3779B9
        key1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def load_codes(codes_ptr, block, j, BITS: tl.constexpr):
    """The codes of elements j, j + 64, j + 128, j + 192 of each block: four int32 [blocks, 64]."""
    byte_ptr = codes_ptr + block.to(tl.int64)[:, None] * (32 * BITS)
    if BITS == 2:
        byte = tl.load(byte_ptr + j).to(tl.int32)
        return byte & 3, (byte >> 2) & 3, (byte >> 4) & 3, byte >> 6
    elif BITS == 3:
        low = tl.load(byte_ptr + j).to(tl.int32)
        # Bit i of high byte j % 32 belongs to element j % 32 + 32 * i.
        high = tl.load(byte_ptr + 64 + (j & 31)).to(tl.int32) >> (j >> 5)
        return (
            (low & 3) | ((high & 1) << 2),
            ((low >> 2) & 3) | (high & 4),
            ((low >> 4) & 3) | ((high >> 2) & 4),
            (low >> 6) | ((high >> 4) & 4),
        )
    elif BITS == 4:
        even = tl.load(byte_ptr + j).to(tl.int32)
        odd = tl.load(byte_ptr + 64 + j).to(tl.int32)
        return even & 15, odd & 15, even >> 4, odd >> 4
    elif BITS == 6:
        even = tl.load(byte_ptr + j).to(tl.int32)
        odd = tl.load(byte_ptr + 64 + j).to(tl.int32)
        high = tl.load(byte_ptr + 128 + j).to(tl.int32)
        return (
            (even & 15) | ((high & 3) << 4),
            (odd & 15) | ((high & 12) << 2),
            (even >> 4) | (high & 48),
            (odd >> 4) | ((high >> 2) & 48),
        )
    else:
        return (
            tl.load(byte_ptr + j).to(tl.int32),
            tl.load(byte_ptr + 64 + j).to(tl.int32),
            tl.load(byte_ptr + 128 + j).to(tl.int32),
            tl.load(byte_ptr + 192 + j).to(tl.int32),
        )


@triton.jit
def store_codes(codes_ptr, block, j, mask, c0, c1, c2, c3, BITS: tl.constexpr, BLOCKS: tl.constexpr):
    byte_ptr = codes_ptr + block.to(tl.int64)[:, None] * (32 * BITS)
    if BITS == 2:
        byte = c0 + (c1 << 2) + (c2 << 4) + (c3 << 6)
        tl.store(byte_ptr + j, byte.to(tl.uint8), mask=mask)
    elif BITS == 3:
        low = (c0 & 3) | ((c1 & 3) << 2) | ((c2 & 3) << 4) | ((c3 & 3) << 6)
        tl.store(byte_ptr + j, low.to(tl.uint8), mask=mask)
        high = (c0 >> 2) | (c1 & 4) | ((c2 & 4) << 2) | ((c3 & 4) << 4)
        # Columns j and j + 32 fill different bits of one byte: their sum is their union.
        high = tl.sum(tl.reshape(high << (j >> 5), [BLOCKS, 2, 32]), axis=1)
        tl.store(byte_ptr + 64 + tl.arange(0, 32)[None, :], high.to(tl.uint8), mask=mask)
    elif BITS == 4:
        tl.store(byte_ptr + j, (c0 | (c2 << 4)).to(tl.uint8), mask=mask)
        tl.store(byte_ptr + 64 + j, (c1 | (c3 << 4)).to(tl.uint8), mask=mask)
    elif BITS == 6:
        tl.store(byte_ptr + j, ((c0 & 15) | ((c2 & 15) << 4)).to(tl.uint8), mask=mask)
        tl.store(byte_ptr + 64 + j, ((c1 & 15) | ((c3 & 15) << 4)).to(tl.uint8), mask=mask)
        high = (c0 >> 4) | ((c1 >> 4) << 2) | ((c2 >> 4) << 4) | ((c3 >> 4) << 6)
        tl.store(byte_ptr + 128 + j, high.to(tl.uint8), mask=mask)
    else:
        tl.store(byte_ptr + j, c0.to(tl.uint8), mask=mask)
        tl.store(byte_ptr + 64 + j, c1.to(tl.uint8), mask=mask)
        tl.store(byte_ptr + 128 + j, c2.to(tl.uint8), mask=mask)
        tl.store(byte_ptr + 192 + j, c3.to(tl.uint8), mask=mask)


@triton.jit
def load_signed(pointer, scale, mask, QUANTISED: tl.constexpr):
    if QUANTISED:
        q = _loaded(pointer, mask).to(tl.float32)
        return (q * tl.abs(q)) * scale
    else:
        return load(pointer, mask)


@triton.jit
def load_unsigned(pointer, scale, mask, QUANTISED: tl.constexpr):
    if QUANTISED:
        q = _loaded(pointer, mask).to(tl.float32)
        q = q * q
        return (q * q) * scale
    else:
        return load(pointer, mask)


@triton.jit
def block_scale(largest, DIVISOR: tl.constexpr):
    """(scale, 1 / scale), both 0 for a block too small to be divided by its scale.

    scale = largest / DIVISOR, correctly rounded for both divisors wherever it is usable: test_kernels.py
    tries every mantissa.
    """
    scale = largest * (1.0 / DIVISOR)
    scale = tl.fma(tl.fma(-DIVISOR, scale, largest), 1.0 / DIVISOR, scale)
    usable = scale >= _SMALLEST_SCALE
    inverse = tl.where(usable, tl.div_rn(1.0, tl.where(usable, scale, 1.0)), 0.0)
    return tl.where(usable, scale, 0.0), inverse


@triton.jit
def quotient(a, b, inverse):
    """a / b, correctly rounded, as `inverse` = 1 / b is; all far from the ends of float32's range, or a is 0.
    test_kernels.py tries the whole numbers of 8 bits over every b.
    """
    q = a * inverse
    return tl.fma(tl.fma(-q, b, a), inverse, q)


@triton.jit
def code_of(y, FOURTH: tl.constexpr):
    """2^23 + the number of k >= 1 with y >= (k - 1/2)^p, p = 2 or 4: that number is its lowest byte.

    A guess less 1/2, rounded, is that number or one less, and the next threshold tells which. Adding 2^23
    rounds and leaves the integer in the low bits; below 1/2 that is -1, with a threshold of 0.
    """
    guess = tl.sqrt(y)
    if FOURTH:
        guess = tl.sqrt(guess)
    rounded = guess + 8388607.5
    threshold = rounded - 8388607.5
    threshold = threshold * threshold
    if FOURTH:
        threshold = threshold * threshold
    return tl.where(y >= threshold, rounded + 1.0, rounded)


@triton.jit
def quantised_signed(x, inverse_scale):
    code = code_of(tl.abs(x) * inverse_scale, False)
    code = tl.where(x < 0, 25165824.0 - code, code)  # 2^24 - the number
    return code.to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def quantised_unsigned(x, inverse_scale):
    # A mean of squares that decodes to 0 would make the next update explode: its code is at least 1.
    code = tl.maximum(code_of(x * inverse_scale, True), 8388609.0)
    return code.to(tl.int32, bitcast=True).to(tl.uint8)


@triton.jit
def adaptive(a, x, eps, USUAL: tl.constexpr):
    """a / (sqrt(x) + eps), each operation correctly rounded.

    USUAL (`is_usual`) does without the guards of tl.div_rn and tl.sqrt_rn, between which nothing else can be
    computed.  Both begin with an approximate root, and end with the rest that is left, which fused
    multiply-adds have exactly.  What they give is right

    * of a root, if x is at least 2^-104. Below, it is less than 2^-51.9 whatever it is, and adding eps gives
      eps.
    * of a quotient, if a is 0, or at least 2^-102 and the quotient normal. Else it is below 2^-74.9, as it
      should be, but its last bits may be wrong: no code depends on them.

    test_kernels.py tries every divisor, with any root that PTX allows (off by 2^-22.9), and every x, with
    those of the GPU that it runs on.
    """
    if USUAL:
        r = tl.rsqrt(tl.maximum(x, _SMALLEST_SCALE))
        root = x * r
        root = tl.fma(tl.fma(-root, root, x), 0.5 * r, root)
        b = root + eps
        inverse = tl.rsqrt(b * b)
        rest = tl.fma(-b, inverse, 1.0) + 1.1368683772161603e-13  # 2^-43, which decides ties
        return quotient(a, b, tl.fma(rest, inverse, inverse))
    else:
        return tl.div_rn(a, tl.sqrt_rn(x) + eps)


def is_usual(eps: float, lr: float, decay: float) -> bool:
    """Whether no code depends on the last bits of a direction below 2^-74.9, as scales are at least 2^-14.

    Without decay such a direction moves nothing: it is less than 2^-32 levels. With decay, a level other than
    0 decays by more than 2^27 times as much, and the sum of both is the decay.
    """
    decays = decay == 0 or max(2.0**-90, lr * 2.0**-33) < decay <= 1
    return 2.0**-27 <= eps <= 1 and lr < 2.0**28 and decays


@triton.jit
def moved(
    g, m, v, beta1, rest1, beta2, rest2, correction1, correction2, eps, RULE: tl.constexpr,
    USUAL: tl.constexpr = False,
):  # fmt: skip
    """The direction, and the slots' new values; v with AdamW only."""
    if RULE == ADAMW:
        m = m * beta1 + g * rest1
        v = v * beta2 + (g * g) * rest2
        u = adaptive(m * correction1, v * correction2, eps, USUAL)
    else:
        mixed = m * beta1 + g * rest1
        u = tl.where(mixed > 0, 1.0, 0.0) - tl.where(mixed < 0, 1.0, 0.0)
        m = m * beta2 + g * rest2
    return u, m, v


@triton.jit
def scale_of_plane(scale_ptr, block, offset, units_per_scale, i: tl.constexpr, UNITS: tl.constexpr):
    """The scale of plane `i` of each block, [blocks, 1]; the same for all, a scalar, if UNITS is 0."""
    if UNITS == 0:
        return tl.load(scale_ptr)
    else:
        unit = offset + block * UNITS + (i if UNITS > 1 else 0)
        return tl.load(scale_ptr + unit // units_per_scale)[:, None]


@triton.jit
def level_of(code, LOW: tl.constexpr):
    """code + LOW as a float32: a code of 8 bits is put below 2^23's own."""
    return (code | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 - LOW)


@triton.jit
def rounded_step(code, step, random, TOP: tl.constexpr, SCALED: tl.constexpr):
    """`code` + `step` rounded stochastically: up with a probability that is exact to 2^-32.

    In units of 2^-32 levels, in which a SCALED step is, its 64-bit integer has whole levels above and the
    threshold of chance below; adding 2^32 - 1 - `random` carries if `random` is below the threshold.
    """
    if SCALED:
        size = tl.minimum(tl.abs(step), _LARGEST_STEP * 4294967296.0).to(tl.uint64)
    else:
        size = (tl.minimum(tl.abs(step), _LARGEST_STEP) * 4294967296.0).to(tl.uint64)
    n = ((size + (~random).to(tl.uint64)) >> 32).to(tl.int32)
    return tl.maximum(tl.minimum(code + tl.where(step < 0, -n, n), TOP), 0)


@triton.jit
def _is_below(random, chance):
    """1 where `random`, in units of 2^-32, is below `chance`, which is at most 1."""
    return (((chance * 4294967296.0).to(tl.uint64) + (~random).to(tl.uint64)) >> 32).to(tl.int32)


@triton.jit
def step_towards_nearest(code, step, random, TOP: tl.constexpr, nearest_from, nearest_slope):
    """`rounded_step` on the way from chance to the nearest level."""
    size = tl.minimum(tl.abs(step), _LARGEST_STEP)
    whole = tl.floor(size)
    chance = tl.minimum(tl.maximum((size - whole - nearest_from) * nearest_slope, 0.0), 1.0)
    n = whole.to(tl.int32) + _is_below(random, chance)
    return tl.maximum(tl.minimum(code + tl.where(step < 0, -n, n), TOP), 0)


@triton.jit
def accumulated(
    residual_ptr, mask, level, step, random, keep, kept, per_level, reach, threshold,
    LOW: tl.constexpr, HIGH: tl.constexpr, RESETS: tl.constexpr,
):  # fmt: skip
    """The code of level + residual - `step`, as reference.py has it; what is left is the new residual."""
    if residual_ptr.dtype.element_ty == tl.bfloat16:
        residual = load(residual_ptr, mask)
    else:
        residual = _loaded(residual_ptr, mask).to(tl.float32)
    x = (level + residual * kept) * keep - step
    # Adding 1.5 * 2^23 rounds to the even one of two neighbours, below 2^22; grids end far below.
    nearest = tl.minimum(tl.maximum(x, -4194304.0), 4194304.0) + 12582912.0 - 12582912.0
    new = tl.where(tl.abs(x - level) > threshold, nearest, level)
    new = tl.minimum(tl.maximum(new, LOW), HIGH)
    rest = tl.minimum(tl.maximum(x - new, -reach), reach) * per_level
    if RESETS:
        rest = tl.where(new != level, 0.0, rest)
    if residual_ptr.dtype.element_ty == tl.bfloat16:
        bits = rest.to(tl.uint32, bitcast=True) + (random >> 16)
        tl.store(residual_ptr, (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=mask)
    else:
        whole = tl.floor(rest)
        counts = whole.to(tl.int32) + _is_below(random, rest - whole)
        tl.store(residual_ptr, tl.minimum(tl.maximum(counts, -127), 127).to(tl.int8), mask=mask)
    return (new - LOW).to(tl.int32)
