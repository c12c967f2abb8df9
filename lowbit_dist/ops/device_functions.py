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
    SIGNED_TOP,
    SMALLEST_SCALE,
    UNSIGNED_FOURTH,
    UNSIGNED_TOP,
)

# A kernel reads globals of this type only.
_LARGEST_STEP = tl.constexpr(LARGEST_STEP)
_SMALLEST_SCALE = tl.constexpr(SMALLEST_SCALE)
_SIGNED_TOP = tl.constexpr(float(SIGNED_TOP))
_UNSIGNED_TOP = tl.constexpr(float(UNSIGNED_TOP))
# The largest number of a block in 8 bits, in units of its scale.
LARGEST_SIGNED = tl.constexpr(SIGNED_SQUARE)
LARGEST_UNSIGNED = tl.constexpr(UNSIGNED_FOURTH)
ADAMW = tl.constexpr(RULES.index("adamw"))
APPLY = tl.constexpr(RULES.index(None))


def on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, whatever the tensors' own; on a CPU it is the interpreter."""
    return nullcontext() if device.type == "cpu" else torch.cuda.device(device)


@triton.jit
def load(pointer, mask):
    """float32 from float32 or bfloat16, exactly."""
    x = tl.load(pointer, mask=mask, other=0)
    if x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x


@triton.jit
def store(pointer, x, mask):
    """float32 to float32, or to bfloat16 with round to nearest even; a NaN stays one."""
    if pointer.dtype.element_ty == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        bits = tl.where(x == x, bits, 0x7FC0)
        tl.store(pointer, bits.to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=mask)
    else:
        tl.store(pointer, x, mask=mask)


@triton.jit
def load_codes(codes_ptr, block, j, mask, BITS: tl.constexpr):
    """The codes of elements j, j + 64, j + 128, j + 192 of each block: four int32 [blocks, 64]."""
    byte_ptr = codes_ptr + block.to(tl.int64)[:, None] * (32 * BITS)
    if BITS == 2:
        byte = tl.load(byte_ptr + j, mask=mask, other=0).to(tl.int32)
        return byte & 3, (byte >> 2) & 3, (byte >> 4) & 3, byte >> 6
    elif BITS == 3:
        low = tl.load(byte_ptr + j, mask=mask, other=0).to(tl.int32)
        # Bit i of high byte j % 32 belongs to element j % 32 + 32 * i.
        high = tl.load(byte_ptr + 64 + (j & 31), mask=mask, other=0).to(tl.int32) >> (j >> 5)
        return (
            (low & 3) | ((high & 1) << 2),
            ((low >> 2) & 3) | (high & 4),
            ((low >> 4) & 3) | ((high >> 2) & 4),
            (low >> 6) | ((high >> 4) & 4),
        )
    elif BITS == 4:
        even = tl.load(byte_ptr + j, mask=mask, other=0).to(tl.int32)
        odd = tl.load(byte_ptr + 64 + j, mask=mask, other=0).to(tl.int32)
        return even & 15, odd & 15, even >> 4, odd >> 4
    elif BITS == 6:
        even = tl.load(byte_ptr + j, mask=mask, other=0).to(tl.int32)
        odd = tl.load(byte_ptr + 64 + j, mask=mask, other=0).to(tl.int32)
        high = tl.load(byte_ptr + 128 + j, mask=mask, other=0).to(tl.int32)
        return (
            (even & 15) | ((high & 3) << 4),
            (odd & 15) | ((high & 12) << 2),
            (even >> 4) | (high & 48),
            (odd >> 4) | ((high >> 2) & 48),
        )
    else:
        return (
            tl.load(byte_ptr + j, mask=mask, other=0).to(tl.int32),
            tl.load(byte_ptr + 64 + j, mask=mask, other=0).to(tl.int32),
            tl.load(byte_ptr + 128 + j, mask=mask, other=0).to(tl.int32),
            tl.load(byte_ptr + 192 + j, mask=mask, other=0).to(tl.int32),
        )


@triton.jit
def store_codes(codes_ptr, block, j, mask, c0, c1, c2, c3, BITS: tl.constexpr, BLOCKS: tl.constexpr):
    byte_ptr = codes_ptr + block.to(tl.int64)[:, None] * (32 * BITS)
    if BITS == 2:
        byte = c0 | (c1 << 2) | (c2 << 4) | (c3 << 6)
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
        q = tl.load(pointer, mask=mask, other=0).to(tl.float32)
        return (q * tl.abs(q)) * scale
    else:
        return load(pointer, mask)


@triton.jit
def load_unsigned(pointer, scale, mask, QUANTISED: tl.constexpr):
    if QUANTISED:
        q = tl.load(pointer, mask=mask, other=0).to(tl.float32)
        q = q * q
        return (q * q) * scale
    else:
        return load(pointer, mask)


@triton.jit
def block_scale(largest, DIVISOR: tl.constexpr):
    """(scale, 1 / scale), both 0 for a block too small to be divided by its scale."""
    scale = tl.div_rn(largest, DIVISOR)
    usable = scale >= _SMALLEST_SCALE
    inverse = tl.where(usable, tl.div_rn(1.0, tl.where(usable, scale, 1.0)), 0.0)
    return tl.where(usable, scale, 0.0), inverse


@triton.jit
def nearest_root(y, FOURTH: tl.constexpr):
    """The number of k >= 1 with y >= (k - 1/2)^p, p = 2 or 4: a rounded root that needs no exact root."""
    guess = tl.sqrt(y)
    if FOURTH:
        guess = tl.sqrt(guess)
    q = tl.floor(guess + 0.5)
    below = q - 0.5
    below = below * below
    above = q + 0.5
    above = above * above
    if FOURTH:
        below = below * below
        above = above * above
    return tl.where((y < below) & (q > 0.5), q - 1.0, tl.where(y >= above, q + 1.0, q))


@triton.jit
def quantised_signed(x, inverse_scale):
    q = tl.minimum(nearest_root(tl.abs(x) * inverse_scale, False), _SIGNED_TOP)
    return tl.where(x < 0, -q, q).to(tl.int8)


@triton.jit
def quantised_unsigned(x, inverse_scale):
    q = tl.minimum(nearest_root(x * inverse_scale, True), _UNSIGNED_TOP)
    # A mean of squares that decodes to 0 would make the next update explode.
    return tl.maximum(q, 1.0).to(tl.uint8)


@triton.jit
def moved(g, m, v, beta1, rest1, beta2, rest2, correction1, correction2, eps, RULE: tl.constexpr):
    """The direction, and the slots' new values; v with AdamW only."""
    if RULE == ADAMW:
        m = m * beta1 + g * rest1
        v = v * beta2 + (g * g) * rest2
        u = tl.div_rn(m * correction1, tl.sqrt_rn(v * correction2) + eps)
    else:
        mixed = m * beta1 + g * rest1
        u = tl.where(mixed > 0, 1.0, 0.0) - tl.where(mixed < 0, 1.0, 0.0)
        m = m * beta2 + g * rest2
    return u, m, v


@triton.jit
def scale_of_plane(scale_ptr, block, live, offset, units_per_scale, i: tl.constexpr, UNITS: tl.constexpr):
    """The scale of plane `i` of each block, [blocks, 1]; the same for all, a scalar, if UNITS is 0."""
    if UNITS == 0:
        return tl.load(scale_ptr)
    else:
        unit = offset + block * UNITS + (i if UNITS > 1 else 0)
        return tl.load(scale_ptr + unit // units_per_scale, mask=live, other=1.0)[:, None]


@triton.jit
def rounded_step(level, step, random, LOW: tl.constexpr, HIGH: tl.constexpr):
    """`level` + `step` rounded stochastically: up with a probability that is exact to 2^-32."""
    size = tl.minimum(tl.abs(step), _LARGEST_STEP)
    whole = tl.floor(size)
    threshold = ((size - whole) * 4294967296.0).to(tl.uint32)
    n = whole.to(tl.int32) + (random < threshold).to(tl.int32)
    return tl.minimum(tl.maximum(level + tl.where(step < 0, -n, n), LOW), HIGH)
