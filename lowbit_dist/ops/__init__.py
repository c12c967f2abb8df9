"""The ops on low-bit weights that the package calls: contract checks, then dispatch by device.

`reference.py` says what each op means. CPU tensors go to the compiled C of `cpu.py` (to the reference where
no compiler is found), CUDA tensors to the Triton of `kernels.py`, others to the reference: the same bytes
from all.
"""

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack

from lowbit_dist.grid import BLOCK, Grid
from lowbit_dist.ops import cpu, reference
from lowbit_dist.ops.checks import (
    FLOATS,
    LONGEST_ROW,
    check_codes,
    check_one_device,
    check_row,
    check_scale,
    check_state,
    check_target,
    check_tensor,
    check_tokens,
    check_whole_blocks,
    tensors_of,
)
from lowbit_dist.ops.named import named as named
from lowbit_dist.ops.states import STATES, Slot, Stored
from lowbit_dist.ops.targets import Accumulator, Codes, Now, Residual, Rule, Weights
from lowbit_dist.ops.tokens import LEAST_MAXIMUM, LEAST_OF_GRADIENT

__all__ = [
    "LEAST_OF_GRADIENT",
    "LONGEST_ROW",
    "STATES",
    "Accumulator",
    "Codes",
    "Now",
    "Residual",
    "Rule",
    "Slot",
    "Stored",
    "Weights",
    "apply_",
    "code_counts",
    "decode",
    "encode",
    "int8_product",
    "largest",
    "matmul",
    "multiplies",
    "pack",
    "round_tokens",
    "rounded_tokens",
    "square_sum",
    "step_",
    "token_values",
    "transposed",
    "unpack",
    "whole_step_",
]


def step_(
    target: Codes | Weights,  # of N elements, changed in place
    grad: Tensor,  # [N] float32 | bfloat16
    state: list[Stored],  # one for each slot of the rule, of N elements, changed in place
    *,
    rule: Rule,
    now: Now,
) -> Tensor:  # [1] int64, on the device
    """One step of an optimizer: state and target move; the number of codes that changed, 0 for weights.

    The rule's scope is "element": it sees the elements in chunks, as a shard has them.
    """
    if rule.scope != "element":
        raise ValueError(
            f"{type(rule).__name__} sees a whole {rule.scope} at once; compute its direction from that, and "
            "pass it to ops.apply_"
        )
    check_target(target, grad.numel(), "grad")
    check_tensor("grad", grad, FLOATS)
    check_state(state, rule, grad.numel())
    check_one_device(*tensors_of(target), grad, *(tensor for slot in state for tensor in slot.tensors))
    backend = _updating(target, grad.device)
    if rule.fused is not None:
        return backend.step_(target, grad, state, rule=rule, now=now)
    flips = torch.zeros(1, dtype=torch.int64, device=grad.device)
    for start, stop in reference.chunks(grad.numel(), grad.device):
        u = reference.direction(grad, state, start, stop, rule=rule, now=now)
        flips += backend.apply_(target.part(start, stop), u.contiguous(), now=now)
    return flips


def whole_step_(
    target: Codes | Weights,  # of N elements, changed in place
    grad: Tensor,  # of the parameter's shape, N elements
    state: list[Stored],  # one for each slot of the rule, of N elements, changed in place
    *,
    rule: Rule,
    now: Now,
) -> Tensor:  # [1] int64, on the device
    """`step_` for a rule of any other scope: it sees the parameter whole, in its shape."""
    slots = (slot.load(0, grad.numel()).view(grad.shape) for slot in state)
    u, *moved = rule.update(grad.float() * now.grad_scale, *slots, step=now.update)
    for slot, x in zip(state, moved, strict=True):
        slot.store(0, grad.numel(), x.reshape(-1))
    return apply_(target, u.reshape(-1).contiguous(), now=now)


def apply_(
    target: Codes | Weights,  # of N elements, changed in place
    u: Tensor,  # [N] float32
    *,
    now: Now,
) -> Tensor:  # [1] int64, on the device
    """The second half of a step alone: `target` moves by -lr * u and decays; how many codes changed.

    For a rule whose direction is of a row or a matrix. It keeps no state; `now.grad_scale` is not used.
    """
    check_target(target, u.numel(), "u")
    check_tensor("u", u, (torch.float32,))
    check_one_device(*tensors_of(target), u)
    return _updating(target, u.device).apply_(target, u, now=now)


def decode(
    codes: Tensor,  # [B * grid.bytes_per_block] uint8
    scale: Tensor,  # [scales of the whole tensor] float32
    *,
    grid: Grid,
    first_block: int,
    scale_every: int,
    out: Tensor,  # [256 B] float32 | bfloat16, written
) -> Tensor:  # out
    """The weights `scale * level` of the blocks from `first_block` on, in `out`'s precision.

    `scale` is the whole tensor's: its element e has scale[e // scale_every].
    """
    check_codes(codes, grid, out.numel())
    check_scale(scale, out.numel(), first_block, scale_every)
    check_tensor("out", out, FLOATS)
    check_one_device(codes, scale, out)
    return _backend(codes.device).decode(
        codes, scale, grid=grid, first_block=first_block, scale_every=scale_every, out=out
    )


def encode(
    weight: Tensor,  # [256 B] float32
    scale: Tensor,  # [scales of the whole tensor] float32
    *,
    grid: Grid,
    scale_every: int,
    first_block: int = 0,
) -> Tensor:  # [B * grid.bytes_per_block] uint8
    """The codes of the level nearest to each weight (ties to the even level), within the grid."""
    check_tensor("weight", weight, (torch.float32,))
    check_whole_blocks(weight.numel())
    check_scale(scale, weight.numel(), first_block, scale_every)
    check_one_device(weight, scale)
    return _host_backend(weight.device).encode(
        weight, scale, grid=grid, scale_every=scale_every, first_block=first_block
    )


def matmul(
    x: Tensor,  # [T, K] float32 | bfloat16
    codes: Tensor,  # [n K / 256 * grid.bytes_per_block] uint8
    scale: Tensor,  # [n K / scale_every] float32
    *,
    grid: Grid,
    scale_every: int,
    n: int,
) -> Tensor:  # [T, n], in x's precision
    """`x . W^T` of a packed weight W [n, K], x rounded to 8 bits for each token, in sums of integers.

    No weight becomes a number of its own.  A scale serves the whole tensor, a row or a whole part of one.
    """
    k = x.shape[1]
    check_tensor("x", x, FLOATS)
    check_codes(codes, grid, n * k)
    check_scale(scale, n * k, 0, scale_every if len(scale) > 1 else BLOCK * n * k)
    check_one_device(x, codes, scale)
    if len(scale) > 1 and k % scale_every:
        raise ValueError(f"a scale serves {scale_every} elements, which do not divide a row of {k}")
    check_row(k)
    return _host_backend(x.device).matmul(x, codes, scale, grid=grid, scale_every=scale_every, n=n)


def multiplies(device: torch.device) -> bool:
    """Whether `matmul` has compiled code there: it is for inference, and plain torch has no use for it."""
    return _host_backend(device) is cpu


def multiplies_int8() -> bool:
    """Whether `int8_product` has compiled code on the CPU; plain torch multiplies numbers of 64 bits."""
    return multiplies(torch.device("cpu")) and cpu.sums_are_exact()


def round_tokens(x: Tensor, bits: int = 8, least: float = LEAST_MAXIMUM) -> tuple[Tensor, Tensor]:
    """Each token (row) of x [T, K], of any float, in integers of 2 to 8 bits, [T, K] int8, and how many of
    them a 1 is, [T] float32: NaN of a token that is not finite.  Its maximum counts as `least` at least.
    """
    check_tokens("x", x, (x.dtype,))
    if _is_plain(x):
        return _float_backend(x.device, x.dtype).round_tokens(x, bits, least)  # type: ignore[no-any-return]
    return _round_tokens(x, bits, least)


def rounded_tokens(x: Tensor, bits: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """`round_tokens`, and `token_values` of its results in x's precision, in one pass."""
    check_tokens("x", x, (x.dtype,))
    if _is_plain(x):
        return _float_backend(x.device, x.dtype).rounded_tokens(x, bits)  # type: ignore[no-any-return]
    return _rounded_tokens(x, bits)


def token_values(
    levels: Tensor,  # [T, K] int8
    per_unit: Tensor,  # [T] float32
    dtype: torch.dtype,
) -> Tensor:  # [T, K], of `dtype`
    """The numbers that rounded tokens stand for."""
    check_tokens("levels", levels, (torch.int8,))
    check_tensor("per_unit", per_unit, (torch.float32,))
    if _is_plain(levels):
        return _float_backend(levels.device, dtype).token_values(levels, per_unit, dtype)  # type: ignore[no-any-return]
    return _token_values(levels, per_unit, dtype)


def int8_product(
    levels: Tensor,  # [T, K] int8, of tokens
    per_unit: Tensor,  # [T] float32
    weight: Tensor,  # [N, K] int8, levels; by rows, or the transposed view of a matrix by rows
    scale: Tensor,  # [1] float32, or [N] of each row
    dtype: torch.dtype,
) -> Tensor:  # [T, N], of `dtype`
    """Rounded tokens times a weight, in exact sums of integers: the same bits in any order, on any number of
    threads, however tokens are divided among calls.
    """
    by_rows = weight if weight.is_contiguous() else weight.t()
    for name, tensor in (("levels", levels), ("weight", by_rows)):
        check_tensor(name, tensor, (torch.int8,))
    for name, tensor in (("per_unit", per_unit), ("scale", scale)):
        check_tensor(name, tensor, (torch.float32,))
    check_one_device(levels, per_unit, weight, scale)
    n, k = weight.shape
    if levels.shape != (len(per_unit), k) or len(scale) not in (1, n):
        raise ValueError(
            f"levels {list(levels.shape)}, {len(per_unit):,} units and {len(scale):,} scales do not fit a "
            f"weight {list(weight.shape)}"
        )
    check_row(k)
    if _is_plain(levels):
        backend = _float_backend(levels.device, dtype)
        return backend.int8_product(levels, per_unit, weight, scale, dtype)  # type: ignore[no-any-return]
    return _int8_product(levels, per_unit, weight, scale, dtype)


# Ops of the forward pass, which PyTorch knows by name: so they work on tensors without values, too.  To be
# called by name costs as much again as a launch, so tensors that nothing watches go straight to the backend.
def _is_plain(x: Tensor) -> bool:
    return type(x) is Tensor and not torch.compiler.is_compiling() and not _len_torch_dispatch_stack()


@named(
    "round_tokens(Tensor x, int bits, float least) -> (Tensor, Tensor)",
    lambda x, bits, least: (x.new_empty(x.shape, dtype=torch.int8), x.new_empty(len(x), dtype=torch.float32)),
)
def _round_tokens(x: Tensor, bits: int, least: float) -> tuple[Tensor, Tensor]:
    return _float_backend(x.device, x.dtype).round_tokens(x, bits, least)  # type: ignore[no-any-return]


@named(
    "rounded_tokens(Tensor x, int bits) -> (Tensor, Tensor, Tensor)",
    lambda x, bits: (
        x.new_empty(x.shape, dtype=torch.int8),
        x.new_empty(len(x), dtype=torch.float32),
        torch.empty_like(x),
    ),
)
def _rounded_tokens(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    return _float_backend(x.device, x.dtype).rounded_tokens(x, bits)  # type: ignore[no-any-return]


@named(
    "token_values(Tensor levels, Tensor per_unit, ScalarType dtype) -> Tensor",
    lambda levels, per_unit, dtype: levels.new_empty(levels.shape, dtype=dtype),
)
def _token_values(levels: Tensor, per_unit: Tensor, dtype: torch.dtype) -> Tensor:
    return _float_backend(levels.device, dtype).token_values(levels, per_unit, dtype)  # type: ignore[no-any-return]


@named(
    "int8_product(Tensor levels, Tensor per_unit, Tensor weight, Tensor scale, ScalarType dtype) -> Tensor",
    lambda levels, per_unit, weight, scale, dtype: levels.new_empty(len(levels), len(weight), dtype=dtype),
)
def _int8_product(
    levels: Tensor, per_unit: Tensor, weight: Tensor, scale: Tensor, dtype: torch.dtype
) -> Tensor:
    backend = _float_backend(levels.device, dtype)
    return backend.int8_product(levels, per_unit, weight, scale, dtype)  # type: ignore[no-any-return]


def transposed(x: Tensor) -> Tensor:
    """x [T, N] of 16-bit elements by columns: [N, T], contiguous.

    Products of bfloat16 on a CPU take twice as long if their first operand is a transposed view.
    """
    check_tensor("x", x, (torch.bfloat16, torch.float16))
    return _transposed(x)


@named("transposed(Tensor x) -> Tensor", lambda x: x.new_empty(x.shape[::-1]))
def _transposed(x: Tensor) -> Tensor:
    return _host_backend(x.device).transposed(x)  # type: ignore[no-any-return]


def largest(tensors: Sequence[Tensor]) -> Tensor:  # [1] float64, on their device
    """The largest magnitude of all elements of some tensors; infinity if one of them is not finite."""
    return _summing(tensors).largest([x.contiguous() for x in tensors])


def square_sum(
    tensors: Sequence[Tensor],
    most: Tensor,  # [1] float64: `largest`, of these and of others
    unit: float,
) -> Tensor:  # [1] int64
    """The sum of round((x / most)^2 unit) over all elements: integers, so the same in any order."""
    return _summing(tensors).square_sum([x.contiguous() for x in tensors], most, unit)


def pack(levels: Tensor, *, grid: Grid) -> Tensor:
    """The codes ([B * grid.bytes_per_block] uint8) of `levels` ([256 B] int8)."""
    check_tensor("levels", levels, (torch.int8,))
    check_whole_blocks(levels.numel())
    return _host_backend(levels.device).pack(levels, grid=grid)


def unpack(codes: Tensor, *, grid: Grid) -> Tensor:
    """The levels ([256 B] int8) of `codes` ([B * grid.bytes_per_block] uint8)."""
    check_codes(codes, grid, codes.numel() * 8 // grid.bits)
    return _backend(codes.device).unpack(codes, grid=grid)


def code_counts(codes: Tensor, *, grid: Grid) -> Tensor:
    """How many elements are at each level, from `grid.low` to `grid.high`: [grid.n_levels] int64."""
    check_codes(codes, grid, codes.numel() * 8 // grid.bits)
    return _backend(codes.device).code_counts(codes, grid=grid)


def _backend(device: torch.device) -> ModuleType:
    if device.type == "cuda":
        from lowbit_dist.ops import kernels  # needs Triton, which not every machine has

        return kernels
    return _host_backend(device)


def _float_backend(device: torch.device, *dtypes: torch.dtype) -> ModuleType:
    """Compiled code is for the types of training; others take plain torch."""
    return _backend(device) if set(dtypes) <= set(FLOATS) else reference


def _summing(tensors: Sequence[Tensor]) -> ModuleType:
    check_one_device(*tensors)
    return _float_backend(tensors[0].device, *(x.dtype for x in tensors))


def _updating(target: Codes | Weights, device: torch.device) -> ModuleType:
    """Codes that get another scale, which few steps of a run do, are updated in plain torch."""
    rescales = isinstance(target, Codes) and target.next_scale is not None
    return reference if rescales else _backend(device)


def _host_backend(device: torch.device) -> ModuleType:
    """For ops without a Triton kernel: on a GPU they are rare enough for plain torch, and exact there too."""
    return cpu if device.type == "cpu" and cpu.available() else reference
