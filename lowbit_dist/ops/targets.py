"""What an op is given: the rule and the numbers of a step, and the target that it changes, as far as
reference.py and its backends ask for them.  Letters: N elements, B = N / 256 blocks.
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from lowbit_dist.grid import BLOCK, Grid
from lowbit_dist.ops.states import Slot, Stored

RESIDUAL_TOP = 127  # counts of an int8 residual at its reach


class Rule(Protocol):
    """As much of an optimizer (optim/rule.py) as an op asks for."""

    slots: ClassVar[tuple[Slot, ...]]
    scope: ClassVar[Literal["element", "row", "matrix", "shard"]]
    fused: ClassVar[Literal["adamw", "lion"] | None]

    def update(self, g: Tensor, *slots: Tensor, step: int) -> tuple[Tensor, ...]: ...


@dataclass(frozen=True, kw_only=True)
class Now:
    """The numbers of one optimizer step that are not the rule's."""

    lr: float
    weight_decay: float  # decoupled (arXiv 1711.05101), in units of lr
    step: int  # 1 for the first
    seed: int  # 64 bits
    grad_scale: float = 1.0
    # The number of this update, 1 for the first that slots see: the step's own, where none was skipped.
    update: int = 0
    nearest: float = 0.0  # how far rounding has gone from chance, 0, to the nearest level, 1
    # Levels that a weight with a residual may be from its code, until that flips; None: the residual's reach.
    threshold: float | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.step < 2**32:
            raise ValueError(f"step is {self.step}; steps count from 1 and stay below 2**32")
        if not self.update:
            object.__setattr__(self, "update", self.step)
        if not 0 <= self.nearest <= 1:
            raise ValueError(f"nearest is {self.nearest}; it must be from 0 to 1")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed is {self.seed}; it must be from 0 to 2**64 - 1")

    @property
    def slope(self) -> float:
        """What the chance of a fraction of a level grows by, from half of `nearest` on."""
        # A float32 beside 1/2 differs from it by 2^-25 at least: in the end all but 1/2 is certain.
        return 1 / max(1 - self.nearest, 2.0**-25)

    @property
    def decay(self) -> float:
        """What a step takes off a weight for its own size, as a fraction."""
        return self.lr * self.weight_decay


class Accumulator(NamedTuple):
    """How a code's residual is kept: what its level leaves out of the weight, a number for each element."""

    reach: float  # levels: the largest residual; beyond it the code flips, if `Now` does not say otherwise
    leak: float  # the share that is forgotten in each step
    resets: bool  # a flip leaves nothing of it
    states: Literal["int8", "bf16"] = "int8"  # in counts, of which 127 are its reach, or in levels

    @property
    def dtype(self) -> torch.dtype:
        return torch.int8 if self.states == "int8" else torch.bfloat16

    @property
    def levels_per_unit(self) -> float:
        """What a stored 1 is worth."""
        return self.reach / RESIDUAL_TOP if self.states == "int8" else 1.0

    @property
    def units_per_level(self) -> float:
        return RESIDUAL_TOP / self.reach if self.states == "int8" else 1.0

    def spacing(self, levels: float) -> float:
        """Between residuals that can be stored, at one of so many levels: in levels."""
        return self.levels_per_unit if self.states == "int8" else 2.0 ** (math.frexp(levels)[1] - 8)

    def residual(self, n: int, device: torch.device | str = "cpu") -> Stored:
        """Of n elements, before the first step."""
        return Stored(Slot("residual", signed=True), torch.zeros(n, dtype=self.dtype, device=device))


@dataclass(frozen=True)
class Residual:
    """The residuals of a target's codes."""

    values: Tensor  # [N] int8, from -127 to 127, or bfloat16; changed in place
    kept: Accumulator


@dataclass(frozen=True)
class Codes:
    """A target: packed codes, a shard's or a whole tensor's."""

    codes: Tensor  # [B * grid.bytes_per_block] uint8, changed in place
    scale: Tensor  # [scales of the whole tensor] float32, positive
    scale_every: int  # element e of the whole tensor has scale[e // scale_every]
    grid: Grid
    tensor: int  # the tensor's number in the random counter, below 2**32
    first_block: int  # place of the first block within the whole tensor
    residual: Residual | None = None  # None: a step is rounded to whole levels by chance
    next_scale: Tensor | None = None  # of the codes after a step, in the shape of `scale`; None: the same
    flips: Tensor | None = None  # [1] int64, to which a kernel may add those of a step, and return it

    @property
    def numel(self) -> int:
        return self.codes.numel() * 8 // self.grid.bits

    def part(self, start: int, stop: int) -> "Codes":
        """Elements `start` to `stop - 1`, whole blocks, sharing memory."""
        codes = self.codes[start * self.grid.bits // 8 : stop * self.grid.bits // 8]
        block = self.first_block + start // BLOCK
        residual = self.residual and Residual(self.residual.values[start:stop], self.residual.kept)
        return replace(self, codes=codes, first_block=block, residual=residual, flips=None)


@dataclass(frozen=True)
class Weights:
    """A target: ordinary weights, any number of them."""

    weight: Tensor  # [N] float32, changed in place

    @property
    def numel(self) -> int:
        return self.weight.numel()

    def part(self, start: int, stop: int) -> "Weights":
        """Elements `start` to `stop - 1`, sharing memory."""
        return Weights(self.weight[start:stop])
