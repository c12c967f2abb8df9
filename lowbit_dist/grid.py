"""Grids: the evenly spaced integer levels of a low-bit weight, and how many bytes their codes take.

A weight is `scale * level`; storage holds the *code* `level - grid.low`, an unsigned number, for every grid.
Codes are packed in blocks of `BLOCK` consecutive elements of the unsharded, row-major tensor. Inside a block:

* 2 bits: byte j (of 64) holds elements j, j + 64, j + 128 and j + 192 in bits 0-1, 2-3, 4-5 and 6-7.
* 3 bits: the low two bits of all elements as above, then 32 bytes: bit i of byte j is the high bit of
  element j + 32 i.
* 4 bits: byte j (of 128) holds element j in its low and element j + 128 in its high nibble.
* 6 bits: the low four bits of all elements as with 4 bits, then their high two as with 2.
* 8 bits: byte j holds element j.

Neighbouring bytes hold neighbouring elements, so that unpacking is a shift and a mask over whole vectors.
"""

from dataclasses import dataclass

# Elements that share a run of code bytes, a scale of each optimizer slot in 8 bits, and 64 Philox calls.
# Shards are cut on its borders only, so that none of these depends on the number of workers.
BLOCK = 256
# Elements of a block that lie side by side in a 2-bit plane, and the least that share a scale of a weight.
PLANE = 64


@dataclass(frozen=True)
class Grid:
    """The integer levels `low, low + 1, ..., high`, each stored in `bits` bits."""

    name: str
    low: int
    high: int
    bits: int

    @property
    def n_levels(self) -> int:
        return self.high - self.low + 1

    @property
    def bytes_per_block(self) -> int:
        return BLOCK * self.bits // 8

    @property
    def bytes_per_parameter(self) -> float:
        return self.bits / 8


GRIDS: dict[str, Grid] = {
    grid.name: grid
    for grid in (
        Grid("ternary", -1, 1, 2),
        Grid("int2", -2, 1, 2),
        Grid("int3", -4, 3, 3),
        Grid("int4", -8, 7, 4),
        Grid("int6", -32, 31, 6),
        Grid("int8", -128, 127, 8),
    )
}
