"""GGUF files: a header of metadata and tensors' places, and the tensors behind it.

    "GGUF", version 3, number of tensors, number of entries
    of each entry     its name, its type, its value           strings and arrays have their length before them
    of each tensor    its name, its dimensions (the fastest first), ggml's type, its offset in the data
    the data          each tensor from a multiple of 32 bytes on

Writing is ours, tensor by tensor; reading is the public `gguf` package's.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from lowbit_dist.export.ggml import TYPES, Type

ALIGNMENT = 32
Q2_0 = TYPES["Q2_0"]
UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9  # of gguf_metadata_value_type
NUMBERS = {np.dtype(np.uint32): UINT32, np.dtype(np.int32): INT32, np.dtype(np.float32): FLOAT32}
# Whole numbers are written as uint32 and others as float32, as llama.cpp reads them.
Value = bool | int | float | str | Sequence[str] | NDArray[Any]


@dataclass(frozen=True)
class Entry:
    """A tensor that is to be written."""

    name: str
    type: Type
    shape: tuple[int, ...]  # the fastest last
    data: Callable[[], NDArray[Any]]  # its bytes, asked for when it is written

    @property
    def n_bytes(self) -> int:
        return prod(self.shape[:-1]) * self.type.row_bytes(self.shape[-1])


def write(path: Path, metadata: Mapping[str, Value], entries: Sequence[Entry]) -> None:
    with path.open("wb") as file:
        file.write(header(metadata, entries))
        for entry in entries:
            _pad(file)
            data = entry.data()
            if data.nbytes != entry.n_bytes:
                raise ValueError(f"{entry.name} has {data.nbytes:,} bytes, not {entry.n_bytes:,}")
            file.write(np.ascontiguousarray(data).data)
        _pad(file)  # readers want the last one filled, too


def header(metadata: Mapping[str, Value], entries: Sequence[Entry]) -> bytes:
    parts = [struct.pack("<4sIQQ", b"GGUF", 3, len(entries), len(metadata))]
    for name, value in metadata.items():
        parts += [_string(name), _value(value)]
    offset = 0
    for entry in entries:
        dimensions = entry.shape[::-1]
        form = f"<I{len(dimensions)}QIQ"
        parts += [_string(entry.name), struct.pack(form, len(dimensions), *dimensions, entry.type.id, offset)]
        offset += -(-entry.n_bytes // ALIGNMENT) * ALIGNMENT
    return b"".join(parts)


def _pad(file: BinaryIO) -> None:
    file.write(bytes(-file.tell() % ALIGNMENT))


def _string(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _value(value: Value) -> bytes:
    if isinstance(value, bool):
        return struct.pack("<I?", BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", UINT32, value)
    if isinstance(value, float):
        return struct.pack("<If", FLOAT32, value)
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _string(value)
    if isinstance(value, np.ndarray):
        return struct.pack("<IIQ", ARRAY, NUMBERS[value.dtype], len(value)) + value.tobytes()
    return struct.pack("<IIQ", ARRAY, STRING, len(value)) + b"".join(map(_string, value))


def fill_in(path: Path, name: str, text: str) -> None:
    """Give an entry of the metadata, a string, another value that is no longer, padded with spaces."""
    field = _reader(path, "r+").fields[name]
    place = field.parts[field.data[0]]
    encoded = text.encode()
    if len(encoded) > len(place):
        raise ValueError(f"{name} has room for {len(place):,} bytes, not for {len(encoded):,}")
    place[:] = np.frombuffer(encoded.ljust(len(place)), np.uint8)


class Contents:
    """What the public `gguf` package reads of a file: its metadata, and its tensors as numbers."""

    def __init__(self, path: Path):
        reader = _reader(path)
        self.metadata: dict[str, Any] = {name: of.contents() for name, of in reader.fields.items()}
        self.tensors: dict[str, Any] = {of.name: of for of in reader.tensors}  # gguf.ReaderTensor

    def values(self, name: str) -> NDArray[np.float32]:
        import gguf

        of = self.tensors[name]
        if of.tensor_type == Q2_0.id:  # 64 to a block: d, and four to a byte
            blocks = of.data.reshape(-1, Q2_0.bytes)
            codes = blocks[:, 2:, None] >> np.array([0, 2, 4, 6], np.uint8) & 3
            d = blocks[:, :2].copy().view(np.float16).astype(np.float32)
            levels = codes.reshape(-1, Q2_0.elements).astype(np.float32) - 1
            return (d * levels).reshape(of.shape[::-1])  # type: ignore[no-any-return]
        return gguf.quants.dequantize(of.data, of.tensor_type)  # type: ignore[no-any-return]


def _reader(path: Path, mode: Literal["r", "r+"] = "r") -> Any:  # gguf.GGUFReader
    import gguf

    known = gguf.GGMLQuantizationType
    if Q2_0.id not in {of.value for of in known}:  # as in gguf 0.19; llama.cpp itself reads it
        member = int.__new__(known, Q2_0.id)
        member._name_, member._value_ = Q2_0.name, Q2_0.id
        known._value2member_map_[Q2_0.id] = member
        gguf.GGML_QUANT_SIZES[member] = (Q2_0.elements, Q2_0.bytes)
    return gguf.GGUFReader(path, mode)
