"""JSON: lines, or a list, or single objects; the field `text` of an object, or a string, is a document."""

from __future__ import annotations

import codecs
import json
import os
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from lowbit_dist.documents import stream, text
from lowbit_dist.documents.part import (
    LONGEST,
    BadRow,
    Document,
    FileRange,
    Reading,
    Tally,
    document_of_json,
)
from lowbit_dist.errors import ConfigError

_BLANK = re.compile(r"[ \t\r\n]*")
# Whole numbers are no text, and Python limits the digits of those that it converts exactly.
_DECODER = json.JSONDecoder(parse_int=float)


def parts(path: str, reading: Reading) -> Iterator[FileRange]:
    """Ranges of lines, which any process finds; of a .json that is no lines, one."""
    if not stream.plain_name(path).endswith(".json") or _begins_as_lines(path):
        yield from text.parts(path, reading, "jsonl")
    else:
        status = os.stat(path)
        yield FileRange("json", path, 0, status.st_size, status.st_size, status.st_mtime_ns, reading)


def _begins_as_lines(path: str) -> bool:
    with stream.opened(path) as file:
        if file.read(stream.CHUNK).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
            return False  # a list may be one line that is longer than memory
    with stream.opened(path) as file:
        while line := stream.line(file, path):
            if line.strip():
                try:
                    _parsed(line)
                except ValueError:
                    return False
                return True
    return False


def line_documents(part: FileRange, tally: Tally) -> Iterator[Document]:
    for k, line in enumerate(stream.lines(part)):
        if line.strip():
            try:
                document = document_of_json(_parsed(line), part.reading)
            except ValueError as error:
                tally.bad_row(part.reading, BadRow(part.path, "line", k + 1, str(error), part.start))
            else:
                yield document


def _parsed(line: bytes) -> Any:
    """The JSON value of a line; ValueError says why there is none."""
    try:
        return _DECODER.decode(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 text at its byte {error.start:,}; convert the file") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON ({error.msg} at its character {error.pos:,}); repair it") from None
    except RecursionError:
        raise ValueError("is JSON nested too deeply; repair it") from None


def value_documents(part: FileRange, tally: Tally) -> Iterator[Document]:
    for k, value in enumerate(_values(part.path)):
        try:
            document = document_of_json(value, part.reading)
        except ValueError as error:
            tally.bad_row(part.reading, BadRow(part.path, "item", k + 1, str(error)))
        else:
            yield document


def _values(path: str) -> Iterator[Any]:
    """The items of a file's list, or its values one after another; one of them is held at a time."""
    with stream.opened(path) as file:
        source = _Source(file, path)
        is_list = source.peek() == "["
        if is_list:
            source.place += 1
            if source.peek() == "]":
                return
        while is_list or source.peek():
            yield source.value()
            if is_list:
                mark = source.peek()
                if mark not in ("", ",", "]"):
                    raise source.mistake(f"is followed by {mark!r}, not by ',' or ']'; repair the file")
                source.place += len(mark)
                if mark == "]":
                    break
        if is_list and source.peek():
            raise ConfigError(f"{path} has more text behind the end of its list; repair the file")


class _Source:
    """The text of a JSON file from `place` on, as much of it as is needed."""

    def __init__(self, file: BinaryIO, path: str):
        self.file, self.path = file, path
        self.decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self.text, self.place, self.is_all = "", 0, False
        self.n_bytes = self.n_values = 0

    def peek(self) -> str:
        """The next character that is no blank; nothing at the end of the file."""
        while True:
            match = _BLANK.match(self.text, self.place)
            self.place = match.end() if match else self.place
            if self.place < len(self.text) or self.is_all:
                return self.text[self.place : self.place + 1]
            self._read_more()

    def value(self) -> Any:
        self.n_values += 1
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.place)
                # A number at the end of what is read may go on.
                if end < len(self.text) or self.is_all:
                    self.place = end
                    return value
            except json.JSONDecodeError as error:
                is_cut = error.pos == len(self.text) or error.msg.startswith("Unterminated string")
                if self.is_all and is_cut:
                    raise self.mistake("ends with the file, in its middle; copy the file again") from None
                # A word or an escape that is cut is named where it begins.
                if self.is_all or not (is_cut or error.pos > len(self.text) - 12):
                    place = error.pos - self.place
                    raise self.mistake(
                        f"is not JSON ({error.msg} at its character {place:,}); repair it"
                    ) from None
            except RecursionError:
                raise self.mistake("is JSON nested too deeply; repair it") from None
            if len(self.text) - self.place > LONGEST:
                raise self.mistake(f"is longer than {LONGEST:,} characters; divide it, or write JSON lines")
            self._read_more()

    def mistake(self, what: str) -> ConfigError:
        return ConfigError(f"{self.path} item {self.n_values:,} {what}")

    def _read_more(self) -> None:
        """As much again as is there, so that a long value is tried few times."""
        rest = self.text[self.place :]
        data = self.file.read(max(stream.CHUNK, len(rest)))
        try:
            self.text, self.place, self.is_all = rest + self.decode(data, final=not data), 0, not data
        except UnicodeDecodeError as error:
            start = self.n_bytes + len(data) - len(error.object) + error.start
            raise ConfigError(
                f"{self.path}: byte {start:,} is not UTF-8 text; convert the file or leave it out"
            ) from None
        self.n_bytes += len(data)
