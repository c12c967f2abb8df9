"""A part of an input: what one process reads alone."""

from typing import Any, NamedTuple


class FileRange(NamedTuple):
    """A piece of an input.  `start` and `stop` are bytes, row groups or rows, as its source has them."""

    source: str  # a key of documents.SOURCES
    path: str
    start: int
    stop: int
    size: int  # bytes on disk, for progress and for balance
    stamp: int = 0  # time of the file's last change, ns


def checked_text(text: Any, instead: str) -> str:
    """`text`; ValueError unless it is text that UTF-8 has, saying what is there `instead`."""
    if not isinstance(text, str):
        raise ValueError(f"has no text in a field 'text' ({instead}); rename the field or drop the line")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"has half a surrogate pair at character {error.start:,} of its text; repair it"
        ) from None
    return text
