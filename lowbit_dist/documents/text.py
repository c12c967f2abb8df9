"""Text files, and the standard library's sources: cut at line ends, one document a piece."""

import os
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

from lowbit_dist.documents.part import FileRange
from lowbit_dist.errors import ConfigError

PIECE = 1 << 16  # bytes; a text file longer than this is cut at the line ends behind its multiples
PART = 1 << 22  # bytes of a part of a text or .jsonl file


def parts(path: str, source: str = "text") -> Iterator[FileRange]:
    stat = os.stat(path)
    for start in range(0, stat.st_size, PART):
        stop = min(start + PART, stat.st_size)
        yield FileRange(source, path, start, stop, stop - start, stat.st_mtime_ns)


def documents(part: FileRange) -> Iterator[str]:
    with open(part.path, "rb") as file:
        start = part.start
        if start:
            file.seek(start - 1)
            start += len(file.readline()) - 1  # the line across the border belongs to the part before
        while start < part.stop:
            file.seek(start)
            border = (start // PIECE + 1) * PIECE
            data = file.read(border - 1 - start) + file.readline()
            if not data:
                return
            yield _decoded(data, part.path, start)
            start += len(data)


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


# `_sysconfigdata*` describes the machine that Python was built on.
_NOT_LIBRARY = {"__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test"}


def stdlib_parts(_: str) -> Iterator[FileRange]:
    """The standard library's sources as the running interpreter has them, without its tests."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in walk(root, lambda name: name in _NOT_LIBRARY or name.startswith((".", "_sysconfigdata"))):
        if path.suffix == ".py" and path.stat().st_size:
            yield from parts(str(path), "stdlib")


def walk(folder: Path, is_skipped: Callable[[str], bool]) -> list[Path]:
    def refuse(error: OSError) -> None:
        raise error

    paths = []
    for where, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not is_skipped(name)]
        paths += [Path(where, name) for name in files if not is_skipped(name)]
    return sorted(paths, key=lambda path: path.relative_to(folder).as_posix())
