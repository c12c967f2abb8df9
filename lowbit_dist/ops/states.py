"""The state that a rule has of each element (its slots), or of each row and column, and how it is kept:
float32, bfloat16, or 8 bits.

8 bits are power companding, with a scale for each block of 256 elements:

    signed      x = (q * |q|) * scale        scale = max|x| / 127^2     |q| = #{k in 1..127: y >= (k - 1/2)^2}
    unsigned    x = (q^2 * q^2) * scale      scale = max(x) / 255^4      q  = #{k in 1..255: y >= (k - 1/2)^4}

where y = |x| * (1 / scale), in float32.  An unsigned number is a mean of squares, and one that decoded to 0
would divide a direction by eps, so its q is at least 1.  A scale below the smallest normal float32 is stored
as 0, and y is 0 then.  Numbers are finite; for others the result is unspecified.

bfloat16 is rounded to nearest even.  Letters: N elements, B = ceil(N / 256) blocks.
"""

from dataclasses import dataclass
from math import prod
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from lowbit_dist.grid import BLOCK

States = Literal["fp32", "bf16", "int8"]
STATES: tuple[States, ...] = ("fp32", "bf16", "int8")

SIGNED_TOP = 127
UNSIGNED_TOP = 255
SIGNED_SQUARE = float(SIGNED_TOP**2)
UNSIGNED_FOURTH = float(UNSIGNED_TOP**4)
SMALLEST_SCALE = torch.finfo(torch.float32).tiny


class Slot(NamedTuple):
    """A number of a rule's state, one for each element, or for each row or column of a matrix; one that is
    not signed is never below 0.
    """

    name: str
    signed: bool
    per: Literal["element", "row", "column"] = "element"

    def length(self, shape: tuple[int, ...], numel: int) -> int:
        """How many there are on a worker that has `numel` elements of a tensor: those of rows and columns are
        the whole tensor's, on every worker.
        """
        if self.per == "element":
            return numel
        return (1, *shape)[-1] if self.per == "column" else prod(shape[:-1])


@dataclass
class Stored:
    """The numbers of one slot for N elements."""

    slot: Slot
    values: Tensor  # [N] float32 | bfloat16 | int8 if signed, else uint8
    scale: Tensor | None = None  # [B] float32, with 8 bits only

    @classmethod
    def zeros(cls, slot: Slot, n: int, states: str, device: torch.device | str = "cpu") -> "Stored":
        """The state before the first step; `states` is one of STATES."""
        if states not in STATES:
            raise ValueError(f"states is {states!r}; it must be one of {', '.join(STATES)}")
        dtype = dtype_of(slot, cast(States, states))
        scale = torch.zeros(-(-n // BLOCK), dtype=torch.float32, device=device) if states == "int8" else None
        return cls(slot, torch.zeros(n, dtype=dtype, device=device), scale)

    @property
    def states(self) -> States:
        names: dict[torch.dtype, States] = {torch.float32: "fp32", torch.bfloat16: "bf16"}
        return names.get(self.values.dtype, "int8")

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.values,) if self.scale is None else (self.values, self.scale)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def load(self, start: int, stop: int) -> Tensor:  # [stop - start] float32
        """Elements `start` to `stop - 1`; `start` is a block's first.  It may share memory with `values`."""
        x = self.values[start:stop].float()
        if self.scale is None:
            return x
        scale = self.scale[_blocks(start, stop)].repeat_interleave(BLOCK)[: stop - start]
        if self.slot.signed:
            return (x * x.abs()) * scale
        x = x * x
        return (x * x) * scale

    def store(self, start: int, stop: int, x: Tensor) -> None:  # x: [stop - start] float32
        """Keep `x` in the place of elements `start` to `stop - 1`: whole blocks, or the last one's rest."""
        values = self.values[start:stop]
        if self.scale is None:
            values.copy_(x)
            return
        code, self.scale[_blocks(start, stop)] = _companded(x.abs() if self.slot.signed else x, self.slot)
        values.copy_(torch.where(x < 0, -code, code) if self.slot.signed else code.clamp(min=1))


def dtype_of(slot: Slot, states: States) -> torch.dtype:
    """How one number of a slot is kept."""
    if states == "int8":
        return torch.int8 if slot.signed else torch.uint8
    return torch.float32 if states == "fp32" else torch.bfloat16


def _blocks(start: int, stop: int) -> slice:
    return slice(start // BLOCK, -(-stop // BLOCK))


def _companded(x: Tensor, slot: Slot) -> tuple[Tensor, Tensor]:
    """Codes ([len(x)] float32) and scales ([B] float32) of x >= 0."""
    blocks = pad(x, (0, -len(x) % BLOCK)).view(-1, BLOCK)
    largest = blocks.amax(dim=1)
    scale = largest / torch.full_like(largest, SIGNED_SQUARE if slot.signed else UNSIGNED_FOURTH)
    usable = scale >= SMALLEST_SCALE
    scale = torch.where(usable, scale, 0.0)
    inverse = torch.where(usable, torch.ones_like(scale) / scale, 0.0)
    y = blocks * inverse.unsqueeze(1)
    # How many thresholds y reaches: a root tells to within one, the thresholds themselves decide.
    code = (y.sqrt() if slot.signed else y.sqrt().sqrt()).round()
    code = code - (y < _threshold(code, slot)).float()
    code = code + (y >= _threshold(code + 1, slot)).float()
    return code.clamp(min=0).view(-1)[: len(x)], scale


def _threshold(code: Tensor, slot: Slot) -> Tensor:
    """The least y that has this code."""
    square = (code - 0.5) * (code - 0.5)
    return square if slot.signed else square * square
