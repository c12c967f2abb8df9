"""Documents: the texts a corpus is made of, read from the sources a user names.

An input is `stdlib`, `hf:NAME[:CONFIG[:SPLIT]]`, a file, a folder (all of its files) or a quoted pattern
of files.  It is first cut into *parts*: pieces of a few MB that any process can read alone.  The cut and the
order depend on the input alone, so a corpus is the same sequence of documents for any number of workers.

Nothing is skipped in silence: what is missing, empty, truncated, binary or without text is a `ConfigError`
that names the file and the line, row or byte.  A further source is one `Source` and its line in `SOURCES`.
"""

from __future__ import annotations

import glob
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lowbit_dist.documents import jsonl, tables, text
from lowbit_dist.documents.part import FileRange
from lowbit_dist.errors import ConfigError

PROBED = 1 << 24  # bytes of text that are read before anything else is done with it
PROBE_SECONDS = 3.0
_INPUTS = "write stdlib, hf:NAME, or the path of text, .jsonl or .parquet"


@dataclass(frozen=True)
class Source:
    parts: Callable[[str], Iterable[FileRange]]
    documents: Callable[[FileRange], Iterator[str]]


def parts(inputs: Iterable[str | Path]) -> list[FileRange]:
    """All parts of `inputs`, in the order of the corpus, once their beginnings are seen to be text."""
    ranges: list[FileRange] = []
    for given in inputs:
        ranges += _parts_of(str(given))
    if not ranges:
        raise ConfigError(f"--input is required; {_INPUTS}")
    seen: dict[tuple[str, str, int], FileRange] = {}
    for part in ranges:
        if seen.setdefault((part.source, part.path, part.start), part) is not part:
            raise ConfigError(f"--input: {part.path} is read twice; name it once")
    _probe([part for part in ranges if part.source in ("text", "jsonl", "parquet")])
    return ranges


def _probe(ranges: list[FileRange]) -> None:
    """ConfigError for a mistake at the beginning of any part, or anywhere in a small corpus.

    So it is answered before any process is started.  A mistake deep in a large corpus is answered by
    whichever process reads it.
    """
    quota = max(text.PIECE, PROBED // max(1, len(ranges)))
    deadline = time.monotonic() + PROBE_SECONDS
    for part in ranges:
        left = quota
        for document in read([part]):
            left -= len(document)
            if time.monotonic() > deadline:
                return
            if left <= 0:
                break


def read(ranges: Iterable[FileRange]) -> Iterator[str]:
    """The documents of the parts, in order; empty ones included."""
    for part in ranges:
        try:
            yield from SOURCES[part.source].documents(part)
        except OSError as error:
            raise ConfigError(
                f"{part.path} cannot be read: {error.strerror or error}; repair it or leave it out"
            ) from None


def sample(ranges: list[FileRange], n_bytes: int) -> Iterator[str]:
    """About `n_bytes` of documents: all of them, or the beginnings of evenly spaced parts."""
    if sum(part.size for part in ranges) > n_bytes:
        n = min(len(ranges), 64)
        ranges = [ranges[i * len(ranges) // n] for i in range(n)]
    quota = n_bytes // len(ranges)
    left = 0
    for part in ranges:
        left += quota  # what a short part leaves goes to the next
        for document in read([part]):
            if left <= 0:
                break
            yield document
            left -= len(document.encode())


def _parts_of(given: str) -> list[FileRange]:
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
        matches = [path for path in sorted(glob.glob(given, recursive=True)) if os.path.isfile(path)]
    except OSError as error:
        raise ConfigError(
            f"--input ({given}) cannot be read: {error.strerror or error}; repair it or leave it out"
        ) from None
    if not matches:
        raise ConfigError(f"--input ({given}) does not exist; {_INPUTS}")
    return [part for path in matches for part in SOURCES[_kind(Path(path))].parts(path)]


def _kind(path: Path) -> str:
    name = path.name.lower()
    if name.endswith((".jsonl", ".jsonl.gz", ".jsonl.zst")):
        return "jsonl"
    return "parquet" if name.endswith(".parquet") else "text"


def _folder(folder: Path) -> list[FileRange]:
    ranges = [
        part
        for path in text.walk(folder, lambda name: name.startswith(".") or name == "__pycache__")
        if path.stat().st_size
        for part in SOURCES[_kind(path)].parts(str(path))
    ]
    if not ranges:
        raise ConfigError(f"--input ({folder}) has no file with text; write the path of one that has")
    return ranges


SOURCES = {
    "stdlib": Source(text.stdlib_parts, text.documents),
    "text": Source(text.parts, text.documents),
    "jsonl": Source(jsonl.parts, jsonl.documents),
    "parquet": Source(tables.parquet_parts, tables.parquet_documents),
    "hf": Source(tables.hf_parts, tables.hf_documents),
}
