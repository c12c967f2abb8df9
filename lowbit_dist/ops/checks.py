"""What the ops ask of their arguments: ValueError, with both numbers and the remedy."""

import torch
from torch import Tensor

from lowbit_dist.grid import BLOCK, PLANE, Grid
from lowbit_dist.ops import fused
from lowbit_dist.ops.states import STATES, Slot, Stored, dtype_of
from lowbit_dist.ops.targets import Codes, Rule, Weights

FLOATS = (torch.float32, torch.bfloat16)  # of compiled code
LONGEST_ROW = 2**17 - 1  # elements: sums of products of -128 and -128 that fit into 32 bits


def tensors_of(target: Codes | Weights) -> tuple[Tensor, ...]:
    if isinstance(target, Weights):
        return (target.weight,)
    residual = () if target.residual is None else (target.residual.values,)
    next_scale = () if target.next_scale is None else (target.next_scale,)
    return (target.codes, target.scale, *residual, *next_scale)


def check_tensor(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} is {tensor.dtype}; it must be {' or '.join(map(str, dtypes))}")
    if not tensor.is_contiguous():
        raise ValueError(
            f"{name} has strides {tensor.stride()}; it must be contiguous: it is read as raw memory"
        )


def check_tokens(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    check_tensor(name, tensor, dtypes)
    if tensor.dim() != 2:
        raise ValueError(f"{name} has the shape {list(tensor.shape)}; it must be [tokens, numbers of each]")


def check_row(k: int) -> None:
    if k > LONGEST_ROW:
        raise ValueError(f"a row has {k:,} elements; sums of more than {LONGEST_ROW:,} may not fit 32 bits")


def check_whole_blocks(n: int) -> None:
    if n % BLOCK:
        raise ValueError(f"there are {n} elements; packed tensors have whole blocks of {BLOCK}: pad to them")


def check_target(target: Codes | Weights, n: int, name: str) -> None:
    if isinstance(target, Weights):
        check_tensor("weight", target.weight, (torch.float32,))
        if target.numel != n:
            raise ValueError(f"weight has {target.numel} elements and {name} {n}; they must be equal")
        return
    check_codes(target.codes, target.grid, n)
    check_scale(target.scale, n, target.first_block, target.scale_every)
    if target.residual is not None:
        check_tensor("residual", target.residual.values, (target.residual.kept.dtype,))
        check_count("residual", target.residual.values, n, n)
    if target.next_scale is not None:
        check_tensor("next_scale", target.next_scale, (torch.float32,))
        if target.next_scale.shape != target.scale.shape or target.residual is not None:
            raise ValueError(
                f"next_scale has {target.next_scale.numel()} elements; it must have {target.scale.numel()}, "
                "as scale has, and stand beside no residual"
            )
    if not 0 <= target.tensor < 2**32:
        raise ValueError(f"tensor is {target.tensor}; it must be from 0 to 2**32 - 1")


def check_codes(codes: Tensor, grid: Grid, n: int) -> None:
    check_tensor("codes", codes, (torch.uint8,))
    check_whole_blocks(n)
    if codes.numel() != n // BLOCK * grid.bytes_per_block:
        raise ValueError(
            f"codes has {codes.numel()} bytes; {n} elements of grid {grid.name} take "
            f"{n // BLOCK * grid.bytes_per_block}"
        )


def check_scale(scale: Tensor, n: int, first_block: int, scale_every: int) -> None:
    check_tensor("scale", scale, (torch.float32,))
    if first_block < 0 or scale_every < 1 or scale_every % PLANE:
        raise ValueError(
            f"first_block is {first_block} and scale_every {scale_every}; the first must be at least 0, the "
            f"second a multiple of {PLANE}"
        )
    last = first_block * BLOCK + n - 1
    if n and last // scale_every >= scale.numel():
        raise ValueError(
            f"element {last} needs scale number {last // scale_every}, but there are {scale.numel()}; pass "
            "the whole tensor's scales, and its number of elements as scale_every if there is one"
        )


def check_state(state: list[Stored], rule: Rule, n: int) -> None:
    name = type(rule).__name__
    if [stored.slot for stored in state] != list(rule.slots):
        raise ValueError(
            f"state has {_names([stored.slot for stored in state])}; {name} has {_names(rule.slots)}"
        )
    if rule.fused is not None and fused.SLOTS.get(rule.fused) != tuple(slot.signed for slot in rule.slots):
        raise ValueError(
            f"{name} says that it is fused as {rule.fused!r}, which is none of {', '.join(fused.SLOTS)} or "
            "has other slots; a rule without a kernel has fused = None"
        )
    for stored in state:
        check_tensor(
            f"slot {stored.slot.name}", stored.values, tuple(dtype_of(stored.slot, s) for s in STATES)
        )
        if stored.states != state[0].states:
            raise ValueError(
                f"slot {stored.slot.name} is kept in {stored.states} and slot {state[0].slot.name} in "
                f"{state[0].states}; a rule's slots are kept alike"
            )
        if (stored.scale is None) == (stored.states == "int8"):
            raise ValueError(
                f"slot {stored.slot.name} of {stored.values.dtype} "
                f"{'needs' if stored.scale is None else 'has no'} scales: use Stored.zeros"
            )
        check_count(f"slot {stored.slot.name}", stored.values, n, n)
        if stored.scale is not None:
            check_tensor(f"the scale of slot {stored.slot.name}", stored.scale, (torch.float32,))
            check_count(f"the scale of slot {stored.slot.name}", stored.scale, -(-n // BLOCK), n)


def check_count(name: str, tensor: Tensor, wanted: int, n: int) -> None:
    if tensor.numel() != wanted:
        raise ValueError(f"{name} has {tensor.numel()} elements; {n} weights take {wanted}")


def _names(slots: list[Slot] | tuple[Slot, ...]) -> str:
    words = [f"{slot.name} ({'signed' if slot.signed else 'unsigned'})" for slot in slots]
    return f"the slots {', '.join(words)}" if words else "no slots"


def check_one_device(*tensors: Tensor) -> None:
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1:
        raise ValueError(
            f"the tensors are on {' and '.join(sorted(map(str, devices)))}; they must be on one device"
        )
