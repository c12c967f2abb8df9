"""Documents: the texts a corpus is made of, read from the sources a user names.

An input is `stdlib`, `hf:NAME[:CONFIG[:SPLIT]]`, a file, a folder (all of its files) or a quoted pattern
of files.  It is first cut into *parts*: pieces of a few MB that any process can read alone.  The cut and the
order depend on the input alone, so a corpus is the same sequence of documents for any number of workers.

Nothing is skipped in silence: what is missing, empty, truncated, binary or without text is a `ConfigError`
that names the file and the line, row or byte.  A further source is one `Source` and its line in `SOURCES`.
"""

from __future__ import annotations

import glob
import gzip
import json
import os
import sysconfig
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from lowbit_dist.config import ConfigError

PIECE = 1 << 16  # bytes; a text file longer than this is cut at the line ends behind its multiples
PART = 1 << 22  # bytes of a part of a text or .jsonl file
ROWS = 10_000  # of a Hugging Face dataset in a part
CHUNK = 1 << 20  # bytes read at once
PROBED = 1 << 24  # bytes of text that are read before anything else is done with it
PROBE_SECONDS = 3.0
_INPUTS = "write stdlib, hf:NAME, or the path of text, .jsonl or .parquet"


class Part(NamedTuple):
    """A piece of an input.  `start` and `stop` are bytes, row groups or rows, as its source has them."""

    source: str  # a key of SOURCES
    path: str
    start: int
    stop: int
    size: int  # bytes on disk, for progress and for balance
    stamp: int = 0  # time of the file's last change, ns


@dataclass(frozen=True)
class Source:
    parts: Callable[[str], Iterable[Part]]
    documents: Callable[[Part], Iterator[str]]


def parts(inputs: Iterable[str | Path]) -> list[Part]:
    """All parts of `inputs`, in the order of the corpus, once their beginnings are seen to be text."""
    found: list[Part] = []
    for given in inputs:
        found += _parts_of(str(given))
    if not found:
        raise ConfigError(f"--input is required; {_INPUTS}")
    seen: dict[tuple[str, str, int], Part] = {}
    for part in found:
        if seen.setdefault((part.source, part.path, part.start), part) is not part:
            raise ConfigError(f"--input: {part.path} is read twice; name it once")
    _probe([part for part in found if part.source in ("text", "jsonl", "parquet")])
    return found


def _probe(found: list[Part]) -> None:
    """ConfigError for a mistake at the beginning of any part, or anywhere in a small corpus.

    So it is answered before any process is started.  A mistake deep in a large corpus is answered by
    whichever process reads it.
    """
    quota = max(PIECE, PROBED // max(1, len(found)))
    deadline = time.monotonic() + PROBE_SECONDS
    for part in found:
        left = quota
        for document in read([part]):
            left -= len(document)
            if time.monotonic() > deadline:
                return
            if left <= 0:
                break


def read(chosen: Iterable[Part]) -> Iterator[str]:
    """The documents of the parts, in order; empty ones included."""
    for part in chosen:
        try:
            yield from SOURCES[part.source].documents(part)
        except OSError as error:
            raise ConfigError(
                f"{part.path} cannot be read: {error.strerror or error}; repair it or leave it out"
            ) from None


def sample(chosen: list[Part], n_bytes: int) -> Iterator[str]:
    """About `n_bytes` of documents: all of them, or the beginnings of evenly spaced parts."""
    if sum(part.size for part in chosen) > n_bytes:
        n = min(len(chosen), 64)
        chosen = [chosen[i * len(chosen) // n] for i in range(n)]
    quota = n_bytes // len(chosen)
    left = 0
    for part in chosen:
        left += quota  # what a short part leaves goes to the next
        for document in read([part]):
            if left <= 0:
                break
            yield document
            left -= len(document.encode())


# --- which file is read how -------------------------------------------------------------------------------


def _parts_of(given: str) -> list[Part]:
    if given == "stdlib" or given.startswith("hf:"):
        return list(SOURCES[given.partition(":")[0]].parts(given))
    if "://" in given:
        raise ConfigError(f"--input ({given}) must be on this machine, or hf:NAME; copy it here first")
    path = Path(given)
    try:
        if path.is_dir():
            return _folder(path)
        if path.exists():
            if not path.is_file():
                raise ConfigError(f"--input ({given}) must be a file or a folder; write the path of one")
            if path.stat().st_size == 0:
                raise ConfigError(f"--input ({given}) is empty; leave it out")
            return list(SOURCES[_kind(path)].parts(given))
        matches = [each for each in sorted(glob.glob(given, recursive=True)) if os.path.isfile(each)]
    except OSError as error:
        raise ConfigError(
            f"--input ({given}) cannot be read: {error.strerror or error}; repair it or leave it out"
        ) from None
    if not matches:
        raise ConfigError(f"--input ({given}) does not exist; {_INPUTS}")
    return [part for each in matches for part in SOURCES[_kind(Path(each))].parts(each)]


def _kind(path: Path) -> str:
    name = path.name.lower()
    if name.endswith((".jsonl", ".jsonl.gz", ".jsonl.zst")):
        return "jsonl"
    return "parquet" if name.endswith(".parquet") else "text"


def _folder(folder: Path) -> list[Part]:
    found = [
        part
        for path in _walk(folder, lambda name: name.startswith(".") or name == "__pycache__")
        if path.stat().st_size
        for part in SOURCES[_kind(path)].parts(str(path))
    ]
    if not found:
        raise ConfigError(f"--input ({folder}) has no file with text; write the path of one that has")
    return found


def _walk(folder: Path, is_skipped: Callable[[str], bool]) -> list[Path]:
    def refuse(error: OSError) -> None:
        raise error

    found = []
    for where, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not is_skipped(name)]
        found += [Path(where, name) for name in files if not is_skipped(name)]
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


# --- text files and the standard library ------------------------------------------------------------------


def _text_parts(path: str, source: str = "text") -> Iterator[Part]:
    stat = os.stat(path)
    for start in range(0, stat.st_size, PART):
        stop = min(start + PART, stat.st_size)
        yield Part(source, path, start, stop, stop - start, stat.st_mtime_ns)


def _text(part: Part) -> Iterator[str]:
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


def _stdlib_parts(_: str) -> Iterator[Part]:
    """The standard library's sources as the running interpreter has them, without its tests."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in _walk(root, lambda name: name in _NOT_LIBRARY or name.startswith((".", "_sysconfigdata"))):
        if path.suffix == ".py" and path.stat().st_size:
            yield from _text_parts(str(path), "stdlib")


# --- JSON lines -------------------------------------------------------------------------------------------


def _jsonl_parts(path: str) -> Iterator[Part]:
    if path.lower().endswith(".jsonl"):
        yield from _text_parts(path, "jsonl")
    else:
        stat = os.stat(path)  # a compressed file has no middle to start from
        yield Part("jsonl", path, 0, stat.st_size, stat.st_size, stat.st_mtime_ns)


def _jsonl(part: Part) -> Iterator[str]:
    whole = not part.path.lower().endswith(".jsonl")
    lines = _lines(_decompressed(part.path)) if whole else _lines_between(part)
    for number, line in enumerate(lines):
        if line.strip():
            try:
                yield _field(line)
            except ValueError as error:
                before = 0 if whole or not part.start else _lines_before(part)
                raise ConfigError(f"{part.path} line {before + number + 1:,} {error}") from None


def _lines_between(part: Part) -> Iterator[bytes]:
    """The lines that begin inside the part."""
    with open(part.path, "rb") as file:
        if part.start:
            file.seek(part.start - 1)
            file.readline()
        while file.tell() < part.stop and (line := file.readline()):
            yield line


def _lines_before(part: Part) -> int:
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
    return _checked(row.get("text"), f"its names are {', '.join(map(str, row))[:100] or 'none'}")


def _checked(text: Any, instead: str) -> str:
    if not isinstance(text, str):
        raise ValueError(f"has no text in a field 'text' ({instead}); rename the field or drop the line")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"has half a surrogate pair at character {error.start:,} of its text; repair it"
        ) from None
    return text


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


# --- Parquet ----------------------------------------------------------------------------------------------


def _parquet_parts(path: str) -> Iterator[Part]:
    stamp = os.stat(path).st_mtime_ns
    file = _parquet_file(path)
    for group in range(file.num_row_groups):
        size = file.metadata.row_group(group).total_byte_size
        yield Part("parquet", path, group, group + 1, size, stamp)


def _parquet_file(path: str) -> Any:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    with open(path, "rb") as opened:
        begin, size = opened.read(4), opened.seek(0, os.SEEK_END)
        opened.seek(max(0, size - 4))
        marks = {0: begin, max(0, size - 4): opened.read()}
    for place, mark in marks.items():
        if mark != b"PAR1":
            raise ConfigError(
                f"{path} is not a Parquet file, or is cut: at byte {place:,} of {size:,} is no mark PAR1; "
                "copy it again"
            )
    try:
        file = ParquetFile(path)
    except (ArrowException, OSError) as error:
        raise ConfigError(
            f"{path} is not a Parquet file, or is damaged: {_first_line(error)}; copy it again"
        ) from None
    if "text" not in file.schema_arrow.names:
        raise ConfigError(
            f"{path} has no column 'text'; its columns are {', '.join(file.schema_arrow.names)[:100]}; "
            "rename the one that holds text"
        )
    return file


def _parquet(part: Part) -> Iterator[str]:
    from pyarrow import ArrowException

    file = _parquet_file(part.path)
    row = sum(file.metadata.row_group(group).num_rows for group in range(part.start))
    try:
        for batch in file.iter_batches(256, row_groups=[part.start], columns=["text"]):
            for value in batch.column(0):
                row += 1
                text = value.as_py()
                yield _checked(text, f"it is {type(text).__name__}")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{part.path} row {row:,} is not UTF-8 text at byte {error.start:,}; convert it"
        ) from None
    except ValueError as error:  # ArrowInvalid is one
        if isinstance(error, ArrowException):
            raise ConfigError(
                f"{part.path} is damaged after row {row:,}: {_first_line(error)}; copy it again"
            ) from None
        raise ConfigError(f"{part.path} row {row:,} {error}") from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or ["?"])[0]


# --- Hugging Face datasets --------------------------------------------------------------------------------


def _hf_dataset(given: str) -> Any:
    """`hf:NAME[:CONFIG[:SPLIT]]`, downloaded once by the library into its own cache."""
    _, name, configuration, split, *_ = [*given.split(":", 3), "", "", ""]
    if not name:
        raise ConfigError(
            f"--input ({given}) must be hf:NAME, hf:NAME:CONFIG or hf:NAME:CONFIG:SPLIT; write one"
        )
    try:
        import datasets
    except ImportError:
        raise ConfigError(
            f"--input ({given}) needs the package datasets, which is not installed; run: pip install datasets"
        ) from None
    try:
        return datasets.load_dataset(name, configuration or None, split=split or "train")
    except Exception as error:  # the library raises many kinds: no network, no such name, no such split, ...
        raise ConfigError(
            f"--input ({given}) cannot be loaded: {_first_line(error)}; write another name, or a file's path"
        ) from None


def _hf_parts(given: str) -> Iterator[Part]:
    dataset = _hf_dataset(given)
    if "text" not in dataset.column_names:
        raise ConfigError(
            f"--input ({given}) has no column 'text'; its columns are {', '.join(dataset.column_names)[:100]}"
        )
    row_bytes = (dataset.dataset_size or 0) // max(1, len(dataset)) or 1000
    for start in range(0, len(dataset), ROWS):
        stop = min(start + ROWS, len(dataset))
        yield Part("hf", given, start, stop, (stop - start) * row_bytes)


def _hf(part: Part) -> Iterator[str]:
    dataset = _hf_dataset(part.path)
    for start in range(part.start, part.stop, 256):
        for k, text in enumerate(dataset[start : min(start + 256, part.stop)]["text"]):
            try:
                yield _checked(text, f"it is {type(text).__name__}")
            except ValueError as error:
                raise ConfigError(f"{part.path} row {start + k + 1:,} {error}") from None


SOURCES = {
    "stdlib": Source(_stdlib_parts, _text),
    "text": Source(_text_parts, _text),
    "jsonl": Source(_jsonl_parts, _jsonl),
    "parquet": Source(_parquet_parts, _parquet),
    "hf": Source(_hf_parts, _hf),
}
