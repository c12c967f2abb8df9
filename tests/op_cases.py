"""What the tests of the ops step: rules, gradients, codes and scales of every granularity."""

import torch
from torch import Tensor

from lowbit_dist.grid import BLOCK, GRIDS, Grid
from lowbit_dist.ops import STATES, Accumulator, Codes, Now, Residual, Slot, Stored, reference
from lowbit_dist.optim import AdamW, Lion

RULES = {"adamw": AdamW(betas=(0.9, 0.95), eps=1e-8), "lion": Lion(betas=(0.9, 0.99))}
# Elements that a scale serves.  Rows of 896 and 576 end inside a block, at any of its planes.
GRANULARITIES = {
    "tensor": 2**40,
    "row of 512": 512,
    "row of 896": 896,
    "row of 576": 576,
    "group of 64": 64,
    "group of 128": 128,
    "group of 256": 256,
}
COMBINATIONS = [
    (rule, grid, states, granularity)
    for rule in RULES
    for grid in GRIDS
    for states in STATES
    for granularity in GRANULARITIES
]
# How codes that keep residuals do so, and what else their steps are told.
ACCUMULATORS = {
    "int8": (Accumulator(0.5, 0.0, False), {}),
    "int8, leaking": (Accumulator(0.7, 0.05, False), {"threshold": 0.6}),
    "int8, reset": (Accumulator(0.7, 0.0, True), {"threshold": 0.55}),
    "bf16": (Accumulator(0.7, 0.05, False, "bf16"), {}),
    "bf16, reset": (Accumulator(1.5, 0.0, True, "bf16"), {"threshold": 0.8}),
}


class Momentum:
    """A rule from outside: heavy-ball momentum, for which no backend has a kernel."""

    slots = (Slot("momentum", signed=True),)
    scope = "element"
    fused = None

    def update(self, g: Tensor, *slots: Tensor, step: int) -> tuple[Tensor, ...]:
        m = slots[0] * 0.9 + g
        return m, m


def now(number: int = 1, **changes) -> Now:
    numbers = {"lr": 3e-3, "weight_decay": 0.1, "seed": 0xFEDCBA9876543210, "grad_scale": 0.7}
    return Now(**(numbers | {"step": number} | changes))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_levels(grid: Grid, n_blocks: int, seed: int = 0) -> Tensor:
    n = n_blocks * BLOCK
    return torch.randint(grid.low, grid.high + 1, (n,), dtype=torch.int8, generator=generator(seed))


def random_codes(
    grid: Grid,
    n_blocks: int,
    scale_every: int = 2**40,
    *,
    first_block: int = 3,
    tensor: int = 7,
    seed: int = 0,
) -> Codes:
    """A shard with the scales of all that comes before it; each call with equal arguments gives a copy."""
    n_scales = ((first_block + n_blocks) * BLOCK - 1) // scale_every + 1
    scale = (torch.rand(n_scales, generator=generator(seed + 1)) * 0.02 + 1e-3) / 2 ** (grid.bits - 2)
    codes = reference.pack(random_levels(grid, n_blocks, seed), grid=grid)
    return Codes(codes, scale, scale_every, grid, tensor, first_block)


def random_residual(kept: Accumulator, n: int, g: torch.Generator) -> Residual:
    """Any that can be stored."""
    if kept.states == "int8":
        return Residual(torch.randint(-127, 128, (n,), generator=g).to(torch.int8), kept)
    return Residual(((torch.rand(n, generator=g) * 2 - 1) * kept.reach).bfloat16(), kept)


def heavy_tailed_grad(n: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Gradients of very different sizes, with blocks of zeros and of numbers near the smallest."""
    g = generator(seed)
    grad = torch.randn(n, generator=g) * torch.rand(n, generator=g) ** 3 * 1e-3
    for block, factor in ((1, 0.0), (2, 1e-18), (3, 1e12), (4, 1e-36)):
        grad[block * BLOCK : (block + 1) * BLOCK] *= factor
    grad[7::13] = 0
    return grad.to(dtype)


def zeros(rule, n: int, states: str, device: str = "cpu") -> list[Stored]:
    return [Stored.zeros(slot, n, states, device) for slot in rule.slots]


def copy_of(state: list[Stored], device: str = "cpu") -> list[Stored]:
    """Copies, so that what one backend changes in place stays its own."""
    return [Stored(slot.slot, *(tensor.to(device, copy=True) for tensor in slot.tensors)) for slot in state]


def used_state(rule, n: int, states: str, seed: int = 0) -> list[Stored]:
    """What a few steps leave."""
    state = zeros(rule, n, states)
    for number in (1, 2, 3):
        grad = heavy_tailed_grad(n, seed + number)
        for start, stop in reference.chunks(n, grad.device):
            reference.direction(grad, state, start, stop, rule=rule, now=now(number))
    return state


def part(state: list[Stored], first: int, last: int) -> list[Stored]:
    """The state of blocks `first` to `last - 1`, sharing memory."""
    return [
        Stored(
            slot.slot,
            slot.values[first * BLOCK : last * BLOCK],
            None if slot.scale is None else slot.scale[first:last],
        )
        for slot in state
    ]


def assert_equal(actual: Tensor, expected: Tensor, what: str = "") -> None:
    actual = actual.cpu()
    assert actual.dtype == expected.dtype, what
    n = int((actual != expected).sum())
    assert n == 0, f"{what}: {n} of {expected.numel()} differ"


def assert_equal_state(actual: list[Stored], expected: list[Stored], what: str = "") -> None:
    for a, e in zip(actual, expected, strict=True):
        assert a.slot == e.slot
        for x, y in zip(a.tensors, e.tensors, strict=True):
            assert_equal(x, y, f"{e.slot.name} {what}")
