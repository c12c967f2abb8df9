"""What verbs have in common: their arguments, and how they become a configuration."""

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
        help="Text files and folders, .jsonl(.gz, .zst), .parquet, hf:NAME, or stdlib.",
        show_default=False,
    ),
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
