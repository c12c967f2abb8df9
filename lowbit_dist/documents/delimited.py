"""CSV and TSV: tables with a header, of which the column `text` of each row is a document.

Cells may be quoted as RFC 4180 has it, in a .tsv too, and then hold delimiters and line ends.  Where a row
begins is known only when all before it is read, so a file is read once to be cut into parts.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from typing import BinaryIO

from lowbit_dist.documents import stream, text
from lowbit_dist.documents.part import LONGEST, BadRow, Document, FileRange, Reading, Tally, columns_of
from lowbit_dist.errors import ConfigError


def parts(path: str, reading: Reading) -> Iterator[FileRange]:
    """Ranges of whole rows, once all rows are seen to be right; one of a compressed file."""
    status = os.stat(path)
    size, start = status.st_size, 0
    whole = FileRange("table", path, 0, size, size, status.st_mtime_ns, reading)
    if not stream.is_compressed(path):
        for _, stop in _rows(whole, Tally()):
            if stop - start >= text.PART and stop < size:
                yield whole._replace(start=start, stop=stop, size=stop - start)
                start = stop
    yield whole._replace(start=start, size=size - start)


def documents(part: FileRange, tally: Tally) -> Iterator[Document]:
    return (document for document, _ in _rows(part, tally) if document is not None)


def _rows(part: FileRange, tally: Tally) -> Iterator[tuple[Document | None, int]]:
    """The document of each row that begins in the part, None of a bad one, and the byte behind the row."""
    is_compressed = stream.is_compressed(part.path)
    with stream.opened(part.path) as file:
        table = _Table(file, part.path)
        header = table.header()
        columns = columns_of(header, part.path, part.reading)
        if part.start:
            table.seek(part.start)
        while is_compressed or table.place < part.stop:
            n_lines, document = table.n_lines, None
            try:
                row = table.row()
                if row is None:
                    return
                if not row:
                    continue  # an empty line
                document = _document(row, header, columns)
            except ValueError as error:
                bad_row = BadRow(part.path, "line", n_lines + 1, str(error), part.start)
                tally.bad_row(part.reading, bad_row, table.n_lines - n_lines)  # up to where a quote ends
            yield document, table.place


def _document(row: list[str], header: list[str], columns: list[int]) -> Document:
    if len(row) != len(header):
        raise ValueError(f"has {len(row)} cells, its header {len(header)}; quote cells that hold a delimiter")
    *prompt, response = cells = [row[column] for column in columns]
    for cell in cells:
        if "\0" in cell:
            raise ValueError("has a zero byte, so it is not text; leave it out")
        try:
            cell.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"is not UTF-8 text at character {error.start:,} of its text; convert it"
            ) from None
    return Document(response, *prompt)


class _Table:
    """Rows of cells, and how far into the file they have led."""

    def __init__(self, file: BinaryIO, path: str):
        csv.field_size_limit(LONGEST)  # of the whole process; without it 131,072 characters
        delimiter = "\t" if stream.plain_name(path).endswith(".tsv") else ","
        self.file, self.path = file, path
        self.place = self.n_lines = 0  # bytes and lines, those since the last `seek`
        self.reader = csv.reader(self._lines(), delimiter=delimiter, strict=True)

    def _lines(self) -> Iterator[str]:
        while data := stream.line(self.file, self.path):
            # What is not UTF-8 becomes surrogates, which matter in the text alone.
            decoded = data.decode(errors="surrogateescape")
            mark = "" if self.place else "\ufeff"
            self.place += len(data)
            self.n_lines += 1
            yield decoded.removeprefix(mark)

    def seek(self, place: int) -> None:
        self.file.seek(place)
        self.place, self.n_lines = place, 0

    def header(self) -> list[str]:
        try:
            while (row := self.row()) == []:
                pass
            "".join(row or []).encode()
        except ValueError as error:  # UnicodeEncodeError is one
            what = "is not UTF-8 text; convert the file" if isinstance(error, UnicodeError) else error
            raise ConfigError(f"{self.path}: its header {what}") from None
        return row or []

    def row(self) -> list[str] | None:
        """The next row, empty for an empty line, None at the end; ValueError for one that cannot be read."""
        line = self.n_lines
        try:
            return next(self.reader, None)
        except csv.Error as error:
            if "unexpected end of data" in str(error):
                raise ConfigError(
                    f"{self.path}: a quoted cell of its last row, which has {self.n_lines - line:,} lines, "
                    "does not end; close the quote, or copy the file again"
                ) from None
            where = f" in its line {self.n_lines - line:,}" if self.n_lines - line > 1 else ""
            raise ValueError(f"is not CSV ({error}{where}); quote its cells") from None
