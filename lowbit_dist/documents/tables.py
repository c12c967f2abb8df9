"""Tables with a column `text`, of which each row is a document: Parquet files and Hugging Face datasets."""

import hashlib
import os
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from lowbit_dist.documents.part import (
    BadRow,
    Document,
    FileRange,
    Reading,
    Tally,
    columns_of,
    document_of,
    listed,
)
from lowbit_dist.errors import ConfigError

ROWS = 10_000  # of a Hugging Face dataset in a part


def parquet_parts(path: str, reading: Reading) -> Iterator[FileRange]:
    stamp = os.stat(path).st_mtime_ns
    file = _parquet_file(path, reading)
    for group in range(file.num_row_groups):
        size = file.metadata.row_group(group).total_byte_size
        yield FileRange("parquet", path, group, group + 1, size, stamp, reading)


def _parquet_file(path: str, reading: Reading) -> Any:
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
    schema = file.schema_arrow
    for column in columns_of(schema.names, path, reading):
        name, kind = schema.names[column], str(schema.field(column).type)
        if not kind.startswith(("string", "large_string", "dictionary<values=string", "null")):
            raise ConfigError(
                f"{path}: its column '{name}' is {kind}, not text; its columns are {listed(schema.names)}; "
                f"write {reading.option(name)} NAME"
            )
    return file


def parquet_documents(part: FileRange, tally: Tally) -> Iterator[Document]:
    from pyarrow import ArrowException

    fields = part.reading.fields
    file = _parquet_file(part.path, part.reading)
    row = sum(file.metadata.row_group(group).num_rows for group in range(part.start))
    try:
        for batch in file.iter_batches(256, row_groups=[part.start], columns=fields):
            for values in zip(*(batch.column(name) for name in fields), strict=True):
                row += 1
                try:
                    document = document_of((value.as_py() for value in values), part.reading)
                except UnicodeDecodeError as error:
                    mistake = f"is not UTF-8 text at byte {error.start:,}; convert it"
                    tally.bad_row(part.reading, BadRow(part.path, "row", row, mistake))
                except ValueError as error:
                    tally.bad_row(part.reading, BadRow(part.path, "row", row, str(error)))
                else:
                    yield document
    except ArrowException as error:
        raise ConfigError(
            f"{part.path} is damaged after row {row:,}: {_first_line(error)}; copy it again"
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or ["?"])[0]


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
            f"--input ({given}) needs the package datasets, which is not installed; run: "
            "pip install 'lowbit-dist[hf]'"
        ) from None
    try:
        return datasets.load_dataset(name, configuration or None, split=split or "train")
    except Exception as error:  # the library raises many kinds: no network, no such name, no such split, ...
        raise ConfigError(
            f"--input ({given}) cannot be loaded: {_first_line(error)}; write another name, or a file's path"
        ) from None


def hf_parts(given: str, reading: Reading) -> Iterator[FileRange]:
    dataset = _hf_dataset(given)
    columns_of(dataset.column_names, f"--input ({given})", reading)
    row_bytes = (dataset.dataset_size or 0) // max(1, len(dataset)) or 1000
    for start in range(0, len(dataset), ROWS):
        stop = min(start + ROWS, len(dataset))
        yield FileRange("hf", given, start, stop, (stop - start) * row_bytes, _hf_stamp(dataset), reading)


def _hf_stamp(dataset: Any) -> int:
    """A hash of the fingerprint, by which the library itself knows what a data set holds."""
    return int.from_bytes(hashlib.sha256(str(dataset._fingerprint).encode()).digest()[:7], "little")


@lru_cache(maxsize=1)
def _hf_columns(given: str, stamp: int, names: tuple[str, ...]) -> Any:
    """The data set that `stamp` is of, without its other columns, such as pictures, which would be decoded;
    loaded once for all parts that a process reads.
    """
    dataset = _hf_dataset(given)
    if _hf_stamp(dataset) != stamp:
        raise ConfigError(f"--input ({given}) has changed while it was read; start again")
    return dataset.select_columns(list(names))


def hf_documents(part: FileRange, tally: Tally) -> Iterator[Document]:
    dataset = _hf_columns(part.path, part.stamp, tuple(part.reading.fields))
    for start in range(part.start, part.stop, 256):
        rows = dataset[start : min(start + 256, part.stop)]
        for k, values in enumerate(zip(*(rows[name] for name in part.reading.fields), strict=True)):
            try:
                document = document_of(values, part.reading)
            except ValueError as error:
                tally.bad_row(part.reading, BadRow(part.path, "row", start + k + 1, str(error)))
            else:
                yield document
