"""Tables with a column `text`, of which each row is a document: Parquet files and Hugging Face datasets."""

import os
from collections.abc import Iterator
from typing import Any

from lowbit_dist.documents.part import FileRange, checked_text
from lowbit_dist.errors import ConfigError

ROWS = 10_000  # of a Hugging Face dataset in a part


def parquet_parts(path: str) -> Iterator[FileRange]:
    stamp = os.stat(path).st_mtime_ns
    file = _parquet_file(path)
    for group in range(file.num_row_groups):
        size = file.metadata.row_group(group).total_byte_size
        yield FileRange("parquet", path, group, group + 1, size, stamp)


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


def parquet_documents(part: FileRange) -> Iterator[str]:
    from pyarrow import ArrowException

    file = _parquet_file(part.path)
    row = sum(file.metadata.row_group(group).num_rows for group in range(part.start))
    try:
        for batch in file.iter_batches(256, row_groups=[part.start], columns=["text"]):
            for value in batch.column(0):
                row += 1
                text = value.as_py()
                yield checked_text(text, f"it is {type(text).__name__}")
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


def hf_parts(given: str) -> Iterator[FileRange]:
    dataset = _hf_dataset(given)
    if "text" not in dataset.column_names:
        raise ConfigError(
            f"--input ({given}) has no column 'text'; its columns are {', '.join(dataset.column_names)[:100]}"
        )
    row_bytes = (dataset.dataset_size or 0) // max(1, len(dataset)) or 1000
    for start in range(0, len(dataset), ROWS):
        stop = min(start + ROWS, len(dataset))
        yield FileRange("hf", given, start, stop, (stop - start) * row_bytes)


def hf_documents(part: FileRange) -> Iterator[str]:
    dataset = _hf_dataset(part.path)
    for start in range(part.start, part.stop, 256):
        for k, text in enumerate(dataset[start : min(start + 256, part.stop)]["text"]):
            try:
                yield checked_text(text, f"it is {type(text).__name__}")
            except ValueError as error:
                raise ConfigError(f"{part.path} row {start + k + 1:,} {error}") from None
