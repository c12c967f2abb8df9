"""The ops on low-bit weights that the package calls: contract checks, then dispatch by device.

`reference.py` says what each op means. CPU tensors go to the compiled C of `cpu.py` (to the reference where
no compiler is found), CUDA tensors to the Triton of `kernels.py`, others to the reference: the same bytes
from all.
"""

from types import ModuleType

import torch
from torch import Tensor

from lowbit_dist.grid import BLOCK, PLANE, Grid
from lowbit_dist.ops import cpu, fused, reference
from lowbit_dist.ops.states import STATES, Slot, Stored, dtype_of
from lowbit_dist.ops.targets import Accumulator, Codes, Now, Residual, Rule, Weights

__all__ = [
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
    "matmul",
    "multiplies",
    "pack",
    "step_",
    "unpack",
    "whole_step_",
]

_FLOATS = (torch.float32, torch.bfloat16)
LONGEST_ROW = 2**17 - 1  # elements: sums of products of -128 and -128 that fit into 32 bits


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
    _check_target(target, grad.numel(), "grad")
    _check_tensor("grad", grad, _FLOATS)
    _check_state(state, rule, grad.numel())
    _check_one_device(*_tensors(target), grad, *(tensor for slot in state for tensor in slot.tensors))
    backend = _updating(target, now, grad.device)
    if rule.fused is not None and not _is_special(target, now):
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
    _check_target(target, u.numel(), "u")
    _check_tensor("u", u, (torch.float32,))
    _check_one_device(*_tensors(target), u)
    return _updating(target, now, u.device).apply_(target, u, now=now)


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
    _check_codes(codes, grid, out.numel())
    _check_scale(scale, out.numel(), first_block, scale_every)
    _check_tensor("out", out, _FLOATS)
    _check_one_device(codes, scale, out)
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
    _check_tensor("weight", weight, (torch.float32,))
    _check_whole_blocks(weight.numel())
    _check_scale(scale, weight.numel(), first_block, scale_every)
    _check_one_device(weight, scale)
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
    _check_tensor("x", x, _FLOATS)
    _check_codes(codes, grid, n * k)
    _check_scale(scale, n * k, 0, scale_every if len(scale) > 1 else BLOCK * n * k)
    _check_one_device(x, codes, scale)
    if len(scale) > 1 and k % scale_every:
        raise ValueError(f"a scale serves {scale_every} elements, which do not divide a row of {k}")
    if k > LONGEST_ROW:
        raise ValueError(f"a row has {k:,} elements; sums of more than {LONGEST_ROW:,} may not fit 32 bits")
    return _host_backend(x.device).matmul(x, codes, scale, grid=grid, scale_every=scale_every, n=n)


def multiplies(device: torch.device) -> bool:
    """Whether `matmul` has compiled code there: it is for inference, and plain torch has no use for it."""
    return _host_backend(device) is cpu


def pack(levels: Tensor, *, grid: Grid) -> Tensor:
    """The codes ([B * grid.bytes_per_block] uint8) of `levels` ([256 B] int8)."""
    _check_tensor("levels", levels, (torch.int8,))
    _check_whole_blocks(levels.numel())
    return _host_backend(levels.device).pack(levels, grid=grid)


def unpack(codes: Tensor, *, grid: Grid) -> Tensor:
    """The levels ([256 B] int8) of `codes` ([B * grid.bytes_per_block] uint8)."""
    _check_codes(codes, grid, codes.numel() * 8 // grid.bits)
    return _host_backend(codes.device).unpack(codes, grid=grid)


def code_counts(codes: Tensor, *, grid: Grid) -> Tensor:
    """How many elements are at each level, from `grid.low` to `grid.high`: [grid.n_levels] int64."""
    _check_codes(codes, grid, codes.numel() * 8 // grid.bits)
    return _host_backend(codes.device).code_counts(codes, grid=grid)


def _backend(device: torch.device) -> ModuleType:
    if device.type == "cuda":
        from lowbit_dist.ops import kernels  # needs Triton, which not every machine has

        return kernels
    return _host_backend(device)


def _updating(target: Codes | Weights, now: Now, device: torch.device) -> ModuleType:
    """Codes with residuals have no Triton kernel; those that get another scale, or are rounded by less than
    chance, which few steps of a run do, none at all: they are updated in plain torch.
    """
    backend = _backend(device)
    if not _is_special(target, now):
        return backend
    has_residual = isinstance(target, Codes) and target.residual is not None
    return backend if has_residual and getattr(backend, "TAKES_RESIDUALS", False) else reference


def _is_special(target: Codes | Weights, now: Now) -> bool:
    """Whether no fused kernel knows the update."""
    return isinstance(target, Codes) and (
        target.residual is not None or target.next_scale is not None or now.nearest > 0
    )


def _host_backend(device: torch.device) -> ModuleType:
    """For ops without a Triton kernel: on a GPU they are rare enough for plain torch, and exact there too."""
    return cpu if device.type == "cpu" and cpu.available() else reference


def _tensors(target: Codes | Weights) -> tuple[Tensor, ...]:
    if isinstance(target, Weights):
        return (target.weight,)
    residual = () if target.residual is None else (target.residual.values,)
    next_scale = () if target.next_scale is None else (target.next_scale,)
    return (target.codes, target.scale, *residual, *next_scale)


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


def _check_target(target: Codes | Weights, n: int, name: str) -> None:
    if isinstance(target, Weights):
        _check_tensor("weight", target.weight, (torch.float32,))
        if target.numel != n:
            raise ValueError(f"weight has {target.numel} elements and {name} {n}; they must be equal")
        return
    _check_codes(target.codes, target.grid, n)
    _check_scale(target.scale, n, target.first_block, target.scale_every)
    if target.residual is not None:
        _check_tensor("residual", target.residual.values, (target.residual.kept.dtype,))
        _check_count("residual", target.residual.values, n, n)
    if target.next_scale is not None:
        _check_tensor("next_scale", target.next_scale, (torch.float32,))
        if target.next_scale.shape != target.scale.shape or target.residual is not None:
            raise ValueError(
                f"next_scale has {target.next_scale.numel()} elements; it must have {target.scale.numel()}, "
                "as scale has, and stand beside no residual"
            )
    if not 0 <= target.tensor < 2**32:
        raise ValueError(f"tensor is {target.tensor}; it must be from 0 to 2**32 - 1")


def _check_codes(codes: Tensor, grid: Grid, n: int) -> None:
    _check_tensor("codes", codes, (torch.uint8,))
    _check_whole_blocks(n)
    if codes.numel() != n // BLOCK * grid.bytes_per_block:
        raise ValueError(
            f"codes has {codes.numel()} bytes; {n} elements of grid {grid.name} take "
            f"{n // BLOCK * grid.bytes_per_block}"
        )


def _check_scale(scale: Tensor, n: int, first_block: int, scale_every: int) -> None:
    _check_tensor("scale", scale, (torch.float32,))
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


def _check_state(state: list[Stored], rule: Rule, n: int) -> None:
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
        _check_tensor(
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
        _check_count(f"slot {stored.slot.name}", stored.values, n, n)
        if stored.scale is not None:
            _check_tensor(f"the scale of slot {stored.slot.name}", stored.scale, (torch.float32,))
            _check_count(f"the scale of slot {stored.slot.name}", stored.scale, -(-n // BLOCK), n)


def _check_count(name: str, tensor: Tensor, wanted: int, n: int) -> None:
    if tensor.numel() != wanted:
        raise ValueError(f"{name} has {tensor.numel()} elements; {n} weights take {wanted}")


def _names(slots: list[Slot] | tuple[Slot, ...]) -> str:
    words = [f"{slot.name} ({'signed' if slot.signed else 'unsigned'})" for slot in slots]
    return f"the slots {', '.join(words)}" if words else "no slots"


def _check_one_device(*tensors: Tensor) -> None:
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1:
        raise ValueError(
            f"the tensors are on {' and '.join(sorted(map(str, devices)))}; they must be on one device"
        )
