"""What verbs have in common: their arguments, and how they become a configuration."""

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from lowbit_dist.config import RunConfig

Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="The run's YAML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE...", help="Fields to set, by dotted name.", show_default=False),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Inputs = Annotated[
    list[str],
    typer.Option(
        "--input",
        metavar="PATH...",
        help="Text, .jsonl, .json, .csv, .tsv (also .gz, .zst), .parquet; folders, hf:NAME, or stdlib.",
        show_default=False,
    ),
]
TextField = Annotated[
    str, typer.Option("--field", metavar="NAME", help="The text's name in JSON, tables and data sets.")
]


def _unescaped(text: str | None) -> str | None:
    """`text` with line ends and tabs for what shells leave as they are typed."""
    marks = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\"}
    return None if text is None else re.sub(r"\\([nrt\\])", lambda match: marks[match[1]], text)


Separator = Annotated[
    str | None,
    typer.Option(
        metavar="TEXT",
        help=r"Stands between the documents of a text file; \n is a line end.",
        show_default=False,
        callback=_unescaped,
    ),
]
OnBadRow = Annotated[
    str, typer.Option(metavar="skip|fail", help="What is done with a row that holds no text.")
]
RunOrCheckpoint = Annotated[
    str,
    typer.Argument(
        metavar="RUN_OR_CHECKPOINT",
        help="A run's name or folder, or a checkpoint's folder.",
        show_default=False,
    ),
]

RunOrFolder = Annotated[
    str,
    typer.Argument(
        metavar="RUN_OR_FOLDER",
        help="A run's name or folder, a checkpoint's folder, or a Hugging Face model's.",
        show_default=False,
    ),
]


def load(config: Path, overrides: list[str] | None) -> RunConfig:
    from lowbit_dist import configfile

    return configfile.load(config, overrides or [])


def pairs(rows: dict[str, Any]) -> Any:
    from lowbit_dist.cli import tables

    return lambda terminal: tables.pairs(terminal, rows)
