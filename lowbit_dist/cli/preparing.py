"""The verbs that make what a training reads: a tokenizer, and data."""

from pathlib import Path
from typing import Annotated

import typer

from lowbit_dist.cli import console
from lowbit_dist.cli.arguments import (
    Inputs,
    Json,
    OnBadRow,
    PromptField,
    Separator,
    TextField,
    at_home,
    not_read,
    pairs,
)


def train_tokenizer(
    inputs: Inputs,
    out: Annotated[
        Path,
        typer.Option(metavar="DIR", help="Write this folder.", show_default=False, callback=at_home),
    ],
    vocab_size: Annotated[int, typer.Option(metavar="N", help="Number of pieces.")] = 4096,
    field: TextField = "text",
    separator: Separator = None,
    on_bad_row: OnBadRow = "fail",
    as_json: Json = False,
) -> None:
    """Learn a sentencepiece tokenizer (BPE with byte fallback) from text.

    Example: lowbit tokenizer train --input stdlib --vocab-size 4096 --out data/tokenizer
    """
    with console.answering(as_json, "learning the tokenizer") as answer:
        from lowbit_dist import documents, tokenizer

        reading, tally = documents.Reading(field, separator, on_bad_row), documents.Tally()
        trained = tokenizer.train(inputs, vocab_size, out, reading=reading, tally=tally)
        result = {"tokenizer": str(out), "vocab_size": trained.vocab_size, "sha256": trained.sha256}
        counts = tally.counts()
        answer(result | counts, pairs(result | not_read(counts)))


def prepare_data(
    inputs: Inputs,
    tokenizer: Annotated[
        Path,
        typer.Option(
            metavar="DIR",
            help="Use what `lowbit tokenizer train` has made, or a model's own tokenizer.json.",
            show_default=False,
            callback=at_home,
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(metavar="DIR", help="Write this folder.", show_default=False, callback=at_home),
    ],
    seq_len: Annotated[int, typer.Option(metavar="N", help="Tokens of a sample.")] = 256,
    workers: Annotated[
        int | None, typer.Option(metavar="N", help="Processes that tokenise; all cores if not given.")
    ] = None,
    val_fraction: Annotated[float, typer.Option(metavar="X", help="Share of documents held out.")] = 0.02,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the choice of documents held out.")] = 0,
    field: TextField = "text",
    prompt_field: PromptField = None,
    separator: Separator = None,
    on_bad_row: OnBadRow = "fail",
    as_json: Json = False,
) -> None:
    """Tokenise documents into hashed training and validation shards.

    Example: lowbit data prepare --input stdlib --tokenizer data/tokenizer --out data/stdlib
    """
    with console.answering(as_json, "preparing") as answer:
        from lowbit_dist import data

        manifest = data.prepare(
            inputs, tokenizer, out, seq_len=seq_len, workers=workers, val_fraction=val_fraction, seed=seed,
            field=field, prompt_field=prompt_field, separator=separator, on_bad_row=on_bad_row,
            bar=answer.waiting.bar,
        )  # fmt: skip
        splits = {
            name: "{tokens:,} tokens in {samples:,} samples, {documents:,} documents".format(**split)
            for name, split in manifest["splits"].items()
        }
        entropy = f"{manifest['unigram_entropy']:.4f} nats per token"
        known = data.Manifest(**manifest)
        marks = known.marks.in_words()
        rows = {"data": out, **splits, "between documents": marks, "unigram entropy": entropy}
        if known.prompt_field is not None:
            shares = (f"{split.counted_share:.1%} of {name}" for name, split in known.splits.items())
            rows["counted by the loss"] = f"{' and '.join(shares)}, the tokens of responses"
            n = sum(split.dropped_tokens // known.seq_len for split in known.splits.values())
            rows["prompts alone"] = f"{n:,} samples, left out"
        answer({"data": str(out), **manifest}, pairs(rows | not_read(manifest)))
