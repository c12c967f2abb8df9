"""Documents: the texts a corpus is made of, read from the sources a user names.

An input is `stdlib`, `hf:NAME[:CONFIG[:SPLIT]]`, a file, a folder (all of its files) or a quoted pattern
of files.  It is first cut into *parts*: pieces of a few MB that any process can read alone.  The cut and the
order depend on the input alone, so a corpus is the same sequence of documents for any number of workers.

A file is what its name says: JSON (.jsonl, .ndjson, .json), a table (.csv, .tsv, .parquet), else text; all
but .parquet also as .gz or .zst.  How documents are found in it is a `Reading`, which each part carries;
with the name of a prompt's field, a row is a prompt and the response to it.

Nothing is skipped in silence: what is missing, empty, truncated, binary or without text is a `ConfigError`
that names the file and the line, row or byte, and what is left out on purpose is counted in a `Tally`.  A
further source is one `Source` and its line in `SOURCES`.
"""

from __future__ import annotations

import functools
import glob
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lowbit_dist.documents import delimited, folders, jsonl, stream, tables, text
from lowbit_dist.documents.part import BAD_ROWS, BadRow, Document, FileRange, Reading, Tally
from lowbit_dist.errors import ConfigError

__all__ = [
    "SOURCES", "BadRow", "Document", "FileRange", "Reading", "Source", "Tally", "parts", "read",
    "read_prompted", "sample",
]  # fmt: skip

PROBED = 1 << 24  # bytes of text that are read before anything else is done with it
PROBE_SECONDS = 3.0
KINDS = {"jsonl": "jsonl", "ndjson": "jsonl", "json": "jsonl", "csv": "table", "tsv": "table"}
_INPUTS = "write stdlib, hf:NAME, or the path of text, .jsonl, .json, .csv, .tsv or .parquet"


@dataclass(frozen=True)
class Source:
    parts: Callable[[str, Reading], Iterable[FileRange]]
    documents: Callable[[FileRange, Tally], Iterator[Document]]


def parts(
    inputs: Iterable[str | Path], reading: Reading | None = None, tally: Tally | None = None
) -> list[FileRange]:
    """All parts of `inputs`, in the order of the corpus, once their beginnings are seen to be text.

    `tally` counts what of folders and patterns is left out.
    """
    reading = Reading() if reading is None else reading
    tally = Tally() if tally is None else tally
    _check(reading)
    ranges: list[FileRange] = []
    given = [str(source) for source in inputs]
    if not given or not all(map(str.strip, given)):  # as a variable of a shell that is not set
        raise ConfigError(f"--input is required; {_INPUTS}")
    for source in given:
        ranges += _parts_of(source, reading, tally)
    if not ranges:
        raise ConfigError(f"--input ({', '.join(given)}) holds no rows; {_INPUTS}")
    real_path = functools.cache(os.path.realpath)
    seen: dict[tuple[str, int], FileRange] = {}
    for part in ranges:
        if seen.setdefault((real_path(part.path), part.start), part) is not part:
            raise ConfigError(f"--input: {part.path} is read twice; name it once")
    _check_use(reading, {part.source for part in ranges})
    _probe([part for part in ranges if part.source not in ("stdlib", "hf")])
    return ranges


def _check(reading: Reading) -> None:
    if not reading.field:
        raise ConfigError("--field must not be empty; write the text's name, or leave it out")
    if reading.prompt_field in ("", reading.field):
        raise ConfigError(
            f"--prompt-field ({reading.prompt_field}) must name another field than --field, "
            f"{reading.field}; write the prompt's name, or leave it out"
        )
    if reading.separator == "":
        raise ConfigError("--separator must not be empty; write '<|endoftext|>', for example")
    if reading.on_bad_row not in BAD_ROWS:
        raise ConfigError(
            f"--on-bad-row ({reading.on_bad_row}) must be one of {', '.join(BAD_ROWS)}; write one of them"
        )


def _check_use(reading: Reading, sources: set[str]) -> None:
    if reading.separator is not None and "text" not in sources:
        raise ConfigError("--separator divides text files, and --input has none; leave it out")
    for name in reading.fields:
        if name != Reading().field and sources <= {"text", "stdlib"}:
            what = f"({name}) names the {'text' if name == reading.field else 'prompt'}"
            raise ConfigError(
                f"{reading.option(name)} {what} of JSON, tables and data sets, and --input has none; "
                "leave it out"
            )


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


def read(ranges: Iterable[FileRange], tally: Tally | None = None) -> Iterator[str]:
    """The documents of the parts, in order; empty ones included.  `tally` counts skipped rows."""
    return (document.text for document in read_prompted(ranges, tally))


def read_prompted(ranges: Iterable[FileRange], tally: Tally | None = None) -> Iterator[Document]:
    """The same documents, each as its prompt and what is to be learned."""
    tally = Tally() if tally is None else tally
    for part in ranges:
        try:
            for document in SOURCES[part.source].documents(part, tally):
                if part.reading.longest is None:
                    yield document
                else:
                    yield from _split(document, part.reading.longest)
        except OSError as error:
            raise ConfigError(
                f"{part.path} cannot be read: {error.strerror or error}; repair it or leave it out"
            ) from None


def _split(document: Document, longest: int) -> Iterator[Document]:
    """In pieces of at most `longest` bytes, of which the first ones may be of the prompt alone."""
    left = len(document.prompt or "")
    for piece in text.split(document.text, longest):
        yield Document(piece[left:], None if document.prompt is None else piece[:left])
        left = max(0, left - len(piece))


def sample(ranges: list[FileRange], n_bytes: int, tally: Tally | None = None) -> Iterator[str]:
    """About `n_bytes` of documents: all of them, or the beginnings of evenly spaced parts."""
    if sum(part.size for part in ranges) > n_bytes:
        n = min(len(ranges), 64)
        ranges = [ranges[i * len(ranges) // n] for i in range(n)]
    total = max(1, sum(part.size for part in ranges))
    left = 0
    for part in ranges:
        left += n_bytes * part.size // total  # what a part leaves goes to the next
        for document in read([part], tally):
            if left <= 0:
                break
            yield document
            left -= len(document.encode())


def _parts_of(given: str, reading: Reading, tally: Tally) -> list[FileRange]:
    if given == "stdlib" or given.startswith("hf:"):
        return list(SOURCES[given.partition(":")[0]].parts(given, reading))
    if "://" in given:
        raise ConfigError(f"--input ({given}) must be on this machine, or hf:NAME; copy it here first")
    path = Path(given)
    try:
        if path.is_dir():
            paths = _folder(path, tally)
        elif path.exists():
            if not path.is_file():
                raise ConfigError(f"--input ({given}) must be a file or a folder; write the path of one")
            if path.stat().st_size == 0:
                raise ConfigError(f"--input ({given}) is empty; leave it out")
            paths = [given]
        else:
            paths = _matches(given, tally)
        return [part for path in paths for part in SOURCES[_kind(path)].parts(path, reading)]
    except OSError as error:
        where = "" if error.filename in (None, given) else f" at {error.filename}"
        raise ConfigError(
            f"--input ({given}) cannot be read{where}: {error.strerror or error}; repair it or leave it out"
        ) from None


def _kind(path: str) -> str:
    if path.lower().endswith(".parquet"):
        return "parquet"
    return KINDS.get(stream.plain_name(path).rpartition(".")[2], "text")


def _folder(folder: Path, tally: Tally) -> list[str]:
    def why_left_out(name: str) -> str | None:
        return "hidden names" if name.startswith(".") else name if name == "__pycache__" else None

    walked = map(str, folders.walk(folder, why_left_out, tally.left_out))
    paths = [path for path in walked if folders.has_content(path, tally.left_out)]
    if not paths:
        raise ConfigError(f"--input ({folder}) has no file with text; write the path of one that has")
    return paths


def _matches(pattern: str, tally: Tally) -> list[str]:
    paths = sorted(glob.glob(pattern, recursive=True))
    files = [path for path in paths if not os.path.isdir(path)]
    if "**" not in pattern and len(files) < len(paths):
        tally.left_out["folders that a pattern names"] += len(paths) - len(files)
    files = folders.without_links(files, tally.left_out)
    if not paths:
        raise ConfigError(f"--input ({pattern}) does not exist; {_INPUTS}")
    if not (files := [path for path in files if folders.has_content(path, tally.left_out)]):
        raise ConfigError(f"--input ({pattern}) names no file with text; write the path of one that has")
    return files


SOURCES = {
    "stdlib": Source(text.stdlib_parts, text.documents),
    "text": Source(text.parts, text.documents),
    "jsonl": Source(jsonl.parts, jsonl.line_documents),
    "json": Source(jsonl.parts, jsonl.value_documents),
    "table": Source(delimited.parts, delimited.documents),
    "parquet": Source(tables.parquet_parts, tables.parquet_documents),
    "hf": Source(tables.hf_parts, tables.hf_documents),
}
