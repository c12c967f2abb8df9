"""A run's progress as its launcher tells it: a bar in a terminal, lines elsewhere."""

import contextlib
import re
import sys
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from lowbit_dist.cli.console import QUIET, Waiting
from lowbit_dist.cli.lines import duration, spinner, with_bar
from lowbit_dist.errors import in_bytes

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, Task
    from rich.text import Text

    from lowbit_dist.config import RunConfig

# A column of `metrics.jsonl` that counts what went otherwise than it should -> its word.
COUNTS = {
    "skipped_steps": "skipped", "rollbacks": "rollbacks", "restarts": "restarts", "resumes": "resumes",
}  # fmt: skip
# What an event says that takes a while, from its verb to the first mark.
TAKES_A_WHILE = re.compile(r"(?:^|: )((?:starting|joining|asking|waiting|stopping) [^,:;(]+)")
WORKERS_ARE_READY = re.compile(r"(?:^|: )(?:begins at|resumes from|starts from) ")
STOPPING = "stopping"


class LogLines:
    """Progress where nobody watches, as in the log of a job that runs for days: a line for each event, and
    for rows one in ten seconds; one with a validation loss, a skipped step, a return or a restart always.
    """

    def __init__(self, config: "RunConfig", waiting: Waiting | None = None, *, prefix: str = ""):
        """waiting: ends with the first line; prefix: of each row, where there are several runs"""
        self.config, self._waiting, self._prefix = config, waiting or Waiting(None), prefix
        self._next = 0.0  # when an ordinary row is due
        self._counts: list[Any] = []

    def say(self, text: str) -> None:
        self._waiting.stop()
        print(f"lowbit: {text}", file=sys.stderr, flush=True)

    def row(self, row: Mapping[str, Any]) -> None:
        now, step, steps = time.monotonic(), row.get("step"), self.config.train.steps
        counts = [row.get(name) for name in COUNTS]
        is_new = "val_loss" in row or counts != self._counts or step == steps
        if is_new or now >= self._next:
            self._next, self._counts = now + QUIET, counts
            self.say("  ".join([f"{self._prefix}step {step}/{steps}", *in_words(row, self.config).values()]))


class Bar:
    """Progress in a terminal: events scroll by above one line, which has the run's name, a bar and the step,
    and behind them the numbers that fit, or what is waited for and how long already.
    """

    def __init__(self, config: "RunConfig", terminal: "Console | None" = None):
        from lowbit_dist.runs import newest_checkpoint

        step, _ = newest_checkpoint(config.run_dir) or (0, 0.0)
        self.config = config
        self.progress = bars(terminal)
        self.task = self.progress.add_task(
            config.run.name, total=config.train.steps, completed=step, words={}, **waits("checking")
        )
        self.known: dict[str, str] = {}
        self._is_stopping = False

    def say(self, text: str) -> None:
        self.progress.console.print(f"lowbit: {text}", markup=False, style="dim")
        if (word := going_on(text)) is not None:
            self._is_stopping = word.startswith(STOPPING)
            self.progress.update(self.task, **waits(word))

    def row(self, row: Mapping[str, Any]) -> None:
        self.known |= in_words(row, self.config)
        step = row.get("step", 0)
        self.progress.update(self.task, completed=step, words=dict(self.known))
        if step == self.config.train.steps:
            self.progress.update(self.task, **waits("finishing"))
        elif not self._is_stopping:
            self.progress.update(self.task, **waits(None))

    def close(self) -> None:
        """The line that stays behind has the newest numbers."""
        self.progress.update(self.task, **waits(None))


def going_on(event: str) -> str | None:
    """What is waited for after an event until the next row; None if it does not say."""
    if WORKERS_ARE_READY.search(event):
        return "making the first steps"
    match = TAKES_A_WHILE.search(event)
    return match[1].strip() if match else None


def waits(word: str | None) -> dict[str, Any]:
    """The fields of a bar that say what is waited for from now on."""
    return {"wait": word, "since": time.monotonic()}


def bars(terminal: "Console | None" = None) -> "Progress":
    """Bars on stderr, a line each, whose fields are `words` and those of `waits`."""
    from rich.console import Console
    from rich.progress import Progress, ProgressColumn
    from rich.table import Column
    from rich.text import Text

    shown = terminal or Console(stderr=True, highlight=False)

    class Line(ProgressColumn):
        def render(self, task: "Task") -> "Text":
            wait, total = task.fields["wait"], task.total or 1
            pieces = with_bar(
                task.description,
                task.completed / total,
                f"{task.completed:.0f}/{total:.0f}",
                task.fields["words"],
                shown.width - 1,
                wait=wait and spinner(wait, task.fields["since"]),
            )
            return Text.assemble(*pieces)

    return Progress(Line(Column(no_wrap=True)), console=shown, redirect_stdout=False, redirect_stderr=False)


@contextlib.contextmanager
def following(config: "RunConfig", waiting: Waiting) -> Iterator[LogLines | Bar]:
    """A bar if stderr is a terminal, else lines; they take over from what has been waited for."""
    if not sys.stderr.isatty():
        yield LogLines(config, waiting)
        return
    waiting.stop()
    bar = Bar(config)
    with bar.progress:
        try:
            yield bar
        finally:
            bar.close()


def in_words(row: Mapping[str, Any], config: "RunConfig") -> dict[str, str]:
    """A row of `metrics.jsonl` as it is read: loss, speed, time left, MFU, flips, memory that stays allocated
    between steps, and what went otherwise than it should; by the names in `lines.WORDS`.
    """
    words = {}
    for key, name in (("loss", "loss"), ("val_loss", "val")):
        if isinstance(row.get(key), int | float):
            words[name] = f"{name} {row[key]:.3f}"
    rate = row.get("tokens_per_second")
    if isinstance(rate, int | float) and rate > 0:
        words["rate"] = f"{rate:,.0f} tokens/s"
        left = (config.train.steps - row.get("step", 0)) * config.train.batch_tokens / rate
        words["left"] = f"{duration(left)} left"
    of_one = row.get("tokens_per_second_per_worker")
    if isinstance(of_one, int | float) and of_one != rate:
        words["each"] = f"{of_one:,.0f}/worker"
    if isinstance(row.get("mfu"), int | float):
        words["mfu"] = f"MFU {row['mfu']:.1%}"
    if isinstance(row.get("flip_rate"), int | float):
        words["flips"] = f"flips {row['flip_rate']:.2%}"
    if isinstance(row.get("resident_bytes"), int | float):
        words["memory"] = f"state {in_bytes(row['resident_bytes'])}/worker"
    for key, name in COUNTS.items():
        if row.get(key):
            words[name] = f"{row[key]} {name if row[key] != 1 else name.removesuffix('s')}"
    return words
