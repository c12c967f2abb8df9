"""Tokens in integers, and the exact sums behind a gradient's norm, in Triton: the reference's bytes.

kernels.py says what equal bytes rest on, and where they were shown. A token is read twice, the second time
from a cache. Quotients are correctly rounded; to the nearest whole number goes what a float is added to that
has no fractions, and taken away from.

Letters: T tokens, K elements of each, N elements.
"""

# Triton gives the parameters of kernels their types when it compiles them.
# mypy: disable-error-code="no-untyped-def"

from collections.abc import Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit_dist.ops.device_functions import PROGRAMS, load, on, quotient, store
from lowbit_dist.ops.tokens import LEAST_MAXIMUM

LONGEST_PART = 4096  # elements of a token that a program holds at once
SUM_BLOCK = 2048
_INFINITY = tl.constexpr(0x7F800000)  # the bits of a float32
_WHOLE = tl.constexpr(12582912.0)  # 1.5 * 2^23: of a float32 beside it, the last bit is a 1
_WHOLE_FROM = tl.constexpr(4503599627370496.0)  # 2^52: a float64 from here on is whole


@triton.jit
def magnitude_bits(x):
    """Those of |x|, float32: in the order of the magnitudes, and a NaN above infinity."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _round_tokens(
    x_ptr, levels_ptr, per_unit_ptr, values_ptr, n, top, least,
    WITH_VALUES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, BLOCK)
    bits = tl.zeros([BLOCK], tl.int32)
    for start in range(0, n, BLOCK):
        x = load(x_ptr + token * n + start + j, start + j < n)
        bits = tl.maximum(bits, magnitude_bits(x))
    largest_bits = tl.max(bits, axis=0)
    is_finite = largest_bits < _INFINITY
    largest = tl.where(is_finite, largest_bits, 0).to(tl.float32, bitcast=True)
    per_unit = tl.div_rn(1.0, tl.maximum(largest, least)) * top
    told = tl.where(is_finite, per_unit, float("nan"))
    tl.store(per_unit_ptr + token, told)
    inverse = tl.div_rn(1.0, told)
    for start in range(0, n, BLOCK):
        mask = start + j < n
        x = load(x_ptr + token * n + start + j, mask)
        level = (x * per_unit + _WHOLE) - _WHOLE
        level = tl.where(is_finite, level, 0.0)
        tl.store(levels_ptr + token * n + start + j, level.to(tl.int32).to(tl.int8), mask=mask)
        if WITH_VALUES:
            store(values_ptr + token * n + start + j, quotient(level, told, inverse), mask)


@triton.jit
def _token_values(levels_ptr, per_unit_ptr, out_ptr, n, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = j < n
    byte = tl.load(levels_ptr + token * n + j, mask=mask, other=0).to(tl.uint8, bitcast=True).to(tl.int32)
    # The number of 2^23 + 128 and a level has the level, its sign turned round, as its lowest byte.
    level = ((byte ^ 0x80) | 0x4B000000).to(tl.float32, bitcast=True) - 8388736.0
    per_unit = tl.load(per_unit_ptr + token)
    store(out_ptr + token * n + j, quotient(level, per_unit, tl.div_rn(1.0, per_unit)), mask)


# Tensors of one type come in one launch: each program walks over all of them, and takes every G-th piece, G
# being how many programs there are.  `table` has three rows of P numbers: where a tensor begins, how many
# elements it has, and how many pieces those before it, so that small ones go to programs by turns.
@triton.jit(do_not_specialize=["n_tensors", "n_programs"])
def _largest(
    table_ptr, bits_ptr, n_tensors, n_programs,
    IS_BF16: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    j = tl.arange(0, BLOCK)
    bits = tl.zeros([BLOCK], tl.int32)
    for i in range(n_tensors):
        x_ptr, n, first = _tensor(table_ptr + i, n_tensors, n_programs, IS_BF16, ALIGNED)
        full = n // BLOCK
        for piece in range(first, full, n_programs):
            bits = tl.maximum(bits, magnitude_bits(load(x_ptr + piece * BLOCK + j, None)))
        if first == full % n_programs:
            bits = tl.maximum(bits, magnitude_bits(load(x_ptr + full * BLOCK + j, full * BLOCK + j < n)))
    tl.atomic_max(bits_ptr, tl.max(bits, axis=0), sem="relaxed")


@triton.jit(do_not_specialize=["n_tensors", "n_programs"])
def _square_sum(
    table_ptr, most_ptr, total_ptr, n_tensors, n_programs, unit,
    IS_BF16: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    most = tl.load(most_ptr)
    j = tl.arange(0, BLOCK)
    total = tl.zeros([1], tl.int64)  # of 64 bits for each element there are no registers
    for i in range(n_tensors):
        x_ptr, n, first = _tensor(table_ptr + i, n_tensors, n_programs, IS_BF16, ALIGNED)
        full = n // BLOCK
        for piece in range(first, full, n_programs):
            total += tl.sum(_squares(load(x_ptr + piece * BLOCK + j, None), most, unit), axis=0)
        if first == full % n_programs:
            x = load(x_ptr + full * BLOCK + j, full * BLOCK + j < n)
            total += tl.sum(_squares(x, most, unit), axis=0)
    tl.atomic_add(total_ptr, tl.sum(total, axis=0), sem="relaxed")


@triton.jit
def _squares(x, most, unit):  # -> int64
    q = x.to(tl.float64) / most
    square = q * q * unit
    border = tl.full(square.shape, _WHOLE_FROM, tl.float64)
    return tl.where(square < border, (square + border) - border, square).to(tl.int64)


@triton.jit
def _tensor(row_ptr, n_tensors, n_programs, IS_BF16: tl.constexpr, ALIGNED: tl.constexpr):
    """A tensor's address, its elements, and the first of its pieces that is this program's."""
    x_ptr = tl.load(row_ptr).to(tl.pointer_type(tl.bfloat16 if IS_BF16 else tl.float32))
    if ALIGNED:
        x_ptr = tl.multiple_of(x_ptr, 16)
    before = tl.load(row_ptr + 2 * n_tensors)
    first = (tl.program_id(0) + n_programs - before % n_programs) % n_programs
    return x_ptr, tl.load(row_ptr + n_tensors), first


def round_tokens(
    x: Tensor,  # [T, K]
    bits: int = 8,
    least: float = LEAST_MAXIMUM,
) -> tuple[Tensor, Tensor]:  # [T, K] int8, [T] float32
    levels, per_unit, _ = _rounded(x, bits, least, None)
    return levels, per_unit


def rounded_tokens(x: Tensor, bits: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Those, and what they stand for, [T, K] of x's type, in one pass."""
    levels, per_unit, values = _rounded(x, bits, LEAST_MAXIMUM, torch.empty_like(x))
    assert values is not None
    return levels, per_unit, values


def _rounded(
    x: Tensor, bits: int, least: float, values: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    n_tokens, n = x.shape
    levels, per_unit = x.new_empty(x.shape, dtype=torch.int8), x.new_empty(n_tokens, dtype=torch.float32)
    if x.numel():
        with on(x.device):
            block = min(triton.next_power_of_2(n), LONGEST_PART)
            _round_tokens[(n_tokens,)](
                x, levels, per_unit, values, n, float(2 ** (bits - 1) - 1), least,
                WITH_VALUES=values is not None, BLOCK=block, num_warps=_warps(block), enable_fp_fusion=False,
            )  # fmt: skip
    return levels, per_unit, values


def token_values(levels: Tensor, per_unit: Tensor, dtype: torch.dtype) -> Tensor:  # [T, K] of `dtype`
    n_tokens, n = levels.shape
    out = levels.new_empty(levels.shape, dtype=dtype)
    if out.numel():
        with on(levels.device):
            block = min(triton.next_power_of_2(n), LONGEST_PART)
            _token_values[(n_tokens, triton.cdiv(n, block))](
                levels, per_unit, out, n,
                BLOCK=block, num_warps=_warps(block), enable_fp_fusion=False,
            )  # fmt: skip
    return out


def largest(tensors: Sequence[Tensor]) -> Tensor:  # [1] float64
    bits = tensors[0].new_zeros(1, dtype=torch.int32)
    with on(bits.device):
        for table, n_programs, kind in _tables(tensors):
            _largest[(n_programs,)](
                table, bits, table.shape[1], n_programs, **kind, BLOCK=SUM_BLOCK, num_warps=8
            )
    most = bits.view(torch.float32).double()
    return torch.where(torch.isfinite(most), most, torch.inf)


def square_sum(tensors: Sequence[Tensor], most: Tensor, unit: float) -> Tensor:  # [1] float64; [1] int64
    total = most.new_zeros(1, dtype=torch.int64)
    with on(most.device):
        for table, n_programs, kind in _tables(tensors):
            _square_sum[(n_programs,)](
                table, most, total, table.shape[1], n_programs, unit, **kind,
                BLOCK=SUM_BLOCK, num_warps=8, enable_fp_fusion=False,
            )  # fmt: skip
    return total


def _tables(tensors: Sequence[Tensor]) -> list[tuple[Tensor, int, dict[str, bool]]]:
    """For a launch over tensors of one type: [3, P] int64 on their device, how many programs, which type."""
    of_kind: dict[tuple[bool, bool], list[Tensor]] = {}
    for x in tensors:
        if x.numel():
            of_kind.setdefault((x.dtype == torch.bfloat16, x.data_ptr() % 16 == 0), []).append(x)
    tables = []
    for (is_bf16, aligned), several in of_kind.items():
        pieces = [triton.cdiv(x.numel(), SUM_BLOCK) for x in several]
        before = [0, *accumulate(pieces)]
        rows = [[x.data_ptr() for x in several], [x.numel() for x in several], before[:-1]]
        device = several[0].device
        # From pinned memory, else the host would wait for all that the device was given before.
        table = torch.tensor(rows, dtype=torch.int64, pin_memory=device.type == "cuda")
        kind = {"IS_BF16": is_bf16, "ALIGNED": aligned}
        tables.append((table.to(device, non_blocking=True), min(before[-1], PROGRAMS), kind))
    return tables


def _warps(block: int) -> int:
    """8 to 16 elements a thread: a vector of 16 bytes of each type."""
    return max(1, min(8, block // 512))
