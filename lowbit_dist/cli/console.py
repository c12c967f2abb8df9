"""What a person sees: answers on stdout; all else on stderr, what is going on before them too."""

import contextlib
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import IO, TYPE_CHECKING, Any

from lowbit_dist.cli.lines import cut, duration, spinner, with_bar
from lowbit_dist.errors import in_bytes

if TYPE_CHECKING:
    from rich.console import Console

SOON = 2.0  # seconds of silence after which a terminal shows what is going on
QUIET = 10.0  # seconds between two lines about the same thing, where nobody watches
TURN = 0.1  # seconds between two turns of a spinner


@contextlib.contextmanager
def until_interrupted() -> Iterator[None]:
    """Ctrl-C, SIGTERM and SIGHUP end what is inside, and are how it is meant to end."""
    for signum in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(signum) is signal.SIG_DFL:
            signal.signal(signum, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):
        yield


class Waiting:
    """What is going on while a verb says nothing: in a terminal, once it has taken two seconds, a line that
    turns and counts; elsewhere, once it has taken ten, a plain line.
    """

    def __init__(self, word: str | None):
        """word: what is going on; None: the verb tells by itself"""
        self.word = word
        self._began = self._bar_began = time.monotonic()
        self._done = self._total = 0  # bytes; no total: nobody knows how many
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="waiting", daemon=True)

    def __enter__(self) -> "Waiting":
        if self.word is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """From now on nothing of it is to be seen."""
        if not self._is_over.is_set():
            self._is_over.set()
            if self._thread.is_alive():
                self._thread.join()

    @contextlib.contextmanager
    def bar(self, n_bytes: int) -> Iterator[Callable[[int], None]]:
        """Inside, it is known how far it is: gives what is told how many bytes more are done."""
        self._done, self._bar_began = 0, time.monotonic()
        self._total = n_bytes
        yield self._advance
        self._total = 0

    def _advance(self, n_bytes: int) -> None:
        self._done += n_bytes

    def line(self, width: int) -> str:
        """What a terminal of this width shows now."""
        word, done, total = self.word or "", self._done, self._total
        if not total:
            return cut(spinner(word, self._began), width)
        passed = time.monotonic() - self._bar_began
        left = {"left": f"{duration(passed * (total - done) / done)} left"} if done else {}
        step = f"{in_bytes(done)}/{in_bytes(total)}"
        return "".join(text for text, _ in with_bar(word, done / total, step, left, width))

    def plain(self) -> str:
        """What a log gets."""
        return f"{self.word}: {self._done / self._total:.0%}" if self._total else str(self.word)

    def _run(self) -> None:
        is_terminal = sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb"
        if not self._is_over.wait(SOON if is_terminal else QUIET):
            with contextlib.suppress(OSError, ValueError):  # a terminal that has closed
                (self._turn if is_terminal else self._tell)()

    def _turn(self) -> None:
        while not self._is_over.wait(TURN):
            sys.stderr.write(f"\r{self.line(shutil.get_terminal_size().columns - 1)}\x1b[K")
            sys.stderr.flush()
        sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()

    def _tell(self) -> None:
        told = None
        while True:
            if (text := self.plain()) != told:
                told = text
                print(f"lowbit: {text}", file=sys.stderr, flush=True)
            if self._is_over.wait(QUIET):
                return


class ReaderGone(Exception):
    """Nobody reads the answer: nothing is left to say.  (typer would end by a BrokenPipeError itself.)"""


class Answer:
    """What a verb says on stdout: `answer(content, draw)`, one JSON object or what `draw` draws of it, or a
    text that is written as it comes.
    """

    def __init__(self, stdout: IO[str], as_json: bool, waiting: Waiting):
        self.stdout, self.as_json, self.waiting = stdout, as_json, waiting
        self._last = "\n"  # character written

    def __call__(self, content: Mapping[str, Any], draw: Callable[["Console"], None]) -> None:
        self.waiting.stop()
        with self._read():
            if self.as_json:
                self.stdout.write(json.dumps(finite(content)) + "\n")
            else:
                draw(console(self.stdout))

    def write(self, text: str) -> None:
        """The text as it is, at once."""
        self.waiting.stop()
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
def answering(as_json: bool, doing: str | None = None) -> Iterator[Answer]:
    """Gives what writes a verb's answer.

    Until then, and ever after, whatever libraries write to stdout, in Python or in C, goes to stderr.
    doing: what the verb does until it answers, for those who wait; None: it tells by itself
    """
    sys.stdout.flush()
    # A file's name that is not UTF-8 is printed as it is.
    stdout = os.fdopen(os.dup(1), "w", encoding="utf-8", errors="surrogateescape")
    os.dup2(2, 1)

    with Waiting(doing) as waiting:
        yield Answer(stdout, as_json, waiting)
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
