"""The ops on packed low-bit weights that the package calls: contract checks, then dispatch by device.

`reference.py` says what each op means. CPU tensors go to the compiled C of `cpu.py` (to the reference where
no compiler is found), CUDA tensors to the Triton of `kernels.py`, others to the reference: the same bytes
from all.
"""

from types import ModuleType

import torch
from torch import Tensor

from lowbit_dist.grid import BLOCK, Grid
from lowbit_dist.ops import cpu, reference
from lowbit_dist.ops.reference import STATES, AdamWStep, Moments

__all__ = [
    "STATES",
    "AdamWStep",
    "Moments",
    "adamw_codes_",
    "adamw_weights_",
    "code_counts",
    "decode",
    "moments_to_float",
    "pack",
    "quantize",
    "unpack",
]

_FLOATS = (torch.float32, torch.bfloat16)
_MOMENT_DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "int8": (torch.int8, torch.uint8),
}


def adamw_codes_(
    codes: Tensor,  # [B * grid.bytes_per_block] uint8, changed in place
    scale: Tensor,  # [scales of the whole tensor] float32, positive
    grad: Tensor,  # [256 B] float32 | bfloat16
    moments: Moments,  # of 256 B elements, changed in place
    *,
    grid: Grid,
    now: AdamWStep,
    tensor: int,
    first_block: int,
    blocks_per_scale: int,
) -> Tensor:  # [1] int64, on the device
    """One AdamW step of packed weights, rounded stochastically to the grid; the number of codes that changed.

    `codes`, `grad` and `moments` are a shard's: the blocks from `first_block` on of tensor number `tensor`.
    `scale` is the whole tensor's: block b has scale[b // blocks_per_scale].
    """
    _check_codes(codes, grid, grad.numel())
    _check_scale(scale, grad.numel(), first_block, blocks_per_scale)
    _check_tensor("grad", grad, _FLOATS)
    _check_moments(moments, grad.numel())
    _check_one_device(codes, scale, grad, *moments.tensors)
    if not 0 <= tensor < 2**32:
        raise ValueError(f"tensor is {tensor}; it must be from 0 to 2**32 - 1")
    return _backend(codes.device).adamw_codes_(
        codes,
        scale,
        grad,
        moments,
        grid=grid,
        now=now,
        tensor=tensor,
        first_block=first_block,
        blocks_per_scale=blocks_per_scale,
    )


def adamw_weights_(
    weight: Tensor,  # [N] float32, changed in place
    grad: Tensor,  # [N] float32 | bfloat16
    moments: Moments,  # of N elements, changed in place
    *,
    now: AdamWStep,
) -> None:
    """One AdamW step of ordinary weights; N is arbitrary."""
    _check_tensor("weight", weight, (torch.float32,))
    _check_tensor("grad", grad, _FLOATS)
    if weight.numel() != grad.numel():
        raise ValueError(f"weight has {weight.numel()} elements and grad {grad.numel()}; they must be equal")
    _check_moments(moments, weight.numel())
    _check_one_device(weight, grad, *moments.tensors)
    _backend(weight.device).adamw_weights_(weight, grad, moments, now=now)


def decode(
    codes: Tensor,  # [B * grid.bytes_per_block] uint8
    scale: Tensor,  # [scales of the whole tensor] float32
    *,
    grid: Grid,
    first_block: int,
    blocks_per_scale: int,
    out: Tensor,  # [256 B] float32 | bfloat16, written
) -> Tensor:  # out
    """The weights `scale * level` of the blocks from `first_block` on, in `out`'s precision."""
    _check_codes(codes, grid, out.numel())
    _check_scale(scale, out.numel(), first_block, blocks_per_scale)
    _check_tensor("out", out, _FLOATS)
    _check_one_device(codes, scale, out)
    return _backend(codes.device).decode(
        codes, scale, grid=grid, first_block=first_block, blocks_per_scale=blocks_per_scale, out=out
    )


def pack(levels: Tensor, *, grid: Grid) -> Tensor:
    """The codes ([B * grid.bytes_per_block] uint8) of `levels` ([256 B] int8)."""
    _check_tensor("levels", levels, (torch.int8,))
    _check_whole_blocks(levels.numel())
    return _host_backend(levels.device).pack(levels, grid=grid)


def unpack(codes: Tensor, *, grid: Grid) -> Tensor:
    """The levels ([256 B] int8) of `codes` ([B * grid.bytes_per_block] uint8)."""
    _check_codes(codes, grid, codes.numel() * 8 // grid.bits)
    return _host_backend(codes.device).unpack(codes, grid=grid)


def quantize(
    weight: Tensor,  # [256 B] float32
    scale: Tensor,  # [scales of the whole tensor] float32
    *,
    grid: Grid,
    first_block: int,
    blocks_per_scale: int,
) -> Tensor:  # [256 B] int8
    """The level nearest to each weight (ties to the even level), within the grid."""
    _check_tensor("weight", weight, (torch.float32,))
    _check_whole_blocks(weight.numel())
    _check_scale(scale, weight.numel(), first_block, blocks_per_scale)
    _check_one_device(weight, scale)
    return reference.quantize(
        weight, scale, grid=grid, first_block=first_block, blocks_per_scale=blocks_per_scale
    )


def code_counts(codes: Tensor, *, grid: Grid) -> Tensor:
    """How many elements are at each level, from `grid.low` to `grid.high`: [grid.n_levels] int64."""
    _check_codes(codes, grid, codes.numel() * 8 // grid.bits)
    return _host_backend(codes.device).code_counts(codes, grid=grid)


def moments_to_float(moments: Moments) -> tuple[Tensor, Tensor]:
    """The values of m and v that the stored moments stand for: [N] float32 each."""
    _check_moments(moments, moments.m.numel())
    return reference.moments_to_float(moments)


def _backend(device: torch.device) -> ModuleType:
    if device.type == "cuda":
        from lowbit_dist.ops import kernels  # needs Triton, which not every machine has

        return kernels
    return _host_backend(device)


def _host_backend(device: torch.device) -> ModuleType:
    """For ops without a Triton kernel: on a GPU they are rare enough for plain torch, and exact there too."""
    return cpu if device.type == "cpu" and cpu.available() else reference


def _check_tensor(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} is {tensor.dtype}; it must be {' or '.join(map(str, dtypes))}")
    if not tensor.is_contiguous():
        raise ValueError(
            f"{name} has strides {tensor.stride()}; it must be contiguous: it is read as raw memory"
        )


def _check_whole_blocks(n: int) -> None:
    if n % BLOCK:
        raise ValueError(f"there are {n} elements; packed tensors have whole blocks of {BLOCK}: pad to them")


def _check_codes(codes: Tensor, grid: Grid, n: int) -> None:
    _check_tensor("codes", codes, (torch.uint8,))
    _check_whole_blocks(n)
    if codes.numel() != n // BLOCK * grid.bytes_per_block:
        raise ValueError(
            f"codes has {codes.numel()} bytes; {n} elements of grid {grid.name} take "
            f"{n // BLOCK * grid.bytes_per_block}"
        )


def _check_scale(scale: Tensor, n: int, first_block: int, blocks_per_scale: int) -> None:
    _check_tensor("scale", scale, (torch.float32,))
    if first_block < 0 or blocks_per_scale < 1:
        raise ValueError(
            f"first_block is {first_block} and blocks_per_scale {blocks_per_scale}; "
            "the first must be at least 0, the second at least 1"
        )
    last = first_block + n // BLOCK - 1
    if n and last // blocks_per_scale >= scale.numel():
        raise ValueError(
            f"block {last} needs scale number {last // blocks_per_scale}, but there are {scale.numel()}; "
            "pass the whole tensor's scales, and its number of blocks as blocks_per_scale if there is one"
        )


def _check_moments(moments: Moments, n: int) -> None:
    if (moments.m.dtype, moments.v.dtype) not in _MOMENT_DTYPES.values():
        raise ValueError(
            f"moments are {moments.m.dtype} and {moments.v.dtype}; they must be both float32, both bfloat16, "
            "or int8 and uint8"
        )
    is_8_bit = moments.m.dtype == torch.int8
    if (moments.m_scale is not None, moments.v_scale is not None) != (is_8_bit, is_8_bit):
        raise ValueError(
            f"moments of {moments.m.dtype} {'need' if is_8_bit else 'have no'} scales: use Moments.zeros"
        )
    n_blocks = -(-n // BLOCK)
    wanted = {"m": n, "v": n, "m_scale": n_blocks, "v_scale": n_blocks}
    for (name, count), tensor in zip(wanted.items(), moments.tensors, strict=False):
        _check_tensor(f"moments.{name}", tensor, (tensor.dtype if name in "mv" else torch.float32,))
        if tensor.numel() != count:
            raise ValueError(f"moments.{name} has {tensor.numel()} elements; {n} weights take {count}")


def _check_one_device(*tensors: Tensor) -> None:
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1:
        raise ValueError(
            f"the tensors are on {' and '.join(sorted(map(str, devices)))}; they must be on one device"
        )
