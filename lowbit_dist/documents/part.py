"""A part of an input: what one process reads alone, how it is read, and what of it is left out."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lowbit_dist.errors import ConfigError

LONGEST = 1 << 28  # bytes of one document, line, cell or JSON value: what a process holds in memory at once
BAD_ROWS = ("fail", "skip")


class Document(NamedTuple):
    """A text, or a prompt and the response to it."""

    response: str  # what is learned: all of a text
    prompt: str | None = None  # what stands before it and is given

    @property
    def text(self) -> str:
        """Both, with nothing between them."""
        return (self.prompt or "") + self.response


class Reading(NamedTuple):
    """How documents are found in what is read."""

    field: str = "text"  # the text's name in JSON, Parquet and tables
    separator: str | None = None  # stands between the documents of a text file
    on_bad_row: str = "fail"  # one of BAD_ROWS: what is done with a row that holds no text
    longest: int | None = None  # bytes; a longer document is split
    prompt_field: str | None = None  # the prompt's name in JSON, Parquet and tables, if there is one

    @property
    def fields(self) -> list[str]:
        """The names of what a document is made of, in its order."""
        return [*filter(None, [self.prompt_field]), self.field]

    def option(self, name: str) -> str:
        """What names a field."""
        return "--field" if name == self.field else "--prompt-field"


class FileRange(NamedTuple):
    """A piece of an input.  `start` and `stop` are bytes, row groups or rows, as its source has them."""

    source: str  # a key of documents.SOURCES
    path: str
    start: int
    stop: int
    size: int  # bytes on disk, for progress and for balance
    stamp: int = 0  # time of the file's last change, ns; of a data set a hash of its fingerprint
    reading: Reading = Reading()

    @classmethod
    def of_json(cls, fields: Sequence[Any]) -> FileRange:
        return cls(*fields[:-1])._replace(reading=Reading(*fields[-1]))


class BadRow(NamedTuple):
    """A row that holds no text: where it is, and what is wrong with it."""

    path: str
    kind: str  # line, row or item
    number: int  # from 1, of those that begin at byte `start` of the file or behind it
    mistake: str
    start: int = 0

    def in_words(self) -> str:
        """Lines before `start` are counted only now, for that reads the file up to there."""
        number = self.number + lines_before(self.path, self.start)
        return f"{self.path} {self.kind} {number:,} {self.mistake}"


def lines_before(path: str, start: int) -> int:
    """How many lines begin before byte `start`."""
    if not start:
        return 0
    n_lines, left = 1, start - 1
    with open(path, "rb") as file:
        while left and (data := file.read(min(left, 1 << 20))):
            n_lines += data.count(b"\n")
            left -= len(data)
    return n_lines


@dataclass
class Tally:
    """What was not read, counted for whoever says so."""

    left_out: Counter[str] = field(default_factory=Counter)  # files and folders, by the reason
    skipped_rows: int = 0
    first: BadRow | None = None  # of the skipped rows

    @property
    def first_skipped(self) -> str | None:
        """In words."""
        return None if self.first is None else self.first.in_words()

    def counts(self) -> dict[str, Any]:
        """As answers and manifests have them."""
        return {
            "skipped_rows": self.skipped_rows,
            "first_skipped_row": self.first_skipped,
            "left_out": dict(self.left_out),
        }

    def bad_row(self, reading: Reading, row: BadRow, n_rows: int = 1) -> None:
        """Count a row without text, which may have swallowed others, or raise the mistake, as the reading
        says.
        """
        if reading.on_bad_row == "fail":
            raise ConfigError(f"{row.in_words()}, or leave such rows out with --on-bad-row skip")
        self.skip(n_rows, row)

    def skip(self, n_rows: int, first: BadRow | None) -> None:
        self.skipped_rows += n_rows
        self.first = self.first or first

    @contextlib.contextmanager
    def naming_skipped(self) -> Iterator[None]:
        """A mistake for which skipped rows may be the cause says so."""
        try:
            yield
        except ConfigError as error:
            if not self.skipped_rows:
                raise
            skipped = f"{self.skipped_rows:,} rows were skipped, the first: {self.first_skipped}"
            raise ConfigError(f"{error} ({skipped})") from None


def document_of_json(row: Any, reading: Reading) -> Document:
    """The document of a JSON value: a string, or fields of an object; ValueError says what it has."""
    if isinstance(row, str) and reading.prompt_field is None:
        return document_of([row], reading)
    if not isinstance(row, dict):
        fields = ", ".join(f'"{name}": "..."' for name in reading.fields)
        raise ValueError(f"is not a JSON object but {_kind(row)}; write {{{fields}}}")
    return document_of([row.get(name) for name in reading.fields], reading, row)


def document_of(values: Iterable[Any], reading: Reading, row: dict[str, Any] | None = None) -> Document:
    """The document of a row's values of `reading.fields`; ValueError unless all are text that UTF-8 has."""
    *prompt, response = (
        _checked_text(value, name, row, reading.option(name))
        for name, value in zip(reading.fields, values, strict=True)
    )
    return Document(response, *prompt)


def _checked_text(text: Any, name: str, row: dict[str, Any] | None, option: str) -> str:
    if not isinstance(text, str):
        instead = [] if row is not None and name not in row else [f"it is {_kind(text)}"]
        instead += [] if row is None else [f"its fields are {listed(row)}"]
        raise ValueError(
            f"has no text in a field '{name}' ({', '.join(instead)}); write {option} NAME, rename the field"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"has half a surrogate pair at character {error.start:,} of its text; repair it"
        ) from None
    return text


def columns_of(names: Sequence[str], part: str, reading: Reading) -> list[int]:
    """The places of the columns `reading.fields`; ConfigError names the columns that `part` has instead."""
    for name in reading.fields:
        if list(names).count(name) != 1:
            has = f"{list(names).count(name)} columns" if name in names else "no column"
            raise ConfigError(
                f"{part} has {has} '{name}'; its columns are {listed(names)}; "
                f"write {reading.option(name)} NAME"
            )
    return [list(names).index(name) for name in reading.fields]


def listed(names: Any) -> str:
    text = "".join(c if c.isprintable() else "?" for c in ", ".join(map(str, names))) or "none"
    return text if len(text) <= 100 else f"{text[:100]}..."


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    names = {
        str: "text", list: "a list", dict: "an object", bool: "true or false", int: "a number",
        float: "a number",
    }  # fmt: skip
    return names.get(type(value), type(value).__name__)
