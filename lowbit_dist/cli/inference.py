"""`lowbit chat` and `lowbit serve`: a trained model that stays loaded."""

import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from lowbit_dist.cli import console
from lowbit_dist.cli.arguments import RunOrFolder
from lowbit_dist.errors import ConfigError

LINE = "{}"  # stands for what is typed


def chat(
    run: RunOrFolder,
    turn: Annotated[
        str,
        typer.Option(metavar="TEXT", help="Give the model each line so; {} stands for it, \\n for its end."),
    ] = "{}\\n",
    max_new_tokens: Annotated[
        int, typer.Option(metavar="N", help="Stop an answer after so many tokens.")
    ] = 200,
    temperature: Annotated[
        float, typer.Option(metavar="X", help="Draw at this temperature; 0 takes the likeliest token always.")
    ] = 0.8,
    top_k: Annotated[
        int, typer.Option(metavar="N", help="Draw from the N likeliest tokens; 0 draws from all.")
    ] = 50,
    top_p: Annotated[
        float, typer.Option(metavar="X", help="Draw from the likeliest tokens up to this probability.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(metavar="N", help="Decides what is drawn.")] = 0,
) -> None:
    """Talk with a model: each line is answered as the text goes on; Ctrl-C ends an answer, Ctrl-D the talk.

    The model reads all that was said so far, as much of its end as fits.

    Example: lowbit chat quickstart --turn "Question: {}\\nAnswer:" --max-new-tokens 60
    """
    around = turn.replace("\\n", "\n").replace("\\t", "\t")
    if LINE not in around:
        raise ConfigError(f"--turn ({turn}) must have {LINE}, for which a line stands; write {LINE}\\n")
    with console.answering(False, "loading the model") as answer:
        from lowbit_dist import trained

        begin = around[: around.index(LINE)]
        talk = Talk(trained.open(run), max_new_tokens, stop=[begin] if begin.strip() else [])
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
    try:
        return input("> ")
    except EOFError:
        return None


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
            serving.serve(app, heard)
