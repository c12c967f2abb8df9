"""The verbs that run a trained model: `lowbit eval`, `generate`, `chat` and `serve`."""

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from lowbit_dist.cli import console
from lowbit_dist.cli.arguments import (
    Json,
    OnBadRow,
    RunOrFolder,
    Separator,
    TextField,
    at_home,
    not_read,
    pairs,
)
from lowbit_dist.errors import ConfigError

LINE = "{}"  # stands for what is typed
# How tokens are drawn.
Temperature = Annotated[
    float, typer.Option(metavar="X", help="Draw at this temperature; 0 takes the likeliest token always.")
]
TopK = Annotated[int, typer.Option(metavar="N", help="Draw from the N likeliest tokens; 0 draws from all.")]
TopP = Annotated[
    float, typer.Option(metavar="X", help="Draw from the likeliest tokens up to this probability.")
]
Seed = Annotated[int, typer.Option(metavar="N", help="Decides what is drawn.")]


def evaluate(
    run: RunOrFolder,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="DIR_OR_TEXT",
            help="Measure it on prepared data, or on text as for --input.",
            show_default=False,
            callback=at_home,
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="Measure it on tasks of lm-evaluation-harness instead, which the extra `eval` installs.",
            show_default=False,
        ),
    ] = None,
    task_folder: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Find tasks in the YAML files of this folder, too; functions that they name are run.",
            show_default=False,
            callback=at_home,
        ),
    ] = None,
    forward: Annotated[
        str | None,
        typer.Option(
            metavar="GRID",
            help="Round the weights to this grid first; one that they are on already changes nothing.",
            show_default=False,
        ),
    ] = None,
    forward_scale: Annotated[
        Literal["rms", "absmean"] | None,
        typer.Option(
            help="The size of its levels: that of the least error on Gaussian weights, as by default, "
            "or the mean of weights, as the authors of DQT evaluate 8-bit models.",
            show_default=False,
        ),
    ] = None,
    integer: Annotated[
        bool,
        typer.Option(
            "--integer",
            help="Multiply 8-bit integers with codes, on a CPU, where layers round their inputs: faster, and "
            "rounded otherwise than in training.",
        ),
    ] = False,
    samples: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Take so many samples; by default of prepared data the run's eval_samples, of others all.",
        ),
    ] = None,
    field: TextField = "text",
    separator: Separator = None,
    on_bad_row: OnBadRow = "fail",
    as_json: Json = False,
) -> None:
    """Measure loss, perplexity and bits per byte of a trained model, or its answers to tasks.

    Example: lowbit eval quickstart --data data/stdlib --json
    """
    with console.answering(as_json, "evaluating") as answer:
        from lowbit_dist import documents, trained
        from lowbit_dist.cli import tables

        if tasks is not None:
            given = {
                "--data": data, "--forward": forward, "--forward-scale": forward_scale,
                "--field": field != "text", "--separator": separator,
                "--on-bad-row": on_bad_row != "fail",
            }  # fmt: skip
            if others := [name for name, value in given.items() if value]:
                raise ConfigError(f"{others[0]} does not go with --tasks; leave one of them out")
            measured = _on_tasks(run, tasks, folder=task_folder, limit=samples, integer=integer)
            answer(measured, lambda terminal: tables.tasks(terminal, measured))
            return
        if data is None or task_folder is not None:
            wanted = (
                "--data (none) must name data or a text" if data is None else "--task-folder needs --tasks"
            )
            raise ConfigError(f"{wanted}; write --data PATH, or --tasks NAME")
        reading, tally = documents.Reading(field, separator, on_bad_row), documents.Tally()
        metrics = trained.open(run).evaluate(
            data, forward=forward, scale=forward_scale, integer=integer, n_samples=samples,
            reading=reading, tally=tally,
        )  # fmt: skip
        counts = tally.counts()
        answer(metrics | counts, pairs(tables.in_words(metrics) | not_read(counts)))


def _on_tasks(run: str, tasks: str, **options: Any) -> dict[str, Any]:
    from lowbit_dist import trained

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise ConfigError(f"--tasks ({tasks}) must be names with commas between them; write arc_easy,piqa")
    model = trained.open(run)
    try:
        from lowbit_dist import harness
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"--tasks ({tasks}) needs lm-evaluation-harness, of which {error.name} is not installed; install "
            "the package with its extra: pip install 'lowbit-dist[eval]'"
        ) from None
    return harness.run(model, names, **options)


def generate(
    run: RunOrFolder,
    prompt: Annotated[
        str, typer.Option(metavar="TEXT", help="What the text begins with.", show_default=False)
    ],
    max_new_tokens: Annotated[int, typer.Option(metavar="N", help="Stop after so many tokens.")] = 100,
    temperature: Temperature = 0.8,
    top_k: TopK = 50,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Continue a text: it and what follows it are printed as they are, while they are made.

    Example: lowbit generate quickstart --prompt "def main():" --max-new-tokens 60
    """
    with console.answering(as_json, "loading the model") as answer:
        from lowbit_dist import trained

        generated = trained.open(run).generate(
            prompt,
            max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed,
            stream=(lambda text: None) if as_json else answer.write,
        )  # fmt: skip
        answer(generated, lambda terminal: answer.end_line())


def chat(
    run: RunOrFolder,
    turn: Annotated[
        str,
        typer.Option(metavar="TEXT", help="Give the model each line so; {} stands for it, \\n for its end."),
    ] = "{}\\n",
    max_new_tokens: Annotated[
        int, typer.Option(metavar="N", help="Stop an answer after so many tokens.")
    ] = 200,
    temperature: Temperature = 0.8,
    top_k: TopK = 50,
    top_p: TopP = 1.0,
    seed: Seed = 0,
) -> None:
    """Talk with a model: each line is answered as the text goes on; Ctrl-C ends an answer, Ctrl-D the talk.

    The model reads all that was said so far, as much of its end as fits.

    Example: lowbit chat quickstart --turn "Question: {}\\nAnswer:" --max-new-tokens 60
    """
    around = turn.replace("\\n", "\n").replace("\\t", "\t")
    if LINE not in around:
        raise ConfigError(f"--turn ({turn}) must have {LINE}, for which a line stands; write {LINE}\\n")
    with console.answering(False, "loading the model") as answer:
        from lowbit_dist import generate, trained

        generate.check(max_new_tokens, temperature, top_k, top_p, seed)
        begin = around[: around.index(LINE)]
        talk = Talk(trained.open(run), max_new_tokens, stop=[begin] if begin.strip() else [])
        longest = talk.model.max_positions
        if longest is not None and max_new_tokens >= longest:
            raise ConfigError(
                f"--max-new-tokens ({max_new_tokens}) leaves no room for a line in the model's max_seq_len "
                f"{longest}; write {longest // 2}, for example"
            )
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="surrogateescape")  # one line that is no text spoils no other
        network = talk.model.network(integer=True)
        options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "network": network}
        answer.waiting.stop()
        for number, line in enumerate(iter(_line, None)):
            try:
                talk.add(around.replace(LINE, line), seed=seed + number, say=answer.write, **options)
            except ConfigError as error:
                print(f"lowbit: {error}", file=sys.stderr)
            except KeyboardInterrupt:
                pass
            answer.end_line()


def _line() -> str | None:
    """What is typed; None at its end."""
    while True:
        try:
            line = input("> ")
            line.encode()
            return line
        except EOFError:
            if sys.stdin.isatty():
                print()  # Ctrl-D leaves the cursor behind the prompt
            return None
        except UnicodeError:
            print("lowbit: a line must be text in UTF-8; write it so", file=sys.stderr)


class Talk:
    """What was said so far, in turns: each a line and its answer."""

    def __init__(self, model: Any, max_new_tokens: int, *, stop: list[str]):  # of a Trained
        self.model, self.max_new_tokens, self.stop = model, max_new_tokens, stop
        self.encode = model.tokenizer.encode
        self.turns: list[str] = []

    def add(self, text: str, *, say: Callable[[str], None], **options: Any) -> None:
        """Asks the model to go on after `text`; of an answer that is interrupted, what was said stays."""
        said: list[str] = []  # the prompt first

        def tell(piece: str) -> None:
            said.append(piece)
            if len(said) > 1:
                say(piece)

        self._forget(text)
        try:
            self.model.generate(
                "".join(self.turns) + text, max_new_tokens=self.max_new_tokens, stop=self.stop, stream=tell,
                **options,
            )  # fmt: skip
        finally:
            if said:
                answer = "".join(said[1:])
                self.turns.append(text + answer + ("" if answer.endswith("\n") else "\n"))

    def _forget(self, text: str) -> None:
        """The oldest turns, as many as there is no room for."""
        if (longest := self.model.max_positions) is None:
            return
        room = longest - self.max_new_tokens - 1  # for a token that begins the text
        while self.turns and len(self.encode("".join(self.turns) + text)) > room:
            del self.turns[0]


def serve(
    run: RunOrFolder,
    port: Annotated[int, typer.Option(metavar="N", min=1, max=65535, help="Serve it at this port.")] = 8000,
) -> None:
    """Serve a model as OpenAI's completions, to this machine alone, until Ctrl-C.

    The model's name there is RUN_OR_FOLDER as it is written; streaming, stop and seed are understood.

    Example: lowbit serve quickstart --port 8001
    """
    with console.answering(False, "loading the model") as answer:
        from lowbit_dist import serving, trained

        with serving.listen(port) as heard:
            app = serving.application(trained.open(run), run)
            url = f"http://{serving.HOST}:{port}/v1/completions"
            answer(
                {}, lambda terminal: terminal.print(f"{url}  (Ctrl-C ends it)", markup=False, soft_wrap=True)
            )
            with console.until_interrupted():
                serving.serve(app, heard)
