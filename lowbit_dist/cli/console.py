"""What a person sees: answers on stdout, everything else on stderr, and a bar that follows a run."""

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import IO, TYPE_CHECKING, Any

from lowbit_dist.errors import in_bytes

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from lowbit_dist.config import RunConfig

QUIET = 10.0  # seconds between two lines about the same thing


class ReaderGone(Exception):
    """Nobody reads the answer: nothing is left to say.  (typer would end by a BrokenPipeError itself.)"""


class Answer:
    """What a verb says on stdout: `answer(content, draw)`, one JSON object or what `draw` draws of it, or a
    text that is written as it comes.
    """

    def __init__(self, stdout: IO[str], as_json: bool):
        self.stdout, self.as_json = stdout, as_json
        self._last = "\n"  # character written

    def __call__(self, content: Mapping[str, Any], draw: Callable[["Console"], None]) -> None:
        with self._read():
            if self.as_json:
                self.stdout.write(json.dumps(finite(content)) + "\n")
            else:
                draw(console(self.stdout))

    def write(self, text: str) -> None:
        """The text as it is, at once."""
        self._last = text[-1:] or self._last
        with self._read():
            self.stdout.write(text)

    @contextlib.contextmanager
    def _read(self) -> Iterator[None]:
        """What is written inside is there for the reader; ReaderGone if there is none any more."""
        try:
            yield
            self.stdout.flush()
        except BrokenPipeError:
            raise ReaderGone from None

    def end_line(self) -> None:
        """In a terminal the shell's next line begins on a new one; a file or a pipe gets the text alone."""
        if self.stdout.isatty() and self._last != "\n":
            self.write("\n")


@contextlib.contextmanager
def answering(as_json: bool) -> Iterator[Answer]:
    """Gives what writes a verb's answer.

    Until then, and ever after, whatever libraries write to stdout, in Python or in C, goes to stderr.
    """
    sys.stdout.flush()
    stdout = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    yield Answer(stdout, as_json)
    stdout.close()


def console(file: IO[str]) -> "Console":
    from rich.console import Console

    # A terminal's own width; files and pipes get lines that are not broken in the middle of a table.
    return Console(file=file, highlight=False, soft_wrap=False, width=None if file.isatty() else 120)


def finite(value: Any) -> Any:
    """`value` with None for what JSON has no word for: NaN and infinity."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value if isinstance(value, str | int | bool | None) else str(value)


class LogLines:
    """Progress where nobody watches, as in the log of a job that runs for days: a line for each event, and
    for rows one in ten seconds; one with a validation loss, a skipped step, a return or a restart always.
    """

    def __init__(self, config: "RunConfig"):
        self.config = config
        self._next = 0.0  # when an ordinary row is due
        self._counts: list[Any] = []

    def say(self, text: str) -> None:
        print(f"lowbit: {text}", file=sys.stderr, flush=True)

    def row(self, row: Mapping[str, Any]) -> None:
        now, step, steps = time.monotonic(), row.get("step"), self.config.train.steps
        counts = [row.get(name) for name in ("skipped_steps", "rollbacks", "restarts")]
        is_new = "val_loss" in row or counts != self._counts or step == steps
        if is_new or now >= self._next:
            self._next, self._counts = now + QUIET, counts
            self.say("  ".join([f"step {step}/{steps}", *in_words(row, self.config).values()]))


class Bar:
    """Progress in a terminal: events scroll by above one bar."""

    def __init__(self, config: "RunConfig"):
        self.config = config
        self.progress = bars()
        self.task = self.progress.add_task(config.run.name, total=config.train.steps, words="")
        self.known: dict[str, str] = {}

    def say(self, text: str) -> None:
        self.progress.console.print(f"lowbit: {text}", markup=False, style="dim")
        if not self.known:
            self.progress.update(self.task, words=text)

    def row(self, row: Mapping[str, Any]) -> None:
        self.known |= in_words(row, self.config)
        self.progress.update(self.task, completed=row.get("step", 0), words="  ".join(self.known.values()))


def bars() -> "Progress":
    """Bars on stderr, each with `words` behind it."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed}/{task.total}"),
        TextColumn("{task.fields[words]}"),
        console=Console(stderr=True, highlight=False),
        redirect_stdout=False,
        redirect_stderr=False,
    )


@contextlib.contextmanager
def following(config: "RunConfig") -> Iterator[LogLines | Bar]:
    """A bar if stderr is a terminal, else lines."""
    if not sys.stderr.isatty():
        yield LogLines(config)
        return
    bar = Bar(config)
    with bar.progress:
        yield bar


def in_words(row: Mapping[str, Any], config: "RunConfig") -> dict[str, str]:
    """A row of `metrics.jsonl` as it is read: loss, speed, time left, flips, memory, and what went wrong."""
    words = {}
    for key, name in (("loss", "loss"), ("val_loss", "val")):
        if isinstance(row.get(key), int | float):
            words[name] = f"{name} {row[key]:.3f}"
    rate = row.get("tokens_per_second")
    if isinstance(rate, int | float) and rate > 0:
        words["rate"] = f"{rate:,.0f} tokens/s"
        left = (config.train.steps - row.get("step", 0)) * config.train.batch_tokens / rate
        words["left"] = f"{duration(left)} left"
    if isinstance(row.get("flip_rate"), int | float):
        words["flips"] = f"flips {row['flip_rate']:.2%}"
    if isinstance(row.get("resident_bytes"), int | float):
        words["memory"] = f"{in_bytes(row['resident_bytes'])}/worker"
    for key, name in (("skipped_steps", "skipped"), ("rollbacks", "rollbacks"), ("restarts", "restarts")):
        if row.get(key):
            words[name] = f"{row[key]} {name if row[key] != 1 else name.removesuffix('s')}"
    return words


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
