"""Mistakes in words: `section.field (value) rule; what to write instead`, always one line."""

import difflib
import math
import os
import reprlib
import tempfile
from pathlib import Path
from textwrap import shorten
from typing import Any, get_args

from pydantic import BaseModel

from lowbit_dist import synonyms


class ConfigError(Exception):
    """A user's mistake, in one line: the field, the value, the rule and what to write instead."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


def format_error(section: type[BaseModel], error: dict[str, Any], prefix: tuple[str, ...]) -> str:
    """One of pydantic's errors as `section.field (value) rule; what to write instead`."""
    info = None
    inside: Any = section
    place = ".".join(prefix)
    for part in error["loc"]:
        if isinstance(part, int):
            place += f"[{part}]"
        elif isinstance(inside, type) and issubclass(inside, BaseModel) and part in inside.model_fields:
            place += f".{part}" if place else part
            info = inside.model_fields[part]
            inside = info.annotation
    value, kind, context = error["input"], error["type"], error.get("ctx", {})
    if kind == "missing" or (value is None and place == "data.path"):
        example = "write data: {path: FOLDER}, a folder or URL written by `lowbit data prepare`"
        return f"{place} is required; {example if place == 'data.path' else 'add it'}"
    start = f"{place} ({show(value)})"
    default = None if info is None or info.is_required() else info.default
    hint = "" if default is None else f", for example {plain(default)}"
    if kind == "rule":
        if ";" in context["text"]:
            return f"{start} {context['text']}"
        instead = ", for example data/stdlib" if place == "data.path" else hint or ", or null"
        return f"{start} {context['text']}; write one{instead}"
    if kind == "literal_error":
        choices = [plain(choice) for choice in _choices(inside)]
        meant = nearest(value, choices)
        rule = f"must be one of {', '.join(choices)}" if len(choices) > 1 else f"must be {choices[0]}"
        return f"{start} {rule}; " + (
            f"did you mean {meant!r}?" if meant else f"write {choices[0]}, for example"
        )
    if kind == "finite_number" or (isinstance(value, float) and not math.isfinite(value)):
        return f"{start} must be a finite number; write one{hint}"
    if kind in ("int_type", "int_from_float", "int_parsing", "int_parsing_size"):
        if isinstance(value, float) and math.isfinite(value) and value.is_integer() and abs(value) < 2**63:
            return f"{start} must be a whole number; write {int(value)}"
        return f"{start} must be a whole number; write one{hint}"
    if kind in ("float_type", "float_parsing"):
        return f"{start} must be a number; write one{hint}"
    if kind in ("bool_type", "bool_parsing"):
        return f"{start} must be true or false; write {'false' if default is None else plain(default)}"
    if kind == "string_type":
        return f"{start} must be text; {quoted(value)}"
    limits = {
        "greater_than_equal": ("ge", "must be at least"),
        "greater_than": ("gt", "must be more than"),
        "less_than_equal": ("le", "must be at most"),
        "less_than": ("lt", "must be less than"),
    }
    if kind in limits:
        key, rule = limits[kind]
        limit = f"{context[key]:g}" if isinstance(context[key], float) else str(context[key])
        instead = (
            f"write {limit} or {'more' if key == 'ge' else 'less'}"
            if key in ("ge", "le")
            else f"write one{hint}"
        )
        return f"{start} {rule} {limit}; {instead}"
    if kind == "multiple_of":
        unit = context["multiple_of"]
        return f"{start} must be a multiple of {unit}; the nearest is {nearest_multiple(value, unit)}"
    return f"{start} is wrong: {error['msg']}"


def _choices(annotation: Any) -> list[Any]:
    """The values that a (nested, optional) Literal allows."""
    choices: list[Any] = []
    for argument in get_args(annotation):
        if argument is type(None):
            choices.append(None)
        elif get_args(argument):
            choices += _choices(argument)
        else:
            choices.append(argument)
    return list(dict.fromkeys(choices)) or ["something else"]


_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = 60
_repr.maxlist = _repr.maxtuple = _repr.maxdict = _repr.maxset = 3
_repr.maxlevel = 2


def show(value: Any) -> str:
    """A value as a message shows it: short, on one line, printable whatever it is."""
    if value is None or isinstance(value, bool):
        return plain(value)
    try:
        return f"{value:,}" if isinstance(value, int) and abs(value) < 10**15 else _repr.repr(value)
    except Exception:  # a value whose own repr fails must not hide the mistake
        return f"a {type(value).__name__}"


def plain(value: Any) -> str:
    """A value as it stands in YAML."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return str(list(value)) if isinstance(value, tuple) else str(value)


def quoted(value: Any) -> str:
    """What to write when a number or a list stands where text is meant."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f'put it in quotes: "{show(value).replace(",", "")}"'
    return "write a word or a path"


def why_not_writable(folder: Path) -> str | None:
    """What hinders writing in `folder`, which need not exist; leaves nothing behind."""
    existing = folder.absolute()
    while not os.path.lexists(existing):
        existing = existing.parent
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".lowbit-", dir=existing))
    except OSError as error:
        return error.strerror or str(error)
    return None


def nearest(word: Any, known: Any, cutoff: float = 0.6) -> str | None:
    """The one of `known` that a word is most like, or is elsewhere's name for; None if it is like none."""
    known = list(known)
    if not isinstance(word, str):
        return None
    if (here := synonyms.value(word)) in known:
        return here
    in_lower_case = {name.lower(): name for name in known}
    matches = difflib.get_close_matches(word.lower(), in_lower_case, 1, cutoff)
    return in_lower_case[matches[0]] if matches else None


def nearest_multiple(value: int, unit: int) -> int:
    return max(1, (value + unit // 2) // unit) * unit


def nearest_divisor(whole: int, value: int) -> int:
    divisors = {
        d
        for factor in range(1, math.isqrt(whole) + 1)
        if whole % factor == 0
        for d in (factor, whole // factor)
    }
    return min(divisors, key=lambda divisor: (abs(divisor - value), -divisor))


def in_bytes(n: float | None) -> str:
    """1.5 MB: powers of 1000."""
    if n is None:
        return "-"
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= size:
            return f"{n / size:.3g} {unit}" if n < 1000 * size else f"{n / size:,.0f} {unit}"
    return f"{n:.0f} B"


def first_line(error: Exception) -> str:
    """What went wrong in a library, whose messages may be pages or name every model that there is."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {shorten(lines[0], 160)}"
