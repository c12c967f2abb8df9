"""What typer says of wrong arguments, in the words of this command line."""

import itertools
import sys
from typing import Any


def of_arguments(error: Any) -> str:
    """Typer's words about an argument, with the value that they leave out."""
    text = " ".join(error.format_message().split())
    if not text:  # without a verb, the help has been printed
        return ""
    if field := _field_as_option(error):
        return f"{error.message.rstrip('.')}: fields are written without dashes, as train.steps=20; {field}"
    options = getattr(getattr(error, "param", None), "opts", [])
    words = sys.argv[1:]
    given = [value for name, value in itertools.pairwise(words) if name in options]
    given += [
        value for name, _, value in (word.partition("=") for word in words) if name in options and value
    ]
    if given and given[-1] not in text:
        text = text.replace(":", f" ({given[-1]!r}):", 1)
    return f"{text} See --help."


def _field_as_option(error: Any) -> str | None:
    """What was meant by an unknown option of a verb that takes fields, as `--lr`."""
    command = getattr(getattr(error, "ctx", None), "command", None)
    takes_fields = any(parameter.name == "overrides" for parameter in getattr(command, "params", ()))
    if not (type(error).__name__ == "NoSuchOption" and takes_fields):
        return None
    from lowbit_dist import configfile

    name = error.option_name.lstrip("-").replace("-", "_")
    if error.possibilities and not configfile.is_field(name):  # a misspelt option
        return None
    return str(configfile.unknown(name)).partition("; ")[2]
