"""Lines of progress: never longer than the terminal is wide, and never without their bar and step."""

import time
from collections.abc import Mapping

BAR, LEAST_BAR = 24, 5  # cells of a bar, and in a very narrow terminal
# What stands behind a bar, the most important first: what does not fit is left out, the last one of these
# before all others.
WORDS = (
    "states", "loss", "left", "rate", "skipped", "val", "rollbacks", "restarts", "mfu", "flips", "memory",
    "each", "resumes",
)  # fmt: skip
FRAMES = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
COLOURS = {"finished": "green", "starting": "blue", "running": "cyan", "stopped": "yellow", "failed": "red"}

Pieces = list[tuple[str, str]]  # texts and their styles


def with_bar(
    name: str, done: float, step: str, words: Mapping[str, str], width: int, *, wait: str | None = None
) -> Pieces:
    """A line of at most `width` cells: name, bar and step always, then as many of the words as fit.

    done: share of the bar
    words: by their names in `WORDS`, in the order in which they are shown
    wait: stands in their place, cut to what there is room for
    """
    name = cut(name, min(max(8, width // 4), max(1, width - len(step) - LEAST_BAR - 2)))
    cells = max(LEAST_BAR, min(BAR, width - len(name) - len(step) - 2))
    room = width - len(name) - cells - len(step) - 2
    full = min(cells, round(done * cells))
    pieces = [
        (name, "bold"),
        (" ", ""),
        ("━" * full, "cyan"),
        ("━" * (cells - full), "dim"),
        (f" {step}", ""),
    ]
    if wait is not None:
        return [*pieces, (f"  {cut(wait, room - 2)}", "")] if room > 2 else pieces
    shown = dict(words)
    for key in sorted(words, key=_rank, reverse=True):
        if sum(2 + len(word) for word in shown.values()) <= room:
            break
        del shown[key]
    return [*pieces, *((f"  {word}", "") for word in shown.values())]


def _rank(key: str) -> int:
    return WORDS.index(key) if key in WORDS else len(WORDS)


def cut(text: str, width: int) -> str:
    """A text of at most `width` cells, with a mark where something is left out."""
    return text if len(text) <= width else f"{text[: max(0, width - 1)]}…"


def spinner(word: str, since: float) -> str:
    """A wait since a moment of `time.monotonic`: something that turns, how long it takes, and for what."""
    now = time.monotonic()
    return f"{FRAMES[int(10 * now) % len(FRAMES)]} {duration(now - since)} {word}"


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
