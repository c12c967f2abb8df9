"""The ops of reference.py and states.py in Triton, for NVIDIA GPUs, with the rules of optim/adamw.py and
optim/lion.py fused in: the same bytes; see there for what they mean.

Shown for Triton's interpreter on a CPU and, with PyTorch 2.11 and Triton 3.6, on an H200.  What makes the
bytes equal everywhere, and must stay:

* division and square root of the update are the correctly rounded ones (`tl.div_rn`, `adaptive`);
* every kernel is launched with `enable_fp_fusion=False`: a multiply-add that rounds once instead of twice
  gives another number, and in Triton before 3.10 fusing is the default;
* 8-bit slots are rounded by comparing with exact thresholds, so that the square root behind the first
  guess may be an approximate one;
* bfloat16 is converted by integer arithmetic: the interpreter's own casts truncate and lose subnormals.

A program works on a few blocks of 256 elements. In the kernels for codes a block is four planes
of 64: lane i of the Philox call j rounds element j + 64 * i, in whichever bits of which byte its code lies.

Scales are found by 32-bit divisions, none where one scale serves the whole shard, one a block where a scale
serves whole blocks, else one for each plane of 64 elements.

Shapes: B = blocks of this shard, K = scales of the whole tensor, N = elements.
"""

# Triton gives the parameters of kernels their types when it compiles them.
# mypy: disable-error-code="no-untyped-def"

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit_dist.grid import BLOCK, PLANE, Grid
from lowbit_dist.ops.device_functions import (
    ADAMW,
    APPLY,
    LARGEST_SIGNED,
    LARGEST_UNSIGNED,
    accumulated,
    block_scale,
    is_usual,
    level_of,
    load,
    load_codes,
    load_signed,
    load_unsigned,
    moved,
    on,
    philox,
    quantised_signed,
    quantised_unsigned,
    rounded_step,
    scale_of_plane,
    step_towards_nearest,
    store,
    store_codes,
)
from lowbit_dist.ops.fused import NO_FACTORS, RULES, Factors, accumulation, factors
from lowbit_dist.ops.product_kernels import code_counts as code_counts
from lowbit_dist.ops.product_kernels import int8_product as int8_product
from lowbit_dist.ops.product_kernels import unpack as unpack
from lowbit_dist.ops.states import Stored
from lowbit_dist.ops.targets import Codes, Now, Rule, Weights
from lowbit_dist.ops.token_kernels import largest as largest
from lowbit_dist.ops.token_kernels import round_tokens as round_tokens
from lowbit_dist.ops.token_kernels import rounded_tokens as rounded_tokens
from lowbit_dist.ops.token_kernels import square_sum as square_sum
from lowbit_dist.ops.token_kernels import token_values as token_values

# Blocks per program, powers of two. Twice as many would need twice the registers per thread; below 4 blocks
# of codes several threads would hold the same element, and one could read what another has overwritten.
CODE_BLOCKS = 8
WEIGHT_BLOCKS = 4
DECODE_BLOCKS = 16  # a thread writes 16 bytes of bfloat16 at a time


# Numbers that change from call to call must not be compiled in (Triton would, for 1 and multiples of 16), nor
# where flips are counted, one parameter's beside another's.
@triton.jit(
    do_not_specialize=[
        "n_flips_ptr", "n_blocks", "first_block", "offset", "units_per_scale", "seed", "step", "tensor"
    ]
)  # fmt: skip
def _step_codes(
    codes_ptr, residual_ptr, scale_ptr, grad_ptr, m_ptr, v_ptr, m_scale_ptr, v_scale_ptr, n_flips_ptr,
    n_blocks, first_block, offset, units_per_scale, seed, step, tensor,
    grad_scale, beta1, rest1, beta2, rest2, correction1, correction2, eps, lr, decay, keep,
    nearest_from, nearest_slope, kept, per_level, reach, threshold,
    LOW: tl.constexpr, HIGH: tl.constexpr, BITS: tl.constexpr, UNITS: tl.constexpr, RULE: tl.constexpr,
    QUANTISED: tl.constexpr, USUAL: tl.constexpr, TOWARDS_NEAREST: tl.constexpr, RESETS: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    live = block < n_blocks
    # Blocks beyond the shard read its last one, and write nothing.
    block = tl.minimum(block, n_blocks - 1)
    mask = live[:, None]
    j = tl.arange(0, 64)[None, :]
    element = block.to(tl.int64)[:, None] * 256 + j

    # In USUAL numbers, steps are far from the ends of float32's range: units of 2^-32 levels change no bit.
    unit = 4294967296.0 if USUAL else 1.0
    decay *= unit
    levels_per_unit = unit * tl.div_rn(
        lr, scale_of_plane(scale_ptr, block, offset, units_per_scale, 0, UNITS)
    )
    m_scale = 0.0
    v_scale = 0.0
    if QUANTISED:
        m_scale = tl.load(m_scale_ptr + block)[:, None]
        if RULE == ADAMW:
            v_scale = tl.load(v_scale_ptr + block)[:, None]

    old = load_codes(codes_ptr, block, j, BITS)
    # A block's 64 counters begin at a multiple of 64: adding j never carries into the upper half.
    counter = (first_block.to(tl.int64) + block) * 64
    # No code has bits above its eighth: adding them keeps the words in the layout of what was loaded.
    counter_low = counter.to(tl.uint32)[:, None] + j.to(tl.uint32) + (old[0] >> 8).to(tl.uint32)
    counter_high = (counter >> 32).to(tl.uint32)[:, None] + tl.zeros_like(counter_low)
    random = philox(
        seed.to(tl.int64),
        counter_low,
        counter_high,
        tl.zeros_like(counter_low) + step.to(tl.uint32),
        tl.zeros_like(counter_low) + tensor.to(tl.uint32),
    )
    new = ()  # type: tuple[Tensor, ...]
    ms = ()  # type: tuple[Tensor, ...]
    vs = ()  # type: tuple[Tensor, ...]
    largest_m = tl.zeros([BLOCKS, 64], tl.float32)
    largest_v = tl.zeros(
        [BLOCKS, 64], tl.int32
    )  # its bits: of three integers one instruction has the largest
    n_flips = tl.zeros([BLOCKS, 64], tl.float32)  # whole numbers
    for i in tl.static_range(4):
        at = element + 64 * i
        if RULE == APPLY:
            u = tl.load(grad_ptr + at)
        else:
            # A mask that is not needed: without one, ptxas fetches each number anew for every use.
            g = load(grad_ptr + at, mask) * grad_scale
            m = load_signed(m_ptr + at, m_scale, None, QUANTISED)
            v = m
            if RULE == ADAMW:
                v = load_unsigned(v_ptr + at, v_scale, None, QUANTISED)
            u, m, v = moved(g, m, v, beta1, rest1, beta2, rest2, correction1, correction2, eps, RULE, USUAL)
            if QUANTISED:
                largest_m = tl.maximum(largest_m, tl.abs(m))
                ms += (m,)
                if RULE == ADAMW:
                    largest_v = tl.maximum(largest_v, v.to(tl.int32, bitcast=True))
                    vs += (v,)
            else:
                store(m_ptr + at, m, mask)
                if RULE == ADAMW:
                    store(v_ptr + at, v, mask)
        if UNITS > 1:
            scale = scale_of_plane(scale_ptr, block, offset, units_per_scale, i, UNITS)
            levels_per_unit = unit * tl.div_rn(lr, scale)
        level = level_of(old[i], LOW)
        if residual_ptr is not None:
            code = accumulated(
                residual_ptr + at, mask, level, levels_per_unit * u, random[i],
                keep, kept, per_level, reach, threshold, LOW, HIGH, RESETS,
            )  # fmt: skip
        else:
            if (
                HIGH <= 2 and LOW >= -2
            ):  # products with such levels are exact: rounding them once more changes nothing
                d = tl.fma(-decay, level, -(levels_per_unit * u))
            else:
                d = -(levels_per_unit * u) - decay * level
            if TOWARDS_NEAREST:
                code = step_towards_nearest(old[i], d, random[i], HIGH - LOW, nearest_from, nearest_slope)
            else:
                code = rounded_step(old[i], d, random[i], HIGH - LOW, USUAL)
        n_flips = tl.where(code != old[i], n_flips + 1.0, n_flips)
        new += (code,)
    store_codes(codes_ptr, block, j, mask, new[0], new[1], new[2], new[3], BITS, BLOCKS)
    tl.atomic_add(n_flips_ptr, tl.sum(tl.where(mask, n_flips, 0.0)).to(tl.int64), sem="relaxed")

    if QUANTISED:
        m_scale, m_inverse = block_scale(tl.max(largest_m, axis=1), LARGEST_SIGNED)
        tl.store(m_scale_ptr + block, m_scale, mask=live)
        for i in tl.static_range(4):
            tl.store(m_ptr + element + 64 * i, quantised_signed(ms[i], m_inverse[:, None]), mask=mask)
        if RULE == ADAMW:
            largest = tl.max(largest_v, axis=1).to(tl.float32, bitcast=True)
            v_scale, v_inverse = block_scale(largest, LARGEST_UNSIGNED)
            tl.store(v_scale_ptr + block, v_scale, mask=live)
            for i in tl.static_range(4):
                tl.store(v_ptr + element + 64 * i, quantised_unsigned(vs[i], v_inverse[:, None]), mask=mask)


@triton.jit
def _step_weights(
    weight_ptr, grad_ptr, m_ptr, v_ptr, m_scale_ptr, v_scale_ptr, n,
    grad_scale, beta1, rest1, beta2, rest2, correction1, correction2, eps, lr, keep,
    RULE: tl.constexpr, QUANTISED: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    first = block.to(tl.int64) * 256
    live = first < n
    at = first[:, None] + tl.arange(0, 256)[None, :]
    mask = at < n

    if RULE == APPLY:
        u = tl.load(grad_ptr + at, mask=mask, other=0.0)
    else:
        m_scale = 0.0
        v_scale = 0.0
        if QUANTISED:
            m_scale = tl.load(m_scale_ptr + block, mask=live, other=0.0)[:, None]
            if RULE == ADAMW:
                v_scale = tl.load(v_scale_ptr + block, mask=live, other=0.0)[:, None]
        g = load(grad_ptr + at, mask) * grad_scale
        m = load_signed(m_ptr + at, m_scale, mask, QUANTISED)
        v = m
        if RULE == ADAMW:
            v = load_unsigned(v_ptr + at, v_scale, mask, QUANTISED)
        u, m, v = moved(g, m, v, beta1, rest1, beta2, rest2, correction1, correction2, eps, RULE)
        if QUANTISED:
            m_scale, m_inverse = block_scale(tl.max(tl.abs(m), axis=1), LARGEST_SIGNED)
            tl.store(m_scale_ptr + block, m_scale, mask=live)
            tl.store(m_ptr + at, quantised_signed(m, m_inverse[:, None]), mask=mask)
            if RULE == ADAMW:
                v_scale, v_inverse = block_scale(tl.max(v, axis=1), LARGEST_UNSIGNED)
                tl.store(v_scale_ptr + block, v_scale, mask=live)
                tl.store(v_ptr + at, quantised_unsigned(v, v_inverse[:, None]), mask=mask)
        else:
            store(m_ptr + at, m, mask)
            if RULE == ADAMW:
                store(v_ptr + at, v, mask)
    weight = tl.load(weight_ptr + at, mask=mask, other=0.0)
    tl.store(weight_ptr + at, weight * keep - lr * u, mask=mask)


@triton.jit(do_not_specialize=["n_blocks", "offset", "units_per_scale"])
def _decode(
    codes_ptr, scale_ptr, out_ptr, n_blocks, offset, units_per_scale,
    LOW: tl.constexpr, BITS: tl.constexpr, UNITS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    mask = (block < n_blocks)[:, None]
    block = tl.minimum(block, n_blocks - 1)
    j = tl.arange(0, 64)[None, :]
    scale = scale_of_plane(scale_ptr, block, offset, units_per_scale, 0, UNITS)
    codes = load_codes(codes_ptr, block, j, BITS)
    for i in tl.static_range(4):
        if UNITS > 1:
            scale = scale_of_plane(scale_ptr, block, offset, units_per_scale, i, UNITS)
        at = block.to(tl.int64)[:, None] * 256 + (64 * i + j)
        store(out_ptr + at, scale * level_of(codes[i], LOW), mask, FINITE=True)


def step_(
    target: Codes | Weights,
    grad: Tensor,  # [N] float32 or bfloat16
    state: list[Stored],  # of N elements each, changed in place
    *,
    rule: Rule,
    now: Now,
) -> Tensor:  # [1] int64
    """One step of a rule that is fused; how many codes changed."""
    return _step(target, grad, state, factors(rule, now), RULES.index(rule.fused), now)


def apply_(
    target: Codes | Weights,
    u: Tensor,  # [N] float32
    *,
    now: Now,
) -> Tensor:  # [1] int64
    """The second half of a step alone; how many codes changed."""
    return _step(target, u, [], NO_FACTORS, RULES.index(None), now)


def _step(
    target: Codes | Weights, grad: Tensor, state: list[Stored], numbers: Factors, rule: int, now: Now
) -> Tensor:
    if isinstance(target, Weights):
        n_flips = _no_flips(grad.device)
    elif target.flips is not None:
        n_flips = target.flips
    else:
        n_flips = torch.zeros(1, dtype=torch.int64, device=grad.device)
    if target.numel == 0:
        return n_flips
    slots = _slots(state)
    quantised = slots[2] is not None
    with on(grad.device):
        if isinstance(target, Weights):
            _step_weights[(triton.cdiv(target.numel, WEIGHT_BLOCKS * BLOCK),)](
                target.weight, grad, *slots, target.numel, *numbers, now.lr, 1.0 - now.decay,
                RULE=rule, QUANTISED=quantised, BLOCKS=WEIGHT_BLOCKS,
                num_warps=4, enable_fp_fusion=False,
            )  # fmt: skip
        else:
            grid, n_blocks = target.grid, target.numel // BLOCK
            scale, offset, units_per_scale, units = _scales_of_shard(
                target.scale, n_blocks, target.first_block, target.scale_every
            )
            residual = None if target.residual is None else target.residual.values
            is_plain = residual is None and not now.nearest
            _step_codes[(triton.cdiv(n_blocks, CODE_BLOCKS),)](
                target.codes, residual, scale, grad, *slots, n_flips,
                n_blocks, target.first_block, offset, units_per_scale,
                _signed(now.seed), now.step, target.tensor, *numbers, now.lr, now.decay, 1.0 - now.decay,
                now.nearest / 2, now.slope, *accumulation(target.residual, now),
                LOW=grid.low, HIGH=grid.high, BITS=grid.bits, UNITS=units, RULE=rule, QUANTISED=quantised,
                USUAL=is_plain and is_usual(numbers.eps, now.lr, now.decay), TOWARDS_NEAREST=now.nearest > 0,
                RESETS=target.residual is not None and target.residual.kept.resets,
                BLOCKS=CODE_BLOCKS, num_warps=4, enable_fp_fusion=False,
            )  # fmt: skip
    return n_flips


@cache
def _no_flips(device: torch.device) -> Tensor:  # [1] int64
    return torch.zeros(1, dtype=torch.int64, device=device)


def decode(
    codes: Tensor,  # [B * grid.bytes_per_block] uint8
    scale: Tensor,  # [K] float32
    *,
    grid: Grid,
    first_block: int,
    scale_every: int,
    out: Tensor,  # [B * 256] float32 or bfloat16, overwritten
) -> Tensor:  # out
    """scale * level of every code: a float32 product, rounded to the type of `out`."""
    n_blocks = codes.numel() // grid.bytes_per_block
    if n_blocks == 0:
        return out
    scale, offset, units_per_scale, units = _scales_of_shard(scale, n_blocks, first_block, scale_every)
    with on(codes.device):
        _decode[(triton.cdiv(n_blocks, DECODE_BLOCKS),)](
            codes, scale, out, n_blocks, offset, units_per_scale,
            LOW=grid.low, BITS=grid.bits, UNITS=units, BLOCKS=DECODE_BLOCKS,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def _scales_of_shard(
    scale: Tensor, n_blocks: int, first_block: int, scale_every: int
) -> tuple[Tensor, int, int, int]:
    """(the scales of the shard, its first unit's place under the first of them, units under each, units in a
    block). A unit is a block if scales serve whole blocks, else a plane; with one scale there are none.

    The numbers are small enough for 32-bit division, which a GPU does several times faster.
    """
    start = first_block * BLOCK
    first, place = divmod(start, scale_every)
    of_shard = scale[first : (start + n_blocks * BLOCK - 1) // scale_every + 1]
    unit = PLANE if scale_every % BLOCK else BLOCK
    return of_shard, place // unit, scale_every // unit, BLOCK // unit if of_shard.numel() > 1 else 0


def _slots(state: list[Stored]) -> tuple[Tensor | None, ...]:
    """(m, v, m's scale, v's scale), None for what a rule lacks."""
    values = [slot.values for slot in state] + [None] * (2 - len(state))
    scales = [slot.scale for slot in state] + [None] * (2 - len(state))
    return *values, *scales


def _signed(seed: int) -> int:
    """The same 64 bits as an int64."""
    return seed - (1 << 64) if seed >= 1 << 63 else seed
