"""The ops of reference.py on CPU tensors: the C that `native` compiles, called through ctypes."""

import ctypes
import math
import struct
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from lowbit_dist.grid import BLOCK, Grid
from lowbit_dist.ops import tokens as reference
from lowbit_dist.ops.fused import NO_FACTORS, RULES, Factors, accumulation, factors
from lowbit_dist.ops.native import available as available
from lowbit_dist.ops.native import loaded
from lowbit_dist.ops.states import STATES, Stored
from lowbit_dist.ops.targets import Codes, Now, Residual, Rule, Weights
from lowbit_dist.ops.tokens import LEAST_MAXIMUM

_INFINITY = 0x7F800000  # the bits of a float32
# A rounded token is as long as a multiple of this, in matmul.c.
_STRIDE = 64
_TOKENS = 512  # whose sums are made numbers at a time; the weight is laid out anew for each


class _Step(ctypes.Structure):
    _fields_ = [
        *(
            (name, ctypes.c_float)
            for name in ("beta1", "rest1", "beta2", "rest2", "correction1", "correction2")
        ),
        *((name, ctypes.c_float) for name in ("eps", "lr", "decay", "keep", "grad_scale")),
        *((name, ctypes.c_float) for name in ("nearest_from", "nearest_slope")),
        *((name, ctypes.c_uint32) for name in ("step", "tensor", "key0", "key1")),
    ]


class _Shard(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("low", "high", "bits", "n_threads")),
        *((name, ctypes.c_int64) for name in ("n_blocks", "first_block", "scale_every", "n_scales")),
    ]


class _State(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("m", "v", "m_scale", "v_scale", "grad")),
        *((name, ctypes.c_int32) for name in ("states", "grad_is_bf16")),
    ]


class _Residual(ctypes.Structure):
    _fields_ = [
        ("values", ctypes.c_void_p),
        *((name, ctypes.c_float) for name in ("kept", "per_level", "reach", "threshold")),
        *((name, ctypes.c_int32) for name in ("resets", "is_bf16")),
    ]


class _Product(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "y", "codes", "scale", "rounded", "per_unit", "sums")),
        *(
            (name, ctypes.c_int64)
            for name in ("tokens", "in_features", "out_features", "stride", "group", "groups", "row_scales")
        ),
        *((name, ctypes.c_int32) for name in ("is_bf16", "low", "bits", "n_threads")),
    ]


def step_(target: Codes | Weights, grad: Tensor, state: list[Stored], *, rule: Rule, now: Now) -> Tensor:
    """`rule.fused` names one of fused.py."""
    return _step(target, _state(state, grad), factors(rule, now), RULES.index(rule.fused), now)


def apply_(target: Codes | Weights, u: Tensor, *, now: Now) -> Tensor:
    return _step(target, _state([], u), NO_FACTORS, RULES.index(None), now)


def _step(target: Codes | Weights, state: object, numbers: Factors, rule: int, now: Now) -> Tensor:
    flips = 0
    code = ctypes.c_int32(rule)
    if isinstance(target, Weights):
        loaded().lowbit_step_weights(
            _pointer(target.weight),
            state,
            ctypes.c_int64(target.numel),
            ctypes.c_int32(torch.get_num_threads()),
            _numbers(numbers, now, tensor=0),
            code,
        )
    else:
        flips = loaded().lowbit_step_codes(
            _pointer(target.codes),
            _pointer(target.scale),
            state,
            _residual(target.residual, now),
            _shard(target.grid, target.numel, target.first_block, target.scale_every, target.scale),
            _numbers(numbers, now, tensor=target.tensor),
            code,
        )
    return torch.tensor([flips], dtype=torch.int64)


def _residual(residual: Residual | None, now: Now) -> object:
    if residual is None:
        return None
    kept = residual.kept
    numbers = accumulation(residual, now)._asdict()
    values = _pointer(residual.values)
    return ctypes.byref(
        _Residual(values=values, **numbers, resets=kept.resets, is_bf16=kept.states == "bf16")
    )


def decode(
    codes: Tensor, scale: Tensor, *, grid: Grid, first_block: int, scale_every: int, out: Tensor
) -> Tensor:
    shard = _shard(grid, out.numel(), first_block, scale_every, scale)
    is_bf16 = ctypes.c_int32(out.dtype == torch.bfloat16)
    loaded().lowbit_decode(_pointer(codes), _pointer(scale), _pointer(out), is_bf16, shard)
    return out


def matmul(x: Tensor, codes: Tensor, scale: Tensor, *, grid: Grid, scale_every: int, n: int) -> Tensor:
    tokens, k = x.shape
    stride = -(-k // _STRIDE) * _STRIDE
    groups = max(1, k // scale_every)
    y = torch.empty(tokens, n, dtype=x.dtype)
    rounded = torch.empty(tokens * stride, dtype=torch.int8)
    per_token = torch.empty(tokens * (1 + groups), dtype=torch.int32)
    failed = loaded().lowbit_matmul(
        ctypes.byref(
            _Product(
                x=x.data_ptr(),
                y=y.data_ptr(),
                codes=codes.data_ptr(),
                scale=scale.data_ptr(),
                rounded=rounded.data_ptr(),
                per_unit=per_token.data_ptr(),
                sums=per_token.data_ptr() + 4 * tokens,
                tokens=tokens,
                in_features=k,
                out_features=n,
                stride=stride,
                group=scale_every if groups > 1 else stride,
                groups=groups,
                row_scales=0 if scale.numel() == 1 else groups,
                is_bf16=x.dtype == torch.bfloat16,
                low=grid.low,
                bits=grid.bits,
                n_threads=torch.get_num_threads(),
            )
        )
    )
    if failed:
        raise MemoryError(f"there is no memory for a few rows of a weight [{n}, {k}]")
    return y


def encode(weight: Tensor, scale: Tensor, *, grid: Grid, scale_every: int, first_block: int) -> Tensor:
    codes = torch.empty(weight.numel() * grid.bits // 8, dtype=torch.uint8)
    shard = _shard(grid, weight.numel(), first_block, scale_every, scale)
    loaded().lowbit_encode(_pointer(weight), _pointer(scale), _pointer(codes), shard)
    return codes


def pack(levels: Tensor, *, grid: Grid) -> Tensor:
    codes = torch.empty(levels.numel() * grid.bits // 8, dtype=torch.uint8)
    loaded().lowbit_pack(_pointer(levels), _pointer(codes), _shard(grid, levels.numel()))
    return codes


def unpack(codes: Tensor, *, grid: Grid) -> Tensor:
    levels = torch.empty(codes.numel() * 8 // grid.bits, dtype=torch.int8)
    loaded().lowbit_unpack(_pointer(codes), _pointer(levels), _shard(grid, levels.numel()))
    return levels


def code_counts(codes: Tensor, *, grid: Grid) -> Tensor:
    # A code has at most 2^bits values, of which a ternary grid leaves one unused.
    counts = torch.zeros(2**grid.bits, dtype=torch.int64)
    loaded().lowbit_code_counts(
        _pointer(codes), _pointer(counts), _shard(grid, codes.numel() * 8 // grid.bits)
    )
    return counts[: grid.n_levels]


def round_tokens(x: Tensor, bits: int = 8, least: float = LEAST_MAXIMUM) -> tuple[Tensor, Tensor]:
    return _rounded(x, bits, least, None)


def rounded_tokens(x: Tensor, bits: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    values = torch.empty_like(x)
    return *_rounded(x, bits, LEAST_MAXIMUM, values), values


def _rounded(x: Tensor, bits: int, least: float, values: Tensor | None) -> tuple[Tensor, Tensor]:
    levels, per_unit = torch.empty(x.shape, dtype=torch.int8), torch.empty(len(x))
    loaded().lowbit_round_tokens(
        _pointer(x), _is_bf16(x.dtype), _pointer(levels), _pointer(per_unit), _pointer(values),
        *map(ctypes.c_int64, x.shape), ctypes.c_int32(2 ** (bits - 1) - 1), ctypes.c_float(least), _threads(),
    )  # fmt: skip
    return levels, per_unit


def token_values(levels: Tensor, per_unit: Tensor, dtype: torch.dtype) -> Tensor:
    values = torch.empty(levels.shape, dtype=dtype)
    loaded().lowbit_token_values(
        _pointer(levels), _pointer(per_unit), _pointer(values), _is_bf16(dtype),
        *map(ctypes.c_int64, levels.shape), _threads(),
    )  # fmt: skip
    return values


def transposed(x: Tensor) -> Tensor:
    out = torch.empty(x.shape[::-1], dtype=x.dtype)
    loaded().lowbit_transpose(_pointer(x), _pointer(out), *map(ctypes.c_int64, x.shape), _threads())
    return out


def int8_product(
    levels: Tensor,  # [T, K] int8
    per_unit: Tensor,  # [T] float32
    weight: Tensor,  # [N, K] int8, by rows or by columns
    scale: Tensor,  # [1] | [N] float32
    dtype: torch.dtype,
) -> Tensor:  # [T, N], of `dtype`
    """Some tokens at a time, whose sums a core's cache holds."""
    if not sums_are_exact():
        return reference.int8_product(levels, per_unit, weight, scale, dtype)
    y = torch.empty(len(levels), len(weight), dtype=dtype)
    parts = (x.split(_TOKENS) for x in (levels, per_unit, y))
    for of_part, units, out in zip(*parts, strict=True):
        sums = torch._int_mm(of_part, weight.t())
        loaded().lowbit_scaled_sums(
            *map(_pointer, (sums, scale, units, out)),
            ctypes.c_int32(len(scale) > 1),
            _is_bf16(dtype),
            *map(ctypes.c_int64, sums.shape),
            _threads(),
        )
    return y


@cache
def sums_are_exact() -> bool:
    """Whether PyTorch's are: on processors without instructions for 8-bit products two of them are added up
    in 16 bits, where not all fit.
    """
    ends = torch.tensor([-128, 127], dtype=torch.int8).repeat_interleave(16)[:, None].expand(32, 256)
    sums = torch._int_mm(ends.contiguous(), ends.contiguous().t())
    return torch.equal(sums.double(), ends.double() @ ends.double().t())


def largest(tensors: Sequence[Tensor]) -> Tensor:
    function, threads = loaded().lowbit_largest, _threads()
    bits = max(function(*_elements(x), threads) for x in tensors)
    (magnitude,) = struct.unpack("<f", bits.to_bytes(4, "little"))
    return torch.full((1,), magnitude if bits < _INFINITY else torch.inf, dtype=torch.float64)


def square_sum(tensors: Sequence[Tensor], most: Tensor, unit: float) -> Tensor:
    if not math.isfinite(longest := most.item()):
        return torch.zeros(1, dtype=torch.int64)  # C has no integer for a NaN
    function, numbers = loaded().lowbit_square_sum, (ctypes.c_double(longest), ctypes.c_double(unit))
    total = sum(function(*_elements(x), *numbers, _threads()) for x in tensors)
    return torch.full((1,), total, dtype=torch.int64)


def _elements(x: Tensor) -> tuple[object, ...]:
    return _pointer(x), _is_bf16(x.dtype), ctypes.c_int64(x.numel())


def _is_bf16(dtype: torch.dtype) -> ctypes.c_int32:
    return ctypes.c_int32(dtype == torch.bfloat16)


def _threads() -> ctypes.c_int32:
    return ctypes.c_int32(torch.get_num_threads())


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _numbers(numbers: Factors, now: Now, *, tensor: int) -> object:
    return ctypes.byref(
        _Step(
            **numbers._asdict(),
            lr=now.lr,
            decay=now.decay,
            keep=1 - now.decay,
            nearest_from=now.nearest / 2,
            nearest_slope=now.slope,
            step=now.step,
            tensor=tensor,
            key0=now.seed & 0xFFFFFFFF,
            key1=now.seed >> 32,
        )
    )


def _shard(
    grid: Grid, n: int, first_block: int = 0, scale_every: int = BLOCK, scale: Tensor | None = None
) -> object:
    return ctypes.byref(
        _Shard(
            low=grid.low,
            high=grid.high,
            bits=grid.bits,
            n_threads=torch.get_num_threads(),
            n_blocks=n // BLOCK,
            first_block=first_block,
            scale_every=scale_every,
            n_scales=0 if scale is None else scale.numel(),
        )
    )


def _state(state: list[Stored], grad: Tensor) -> object:
    values = [_pointer(slot.values) for slot in state] + [_pointer(None)] * 2
    scales = [_pointer(slot.scale) for slot in state] + [_pointer(None)] * 2
    return ctypes.byref(
        _State(
            m=values[0],
            v=values[1],
            m_scale=scales[0],
            v_scale=scales[1],
            grad=_pointer(grad),
            states=STATES.index(state[0].states) if state else 0,
            grad_is_bf16=grad.dtype == torch.bfloat16,
        )
    )
