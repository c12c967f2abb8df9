"""The bytes of a file, plain or compressed (.gz, .zst), and the lines that begin in a part of it."""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

from lowbit_dist.documents.part import LONGEST, FileRange
from lowbit_dist.errors import ConfigError

CHUNK = 1 << 20  # bytes read at once
COMPRESSED = (".gz", ".zst")


def is_compressed(path: str) -> bool:
    return path.lower().endswith(COMPRESSED)


def plain_name(path: str) -> str:
    """The path in small letters, without the suffix of a compression."""
    return path.lower().removesuffix(".gz").removesuffix(".zst")


@contextlib.contextmanager
def opened(path: str) -> Iterator[BinaryIO]:
    """The file's bytes, decompressed; reading raises ConfigError where compressed data is cut or damaged."""
    with open(path, "rb") as file:
        if is_compressed(path):
            chunks = (_gzip if path.lower().endswith(".gz") else _zstd)(file)
            yield io.BufferedReader(_Chunks(chunks, path, file), CHUNK)
        else:
            yield file


class _Chunks(io.RawIOBase):
    """Chunks of bytes as a file, so that lines are found by the standard library."""

    def __init__(self, chunks: Iterator[bytes], path: str, file: BinaryIO):
        self.chunks, self.path, self.file = chunks, path, file
        self.rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        target = memoryview(buffer)
        try:
            while not self.rest:
                self.rest = memoryview(next(self.chunks))
        except StopIteration:
            return 0
        except EOFError:
            size = os.fstat(self.file.fileno()).st_size
            raise ConfigError(
                f"{self.path} ends in the middle of its compressed data, at byte {size:,}; copy it again"
            ) from None
        except (gzip.BadGzipFile, zlib.error) as error:
            raise ConfigError(
                f"{self.path} is damaged at or before byte {self.file.tell():,}: {error}; copy it again"
            ) from None
        n = min(len(target), len(self.rest))
        target[:n] = self.rest[:n]
        self.rest = self.rest[n:]
        return n


def _gzip(file: BinaryIO) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=file) as unzipped:
        while chunk := unzipped.read(CHUNK):
            yield chunk


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


def line(file: BinaryIO, path: str) -> bytes:
    """The next line with its end; nothing at the end of the file."""
    data = file.readline(LONGEST + 1)
    if len(data) > LONGEST:
        raise ConfigError(f"{path} has a line longer than {LONGEST:,} bytes; divide it or leave it out")
    return data


def lines(part: FileRange) -> Iterator[bytes]:
    """The lines that begin inside the part, with their ends; all lines of a compressed file."""
    with opened(part.path) as file:
        position = 0
        if part.start:
            file.seek(part.start - 1)
            position = part.start - 1 + len(line(file, part.path))
        while (is_compressed(part.path) or position < part.stop) and (data := line(file, part.path)):
            position += len(data)
            yield data
