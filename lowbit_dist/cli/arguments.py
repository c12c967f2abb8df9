"""What verbs have in common: their arguments, and how they become a configuration."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from lowbit_dist import naming
from lowbit_dist.config import ConfigError, RunConfig
from lowbit_dist.section import from_home


def at_home(value: Any) -> Any:
    """The callback of whatever takes paths: `~` is written out, as no shell does in `--out=~/x`."""
    if isinstance(value, list | tuple):
        return [at_home(item) for item in value]
    if value is None:
        return None
    try:
        return type(value)(from_home(str(value)))
    except ValueError as error:
        raise ConfigError(f"the path {value} {error}") from None


def run_names(incomplete: str) -> list[str]:
    """For the shell's completion."""
    return [name for name in naming.names() if name.startswith(incomplete)]


Config = Annotated[
    Path,
    typer.Argument(metavar="CONFIG", help="The run's YAML file.", show_default=False, callback=at_home),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE...",
        help="Set these fields, by their dotted names; lowbit config lists them.",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Inputs = Annotated[
    list[str],
    typer.Option(
        "--input",
        metavar="PATH...",
        help="Read text, .jsonl, .json, .csv, .tsv (also .gz, .zst), .parquet, folders, hf:NAME, or stdlib.",
        show_default=False,
        callback=at_home,
    ),
]
TextField = Annotated[
    str,
    typer.Option(
        "--field", metavar="NAME", help="Take the text of JSON, tables and data sets from this field."
    ),
]
PromptField = Annotated[
    str | None,
    typer.Option(
        "--prompt-field",
        metavar="NAME",
        help="Put this field before the text, as a prompt: the loss leaves its tokens out.",
        show_default=False,
    ),
]


def _unescaped(text: str | None) -> str | None:
    """`text` with line ends and tabs for what shells leave as they are typed."""
    marks = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\"}
    return None if text is None else re.sub(r"\\([nrt\\])", lambda match: marks[match[1]], text)


Separator = Annotated[
    str | None,
    typer.Option(
        metavar="TEXT",
        help=r"Divide text files into documents where this stands; \n is a line end.",
        show_default=False,
        callback=_unescaped,
    ),
]
OnBadRow = Annotated[str, typer.Option(metavar="skip|fail", help="Skip a row that holds no text, or fail.")]
RunOrCheckpoint = Annotated[
    str,
    typer.Argument(
        metavar="RUN_OR_CHECKPOINT",
        help="A run's name or folder, RUN@STEP, or a checkpoint's folder.",
        show_default=False,
        callback=at_home,
        autocompletion=run_names,
    ),
]
RunOrFolder = Annotated[
    str,
    typer.Argument(
        metavar="RUN_OR_FOLDER",
        help="A run's name or folder, RUN@STEP, a checkpoint's folder, or a Hugging Face model's.",
        show_default=False,
        callback=at_home,
        autocompletion=run_names,
    ),
]


def load(config: Path, overrides: list[str] | None) -> RunConfig:
    from lowbit_dist import configfile

    return configfile.load(config, overrides or [])


def not_read(counts: Mapping[str, Any]) -> dict[str, str]:
    """What of the inputs was not read, or read in pieces, in words; nothing if there is no such thing."""
    words = {}
    if longest := counts.get("longest_document"):
        words["split"] = f"documents of more than {longest:,} bytes, since there are few"
    if n := counts.get("empty_documents"):
        words["empty documents"] = f"{n:,}, left out"
    if n := counts["skipped_rows"]:
        words["skipped rows"] = f"{n:,}, the first: {counts['first_skipped_row']}"
    if left_out := counts["left_out"]:
        words["left out"] = ", ".join(f"{reason} ({n:,})" for reason, n in left_out.items())
    return words


def pairs(rows: dict[str, Any]) -> Any:
    from lowbit_dist.cli import tables

    return lambda terminal: tables.pairs(terminal, rows)


def vocabulary(config: RunConfig, given: int | None) -> tuple[int, int | None]:
    """The number of the tokenizer's tokens, and of the first ones that are all that prepared data has."""
    from lowbit_dist import data

    if given is not None:
        if given < 1:
            raise ConfigError(f"--vocab-size ({given}) must be at least 1; write 32000, for example")
        return given, None
    try:
        manifest = data.read_manifest(config.data.path)
        return manifest.vocab_size, manifest.used
    except ConfigError as error:
        raise ConfigError(f"{error}; or plan without data: --vocab-size 32000") from None
