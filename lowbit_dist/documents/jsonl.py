"""JSON lines, plain or compressed: the `text` of each object is a document."""

import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from typing import BinaryIO

from lowbit_dist.documents import text
from lowbit_dist.documents.part import FileRange, checked_text
from lowbit_dist.errors import ConfigError

CHUNK = 1 << 20  # bytes read at once


def parts(path: str) -> Iterator[FileRange]:
    if path.lower().endswith(".jsonl"):
        yield from text.parts(path, "jsonl")
    else:
        stat = os.stat(path)  # a compressed file has no middle to start from
        yield FileRange("jsonl", path, 0, stat.st_size, stat.st_size, stat.st_mtime_ns)


def documents(part: FileRange) -> Iterator[str]:
    is_compressed = not part.path.lower().endswith(".jsonl")
    lines = _lines(_decompressed(part.path)) if is_compressed else _lines_between(part)
    for number, line in enumerate(lines):
        if line.strip():
            try:
                yield _field(line)
            except ValueError as error:
                before = 0 if is_compressed or not part.start else _lines_before(part)
                raise ConfigError(f"{part.path} line {before + number + 1:,} {error}") from None


def _lines_between(part: FileRange) -> Iterator[bytes]:
    """The lines that begin inside the part."""
    with open(part.path, "rb") as file:
        if part.start:
            file.seek(part.start - 1)
            file.readline()
        while file.tell() < part.stop and (line := file.readline()):
            yield line


def _lines_before(part: FileRange) -> int:
    """How many lines begin before the part does; counted only to name a mistake's line."""
    n_lines, left = 1, part.start - 1
    with open(part.path, "rb") as file:
        while left and (data := file.read(min(left, CHUNK))):
            n_lines += data.count(b"\n")
            left -= len(data)
    return n_lines


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    rest: list[bytes] = []
    for chunk in chunks:
        first, *others = chunk.split(b"\n")
        rest.append(first)
        if others:
            yield b"".join(rest)
            yield from others[:-1]
            rest = [others[-1]]
    if last := b"".join(rest):
        yield last


def _field(line: bytes) -> str:
    """The `text` of one JSON object; ValueError says what a line that has none has instead."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 text at its byte {error.start:,}; convert the file") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON ({error.msg} at its character {error.pos:,}); repair it") from None
    except RecursionError:
        raise ValueError("is JSON nested too deeply; repair it") from None
    if not isinstance(row, dict):
        raise ValueError('is not a JSON object; write {"text": "..."}')
    return checked_text(row.get("text"), f"its names are {', '.join(map(str, row))[:100] or 'none'}")


def _decompressed(path: str) -> Iterator[bytes]:
    with open(path, "rb") as file:
        try:
            if path.lower().endswith(".gz"):
                with gzip.GzipFile(fileobj=file) as unzipped:
                    while chunk := unzipped.read(CHUNK):
                        yield chunk
            else:
                yield from _zstd(file)
        except EOFError:
            size = os.fstat(file.fileno()).st_size
            raise ConfigError(
                f"{path} ends in the middle of its compressed data, at byte {size:,}; copy it again"
            ) from None
        except (gzip.BadGzipFile, zlib.error) as error:
            raise ConfigError(
                f"{path} is damaged at or before byte {file.tell():,}: {error}; copy it again"
            ) from None


def _zstd(file: BinaryIO) -> Iterator[bytes]:
    """Frame by frame: zstandard's own file reader takes a truncated file for a finished one."""
    import zstandard

    decompressor = None
    while data := file.read(CHUNK):
        while data:
            decompressor = decompressor or zstandard.ZstdDecompressor().decompressobj()
            try:
                chunk = decompressor.decompress(data)
            except zstandard.ZstdError as error:
                raise zlib.error(str(error)) from None
            if chunk:
                yield chunk
            data = decompressor.unused_data if decompressor.eof else b""
            if decompressor.eof:
                decompressor = None
    if decompressor is not None:
        raise EOFError
