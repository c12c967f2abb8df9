"""Text files, and the standard library's sources.

Without a separator a file is cut at line ends, one document a piece; with one, the documents stand between
the separators, without the line ends around them.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from lowbit_dist.documents import stream
from lowbit_dist.documents.folders import has_content, walk
from lowbit_dist.documents.part import LONGEST, Document, FileRange, Reading, Tally
from lowbit_dist.errors import ConfigError

PIECE = 1 << 16  # bytes; a text file longer than this is cut at the line ends behind its multiples
PART = 1 << 22  # bytes of a part of a file of text, JSON lines or CSV


def parts(path: str, reading: Reading, source: str = "text") -> Iterator[FileRange]:
    """Ranges of PART bytes, cut behind separators if there are any; one of a compressed file."""
    status = os.stat(path)
    size, start = status.st_size, 0
    mark = reading.separator if source == "text" else None
    while start < size:
        stop = size if stream.is_compressed(path) else min(start + PART, size)
        if mark is not None and stop < size:
            stop = _behind(mark.encode(), path, stop)
        yield FileRange(source, path, start, stop, stop - start, status.st_mtime_ns, reading)
        start = stop


def _behind(mark: bytes, path: str, start: int) -> int:
    """The place behind the first mark that begins at byte `start` or later, or the file's end."""
    with open(path, "rb") as file:
        file.seek(start)
        data = b""
        while chunk := file.read(stream.CHUNK):
            data = data[max(0, len(data) - len(mark) + 1) :] + chunk  # a mark may lie across two chunks
            if (place := data.find(mark)) >= 0:
                return file.tell() - len(data) + place + len(mark)
        return file.tell()


def documents(part: FileRange, tally: Tally) -> Iterator[Document]:
    mark = part.reading.separator
    with stream.opened(part.path) as file:
        yield from map(Document, _cut(file, part) if mark is None else _divided(file, part, mark.encode()))


def _cut(file: BinaryIO, part: FileRange) -> Iterator[str]:
    """Pieces of whole lines that end behind the multiples of PIECE."""
    start = part.start
    if start:
        file.seek(start - 1)
        start += len(stream.line(file, part.path)) - 1  # the line across the border is of the part before
    while stream.is_compressed(part.path) or start < part.stop:
        border = (start // PIECE + 1) * PIECE
        data = file.read(border - 1 - start)
        data += stream.line(file, part.path)
        if not data:
            return
        yield _decoded(data, part.path, start)
        start += len(data)


def _divided(file: BinaryIO, part: FileRange, mark: bytes) -> Iterator[str]:
    start = part.start
    left = sys.maxsize if stream.is_compressed(part.path) else part.stop - start
    rest = b""
    if start:
        file.seek(start)
    while data := file.read(min(left, max(stream.CHUNK, len(rest)))):
        left -= len(data)
        *pieces, rest = (rest + data).split(mark)
        for piece in pieces:
            yield _decoded(piece, part.path, start).strip("\r\n")
            start += len(piece) + len(mark)
        if len(rest) > LONGEST:
            raise ConfigError(
                f"{part.path} has no separator in {LONGEST:,} bytes from byte {start:,} on; divide it, or "
                "leave --separator out"
            )
    if rest.strip():  # behind the last mark there may be nothing
        yield _decoded(rest, part.path, start).strip("\r\n")


def _decoded(data: bytes, path: str, start: int) -> str:
    """`data`, which begins at byte `start` of the file, as text."""
    if (binary := data.find(b"\0")) >= 0:
        raise ConfigError(f"{path}: byte {start + binary:,} is zero, so this is not text; leave the file out")
    try:
        return data.decode("utf-8-sig" if start == 0 else "utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: byte {start + error.start:,} is not UTF-8 text; convert the file or leave it out"
        ) from None


def split(document: str, longest: int) -> Iterator[str]:
    """The document in pieces of at most `longest` bytes, cut at line ends, else at blanks, else anywhere."""
    data = document.encode()
    start = 0
    while len(data) - start > longest:
        stop = start + longest
        cut = data.rfind(b"\n", start, stop) + 1 or data.rfind(b" ", start, stop) + 1
        if not cut:
            cut = stop
            while cut > start and data[cut] & 0xC0 == 0x80:  # inside a character
                cut -= 1
        yield data[start:cut].decode()
        start = cut
    yield data[start:].decode()


# `_sysconfigdata*` describes the machine that Python was built on.
_NOT_LIBRARY = {"__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test"}


def stdlib_parts(_: str, reading: Reading) -> Iterator[FileRange]:
    """The standard library's sources as the running interpreter has them, without its tests."""

    def why_left_out(name: str) -> str | None:
        return "not of it" if name in _NOT_LIBRARY or name.startswith((".", "_sysconfigdata")) else None

    left_out: Counter[str] = Counter()  # what is not of the library is not missed
    for path in walk(Path(sysconfig.get_path("stdlib")), why_left_out, left_out):
        if path.suffix == ".py" and has_content(str(path), left_out):
            yield from parts(str(path), reading._replace(separator=None), "stdlib")
