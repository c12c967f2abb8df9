"""The command line: a verb is a function, its docstring is its help.

Exit codes: 0 done, 1 failed, 2 wrong use or configuration, 129, 130 and 143 ended by SIGHUP, SIGINT and
SIGTERM.
"""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from lowbit_dist import folders
from lowbit_dist.cli import (
    benches,
    comparing,
    complaints,
    console,
    inference,
    jobs,
    progress,
    reference,
    ui,
    watching,
)  # fmt: skip
from lowbit_dist.cli.arguments import (
    Config,
    Inputs,
    Json,
    OnBadRow,
    Overrides,
    PromptField,
    RunOrCheckpoint,
    Separator,
    TextField,
    at_home,
    load,
    not_read,
    pairs,
    vocabulary,
)  # fmt: skip
from lowbit_dist.cli.exporting import export
from lowbit_dist.cli.quantizing import quantize
from lowbit_dist.config import ConfigError

# In the order of the work, which is that of the help.
VERBS = (
    "doctor", "tokenizer", "data", "plan", "train", "watch", "runs", "compare", "ui", "eval", "generate",
    "chat", "serve", "quantize", "export", "inspect", "sweep", "submit", "status", "logs", "stop", "bench",
    "config",
)  # fmt: skip


class InTheOrderOfTheWork(TyperGroup):
    def list_commands(self, ctx: Any) -> list[str]:
        """Verbs as `VERBS` has them, any other behind them."""
        return sorted(super().list_commands(ctx), key=lambda verb: [*VERBS, verb].index(verb))


app = typer.Typer(
    cls=InTheOrderOfTheWork,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    help="Train language models whose weights exist only as packed low-bit codes, on any number of workers.",
    epilog="Begin with: lowbit doctor. The help of each verb shows an example.",
)
tokenizer_app = typer.Typer(no_args_is_help=True, help="Make a tokenizer.")
data_app = typer.Typer(no_args_is_help=True, help="Prepare training data.")
bench_app = typer.Typer(no_args_is_help=True, help="Run the project's benchmarks, each against a peer.")
app.add_typer(tokenizer_app, name="tokenizer")
app.add_typer(data_app, name="data")
app.add_typer(bench_app, name="bench")
app.command()(jobs.submit)
app.command()(jobs.status)
app.command()(jobs.logs)
app.command()(jobs.stop)
app.command()(comparing.sweep)
app.command()(comparing.compare)
app.command("runs")(comparing.list_runs)
app.command()(watching.watch)
app.command()(ui.ui)
app.command("eval")(inference.evaluate)
app.command()(inference.generate)
app.command()(inference.chat)
app.command()(inference.serve)
app.command()(reference.config)
app.command()(quantize)
app.command()(export)
bench_app.command("update")(benches.update)
for benchmark in (benches.linear, benches.gather, benches.step, benches.train, benches.infer):
    bench_app.command()(benchmark)


def _version(is_asked: bool) -> None:
    if is_asked:
        print(f"lowbit-dist {sys.modules['lowbit_dist'].__version__}")
        raise typer.Exit()


@app.callback()
def before_the_verb(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """What stands before a verb."""


@tokenizer_app.command("train")
def tokenizer_train(
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


@data_app.command("prepare")
def data_prepare(
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


@app.command()
def plan(
    config: Config,
    overrides: Overrides = None,
    workers: Annotated[
        int | None, typer.Option(metavar="N", help="Plan for so many workers, instead of cluster.workers.")
    ] = None,
    vocab_size: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Plan for so many pieces, instead of the prepared data's.",
            show_default=False,
        ),
    ] = None,
    gpus: Annotated[
        str | None,
        typer.Option(
            metavar="N,...",
            help="Predict speed, traffic and memory on so many GPUs instead, such as 8,64,1024.",
            show_default=False,
        ),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(metavar="KIND", help="Of this kind: H100 if not given, H200, A100 or B200."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show the memory that a run and two baselines need, by component, before anything is started.

    With --gpus: how fast it would be on GPUs, by a cost model; predicted, never measured.

    Example: lowbit plan configs/quickstart.yaml --workers 4 model.preset=7b --vocab-size 32000
    """
    with console.answering(as_json, "planning") as answer:
        from lowbit_dist import memory, model, products
        from lowbit_dist.cli import predicting, tables

        numbers, kind = predicting.gpus(gpus, gpu, workers)
        more = [] if workers is None else [f"cluster.workers={workers}"]
        loaded = load(config, [*(overrides or []), *more])
        if numbers:
            predicting.check(loaded, numbers, kind)
        n_pieces, used = vocabulary(loaded, vocab_size)
        model.check(loaded, n_pieces, used=used)
        products.check(loaded, n_pieces)
        if numbers:
            from lowbit_dist import cost

            predicted = cost.plan(loaded, n_pieces, numbers, cost.GPUS[kind])
            answer(predicted, lambda terminal: predicting.table(terminal, predicted))
            return
        estimate = memory.plan(loaded, n_pieces) | memory.fits_here(loaded, n_pieces)
        answer(estimate, lambda terminal: tables.memory_table(terminal, estimate))


@app.command()
def train(config: Config, overrides: Overrides = None, as_json: Json = False) -> None:
    """Train a run, or resume one of the same name, on this machine or the Ray cluster at RAY_ADDRESS.

    Example: lowbit train configs/quickstart.yaml train.steps=50 run.name=first
    """
    with console.answering(as_json, "loading") as answer:
        from lowbit_dist import cluster
        from lowbit_dist.cli import tables

        loaded = load(config, overrides)
        try:
            with progress.following(loaded, answer.waiting) as told:
                summary = cluster.launch(loaded, progress=told)
        except cluster.Stopped as stopped:
            print(
                f"lowbit: stopped by {stopped}; the same command resumes from the newest checkpoint in "
                f"{loaded.run_dir}",
                file=sys.stderr,
            )
            raise typer.Exit(128 + stopped.signum) from None
        answer(summary, lambda terminal: tables.summary(terminal, summary, loaded.tracking.mlflow))


@app.command()
def inspect(
    checkpoint: RunOrCheckpoint,
    verify: Annotated[bool, typer.Option("--verify", help="Read every file and compare its hash.")] = False,
    as_json: Json = False,
) -> None:
    """Show what a checkpoint holds: step, tokens, bytes by component, and the digest of its weights.

    The exit code is 1 if a file of it is damaged.

    Example: lowbit inspect quickstart@200 --verify
    """
    with console.answering(as_json, "reading") as answer:
        from lowbit_dist.cli import inspection, tables

        inspected = inspection.inspect(checkpoint, verify=verify)
        answer(inspected, lambda terminal: tables.inspection(terminal, inspected))
    if inspected["problems"]:
        raise typer.Exit(1)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what this machine can run and what is missing; the exit code is 1 if a training cannot run.

    Example: lowbit doctor --json
    """
    with console.answering(as_json, "examining") as answer:
        from lowbit_dist import doctor
        from lowbit_dist.cli import tables

        report = doctor.examine()
        answer(report, lambda terminal: tables.health(terminal, report))
    if not report["ok"]:
        raise typer.Exit(1)


def main() -> None:
    """The entry point: every failure is one line on stderr and an exit code."""
    folders.provide_home()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    _log_to_stderr()
    try:
        code = app(_repeated(sys.argv[1:]), prog_name="lowbit", standalone_mode=False)
    except ConfigError as error:
        code = _fail(str(error), 2)
    except KeyboardInterrupt:
        code = _fail("interrupted", 130)
    except console.ReaderGone:
        code = 0
    except Exception as error:
        if os.environ.get("LOWBIT_DEBUG") == "1":
            raise
        if getattr(error, "format_message", None) is not None:  # typer's own complaints about arguments
            code = _fail(complaints.of_arguments(error), 2)
        else:
            code = _fail(f"{type(error).__name__}: {error} (LOWBIT_DEBUG=1 shows where)", 1)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> int:
    if message:
        print(f"lowbit: {' '.join(message.split())}", file=sys.stderr)  # libraries' messages may be pages
    return code


def _repeated(arguments: list[str]) -> list[str]:
    """`--input A B C` as `--input A --input B --input C`, which is how options are parsed."""
    out: list[str] = []
    in_inputs = False
    for argument in arguments:
        if argument.startswith("-") and argument != "-":
            in_inputs = argument == "--input"
        elif in_inputs and out[-1] != "--input":
            out.append("--input")
        out.append(argument)
    return out


def _log_to_stderr() -> None:
    import logging

    logging.basicConfig(level=logging.WARNING, format="lowbit: %(message)s", stream=sys.stderr)
