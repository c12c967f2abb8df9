"""Products of integers on a GPU's tensor cores, the levels that they are made of, and counts of these, in
Triton: the reference's bytes.

kernels.py says what equal bytes rest on, and where they were shown.  Sums of products of 8 bits are exact in
32, in whichever order tensor cores make them.

Letters: T tokens, K elements of each, N rows of a weight.
"""

# Triton gives the parameters of kernels their types when it compiles them.
# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit_dist.grid import BLOCK, Grid
from lowbit_dist.ops.device_functions import PROGRAMS, load_codes, on, store

UNPACK_BLOCKS = 32  # of a program; a thread writes 16 bytes at a time
COUNT_BLOCKS = 16  # of a program at a time
# Of a program: tokens, rows, and elements of both at a time.
TILE = {"BM": 128, "BN": 256, "BK": 128}
TURNED = 128  # rows and columns of a program that lays a weight by columns
SIDE_BY_SIDE = 16  # programs along the tokens, which read the same rows while these are in the L2 cache


@triton.jit(do_not_specialize=["n_blocks"])
def _unpack(codes_ptr, out_ptr, n_blocks, LOW: tl.constexpr, BITS: tl.constexpr, BLOCKS: tl.constexpr):
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    mask = (block < n_blocks)[:, None]
    block = tl.minimum(block, n_blocks - 1)
    j = tl.arange(0, 64)[None, :]
    codes = load_codes(codes_ptr, block, j, BITS)
    for i in tl.static_range(4):
        at = block.to(tl.int64)[:, None] * 256 + (64 * i + j)
        tl.store(out_ptr + at, (codes[i] + LOW).to(tl.int8), mask=mask)


@triton.jit(do_not_specialize=["n_blocks"])
def _count(codes_ptr, counts_ptr, n_blocks, BITS: tl.constexpr, BLOCKS: tl.constexpr):
    CODES: tl.constexpr = 2**BITS
    j = tl.arange(0, 64)[None, :]
    counts = tl.zeros([2 * CODES], tl.int32)
    for first in range(tl.program_id(0) * BLOCKS, n_blocks, tl.num_programs(0) * BLOCKS):
        block = first + tl.arange(0, BLOCKS)
        codes = load_codes(codes_ptr, tl.minimum(block, n_blocks - 1), j, BITS)
        for i in tl.static_range(4):
            there = tl.where((block < n_blocks)[:, None], codes[i], CODES)
            counts += tl.histogram(there.reshape([BLOCKS * 64]), 2 * CODES)
    tl.atomic_add(counts_ptr + tl.arange(0, 2 * CODES), counts.to(tl.int64), sem="relaxed")


@triton.jit
def _int8_product(
    levels_ptr, per_unit_ptr, weight_ptr, scale_ptr, y_ptr, n_tokens, n, k,
    HAS_ROW_SCALES: tl.constexpr, IS_WHOLE: tl.constexpr, SIDE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(n_tokens, BM), tl.cdiv(n, BN)
    first = program // (SIDE * tiles_n) * SIDE
    side = tl.minimum(tiles_m - first, SIDE)
    token = (first + program % (SIDE * tiles_n) % side) * BM + tl.arange(0, BM)
    row = (program % (SIDE * tiles_n) // side) * BN + tl.arange(0, BN)
    j = tl.arange(0, BK)
    # Beyond the last token and row others are read, whose products are not stored.
    a_ptr = levels_ptr + (token % n_tokens).to(tl.int64)[:, None] * k + j[None, :]
    b_ptr = weight_ptr + (row % n).to(tl.int64)[None, :] * k + j[:, None]
    sums = tl.zeros((BM, BN), tl.int32)
    for start in range(0, k, BK):
        if IS_WHOLE:
            a = tl.load(a_ptr)
            b = tl.load(b_ptr)
        else:
            a = tl.load(a_ptr, mask=start + j[None, :] < k, other=0)
            b = tl.load(b_ptr, mask=start + j[:, None] < k, other=0)
        sums = tl.dot(a, b, sums, out_dtype=tl.int32)
        a_ptr += BK
        b_ptr += BK
    per_unit = tl.load(per_unit_ptr + token, mask=token < n_tokens, other=1.0)[:, None]
    if HAS_ROW_SCALES:
        scale = tl.load(scale_ptr + row, mask=row < n, other=1.0)[None, :]
    else:
        scale = tl.load(scale_ptr)
    y = (sums.to(tl.float32) * scale) * tl.div_rn(1.0, per_unit)
    at = token.to(tl.int64)[:, None] * n + row[None, :]
    store(y_ptr + at, y, (token < n_tokens)[:, None] & (row < n)[None, :])


@triton.jit
def _turn(x_ptr, out_ptr, n, k, SIZE: tl.constexpr):
    row = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    column = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    x_ptr += row.to(tl.int64)[:, None] * k + column[None, :]
    x = tl.load(x_ptr, mask=(row < n)[:, None] & (column < k)[None, :])
    out_ptr += column.to(tl.int64)[:, None] * n + row[None, :]
    tl.store(out_ptr, tl.trans(x), mask=(column < k)[:, None] & (row < n)[None, :])


def unpack(codes: Tensor, *, grid: Grid) -> Tensor:  # [256 B] int8
    n_blocks = codes.numel() // grid.bytes_per_block
    out = codes.new_empty(n_blocks * BLOCK, dtype=torch.int8)
    if n_blocks:
        with on(codes.device):
            _unpack[(triton.cdiv(n_blocks, UNPACK_BLOCKS),)](
                codes, out, n_blocks, LOW=grid.low, BITS=grid.bits, BLOCKS=UNPACK_BLOCKS, num_warps=4,
            )  # fmt: skip
    return out


def code_counts(codes: Tensor, *, grid: Grid) -> Tensor:  # [grid.n_levels] int64
    n_blocks = codes.numel() // grid.bytes_per_block
    # As many again for what stands beside the last block.
    counts = codes.new_zeros(2 * 2**grid.bits, dtype=torch.int64)
    if n_blocks:
        programs = min(triton.cdiv(n_blocks, COUNT_BLOCKS), PROGRAMS)
        with on(codes.device):
            _count[(programs,)](codes, counts, n_blocks, BITS=grid.bits, BLOCKS=COUNT_BLOCKS, num_warps=4)
    return counts[: grid.n_levels]


def int8_product(
    levels: Tensor,  # [T, K] int8
    per_unit: Tensor,  # [T] float32
    weight: Tensor,  # [N, K] int8, by rows or by columns
    scale: Tensor,  # [1] | [N] float32
    dtype: torch.dtype,
) -> Tensor:  # [T, N], of `dtype`
    (n_tokens, k), n = levels.shape, len(weight)
    y = levels.new_empty(n_tokens, n, dtype=dtype)
    if y.numel():
        with on(levels.device):
            if not weight.is_contiguous():  # tensor cores want both factors of 8 bits along the sums
                weight = _turned(weight.t())
            _int8_product[(triton.cdiv(n_tokens, TILE["BM"]) * triton.cdiv(n, TILE["BN"]),)](
                levels, per_unit, weight, scale, y, n_tokens, n, k,
                HAS_ROW_SCALES=len(scale) > 1, IS_WHOLE=k % TILE["BK"] == 0, SIDE=SIDE_BY_SIDE, **TILE,
                num_warps=8, num_stages=3, enable_fp_fusion=False,
            )  # fmt: skip
    return y


def _turned(x: Tensor) -> Tensor:  # [N, K] int8 -> [K, N], contiguous
    out = x.new_empty(x.shape[::-1])
    _turn[tuple(triton.cdiv(n, TURNED) for n in x.shape)](x, out, *x.shape, SIZE=TURNED, num_warps=8)
    return out
