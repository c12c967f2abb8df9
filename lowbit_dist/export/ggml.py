"""The blocks that ggml, llama.cpp's library, holds weights in: levels packed into them as they are.

A block has `elements` consecutive weights of a row in `bytes` bytes: their levels, offset to be unsigned, and
a float16 d; weight = d * level.  Where a level sits is read from the decoders in ggml-quants.c:

    TQ1_0   five ternary digits to a byte, as the fraction sum / 243 in 256ths, rounded up: a decoder gets
            digit n by multiplying with 3^n and looking at what overflows
    TQ2_0   byte j of a half holds elements j, j + 32, j + 64, j + 96 of its 128
    Q2_0    byte j holds elements 4 j to 4 j + 3
    Q2_K    as TQ2_0, and for each 16 elements a factor of d (1) and a subtrahend in levels (2)
    Q3_K    the same without a subtrahend, the third bits apart: bit i of byte j is of element j + 32 i
    Q4_0    byte j holds elements j and j + 16
    Q8_0    byte j holds element j

Nothing is computed from the weights' values, so what a reader decodes is d * level to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Levels = NDArray[np.int8]  # [blocks, elements]
Bytes = NDArray[np.uint8]  # [blocks, n]


@dataclass(frozen=True)
class Type:
    """One of ggml's types of tensors."""

    name: str
    id: int  # ggml_type
    file_type: int  # llama_ftype: what a file is called that is mostly of this type
    elements: int
    bytes: int
    levels: tuple[int, int] | None = None  # the lowest and the highest; None: plain numbers
    fields: Callable[[Levels, Bytes], tuple[Bytes, ...]] | None = None  # of levels and d, a block's parts

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes / self.elements

    def row_bytes(self, length: int) -> int:
        return length // self.elements * self.bytes

    def pack(self, levels: NDArray[np.int8], d: NDArray[np.float16]) -> Bytes:
        """The bytes [rows, row_bytes(K)] of levels [rows, K] and their d [rows, K / elements]."""
        assert self.fields is not None, f"{self.name} has no blocks"
        rows, length = levels.shape
        blocks = levels.reshape(-1, self.elements)
        parts = self.fields(blocks, np.ascontiguousarray(d).reshape(-1, 1).view(np.uint8))
        return np.concatenate(parts, axis=1).reshape(rows, self.row_bytes(length))


def _or(parts: NDArray[np.uint8], axis: int) -> NDArray[np.uint8]:
    return np.bitwise_or.reduce(parts, axis=axis)


def _unsigned(levels: Levels, low: int) -> Bytes:
    return (levels - np.int16(low)).astype(np.uint8)


def _halves(codes: Bytes) -> Bytes:
    """Codes 0 to 3 of 256 elements, as TQ2_0, Q2_K and Q3_K have them."""
    shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
    return _or(codes.reshape(-1, 2, 4, 32) << shifts, 2).reshape(-1, 64)


def _digits(codes: Bytes, per_byte: int, n_bytes: int) -> Bytes:
    """Ternary digits, byte j's at elements j, j + n_bytes, ...; the first one weighs most."""
    weights = np.array([81, 27, 9, 3, 1], np.uint16)[:per_byte, None]
    sums = (codes.reshape(-1, per_byte, n_bytes) * weights).sum(1, dtype=np.uint16)
    return ((sums * 256 + 242) // 243).astype(np.uint8)


def _tq1_0(levels: Levels, d: Bytes) -> tuple[Bytes, ...]:
    codes = _unsigned(levels, -1)
    parts = np.split(codes, (160, 240), axis=1)
    return (*map(_digits, parts, (5, 5, 4), (32, 16, 4)), d)


def _tq2_0(levels: Levels, d: Bytes) -> tuple[Bytes, ...]:
    return _halves(_unsigned(levels, -1)), d


def _q2_0(levels: Levels, d: Bytes) -> tuple[Bytes, ...]:
    return d, _or(_unsigned(levels, -1).reshape(-1, 16, 4) << np.array([0, 2, 4, 6], np.uint8), 2)


def _q2_k(levels: Levels, d: Bytes) -> tuple[Bytes, ...]:
    scales = np.full((len(levels), 16), 1 | 2 << 4, np.uint8)  # d * 1 * code - d * 2
    return scales, _halves(_unsigned(levels, -2)), d, d


def _q3_k(levels: Levels, d: Bytes) -> tuple[Bytes, ...]:
    codes = _unsigned(levels, -4)
    high = _or((codes >> np.uint8(2)).reshape(-1, 8, 32) << np.arange(8, dtype=np.uint8)[:, None], 1)
    # 33, which stands for 1, for each 16 elements: the low four bits of all, then the high two.
    scales = np.repeat(np.array([[0x11] * 8 + [0xAA] * 4], np.uint8), len(levels), 0)
    return high, _halves(codes & np.uint8(3)), scales, d


def _q4_0(levels: Levels, d: Bytes) -> tuple[Bytes, ...]:
    codes = _unsigned(levels, -8)
    return d, codes[:, :16] | codes[:, 16:] << np.uint8(4)


def _q8_0(levels: Levels, d: Bytes) -> tuple[Bytes, ...]:
    return d, levels.view(np.uint8)


TYPES = {
    of.name: of
    for of in (
        Type("TQ1_0", 34, 36, 256, 54, (-1, 1), _tq1_0),
        Type("TQ2_0", 35, 37, 256, 66, (-1, 1), _tq2_0),
        Type("Q2_0", 42, 41, 64, 18, (-1, 1), _q2_0),
        Type("Q2_K", 10, 10, 256, 84, (-2, 1), _q2_k),
        Type("Q3_K", 11, 11, 256, 110, (-4, 3), _q3_k),
        Type("Q4_0", 2, 2, 32, 18, (-8, 7), _q4_0),
        Type("Q8_0", 8, 7, 32, 34, (-128, 127), _q8_0),
        Type("BF16", 30, 32, 1, 2),
        Type("F16", 1, 1, 1, 2),
        Type("F32", 0, 0, 1, 4),
    )
}
