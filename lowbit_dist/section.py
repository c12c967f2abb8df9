"""What sections of a configuration are made of: the base class, and values with rules.

A section is frozen; unknown names, other types, NaN and infinity are refused.  `RunConfig` (config.py), a
training method's options and an optimizer's are sections; what reads them from YAML is `configfile.py`.
This file imports neither torch nor anything that does, so that a command line starts at once.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from lowbit_dist.errors import quoted


def broken_rule(text: str) -> PydanticCustomError:
    return PydanticCustomError("rule", "{text}", {"text": text})


def clean_text(value: str) -> str:
    if not value.strip():
        raise broken_rule("must not be empty")
    if not value.isprintable():
        raise broken_rule("must be printable text: no control characters, no blank but the space")
    return value


def from_home(path: str) -> str:
    """A path that begins with `~` or `~user` as a shell would write it out; others as they are.

    ValueError if this user has no home folder.
    """
    expanded = os.path.expanduser(path)
    if expanded.partition("/")[0] == "~":
        raise broken_rule("must not begin with ~: this user has no home folder; write the whole path")
    return expanded


def _uri_from_home(value: str) -> str:
    """The same inside the URI of a file: `sqlite:///~/mlflow.db`."""
    scheme, separator, path = value.rpartition(":///")
    return scheme + separator + from_home(path)


def _path_type(value: Any) -> Any:
    if not isinstance(value, str | Path | None):
        raise broken_rule(f"must be the path of a file or folder; {quoted(value)}")
    if not isinstance(value, str):
        return value
    if "://" in value:
        raise broken_rule("must be a folder, no URL; mount the store as a folder that all machines share")
    return Path(from_home(clean_text(value)))


def _plain_name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", value):
        repaired = re.sub(r"[^A-Za-z0-9._-]+", "-", value).strip("-._")[:100] or "my-run"
        raise broken_rule(
            "must be at most 100 letters, digits, '.', '_' and '-', a letter or digit first; "
            f"write {repaired!r}, for example"
        )
    return value


def pair(value: Any) -> Any:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise broken_rule("must be two numbers, like [0.9, 0.95]")
    return tuple(value)


def _auto_or_seconds(value: Any) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if value == "auto" or (number and 1 <= value < 1e9):
        return value
    raise broken_rule("must be auto, or a number of seconds from 1 up")


def _auto_or_gpu(value: Any) -> Any:
    if value == "auto" or (value in (0, 1) and not isinstance(value, bool)):
        return value
    raise broken_rule("must be auto, 0 or 1: a worker has a GPU of its own or none; write auto")


def number(value: Any) -> Any:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise broken_rule("must be a number")
    return value


def no_truth(value: Any) -> Any:
    """For a choice among numbers: Python takes true for 1."""
    if isinstance(value, bool):
        raise broken_rule("must be a number, not true or false")
    return value


def on_or_off(value: Any) -> Any:
    """Other readers of YAML than ours take these words for true and false."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


Text = Annotated[str, AfterValidator(clean_text)]
FolderOrUrl = Annotated[str, AfterValidator(clean_text), AfterValidator(from_home)]
TrackingUri = Annotated[str, AfterValidator(clean_text), AfterValidator(_uri_from_home)]
RunName = Annotated[str, AfterValidator(_plain_name)]
FilePath = Annotated[Path, BeforeValidator(_path_type)]
MaybeFilePath = Annotated[Path | None, BeforeValidator(_path_type)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
# Upper limits keep every product of two counts far below 2^63.
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
Tokens = Annotated[int, Field(ge=1, le=2**40)]
Size = Annotated[int, Field(ge=1, le=2**20)]
AutoOrGpu = Annotated[Literal["auto", 0, 1], BeforeValidator(_auto_or_gpu)]
_FromOne = Field(ge=1, lt=1e9)
AutoOrSeconds = Annotated[
    Literal["auto"] | Annotated[int, _FromOne] | Annotated[float, _FromOne], BeforeValidator(_auto_or_seconds)
]


class Section(BaseModel):
    """A part of the configuration: frozen; unknown names, other types, NaN and infinity are refused."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=()
    )

    def __hash__(self) -> int:  # options of lists and mappings included
        return hash((type(self), self.model_dump_json()))


def setting(default: Any = ..., meaning: str = "", *, unit: str | None = None) -> Any:
    """A field's default (`...`: it is required), what it means in a sentence or two, and its unit."""
    return _field(default, meaning, {"unit": unit} if unit else {})


def may_change(default: Any, meaning: str = "", *, unit: str | None = None) -> Any:
    """A `setting` that may have another value when a run of the same name is resumed.

    Such a field, or section, decides where and how a run is carried out and watched and when it is stopped,
    not what a healthy run computes.  All others must stay the same.
    """
    return _field(default, meaning, {"may_change": True} | ({"unit": unit} if unit else {}))


def _field(default: Any, meaning: str, extra: dict[str, Any]) -> Any:
    return Field(default, description=meaning or None, json_schema_extra=extra or None)


def is_changeable(field: FieldInfo) -> bool:
    """Whether a field was marked by `may_change`."""
    extra = field.json_schema_extra
    return isinstance(extra, dict) and "may_change" in extra


MOST_WORKERS = 65536
WorkerCount = Annotated[int, Field(ge=1, le=MOST_WORKERS)]


class WorkerRange(Section):
    """As many workers as the cluster has slots for, between these numbers; more and fewer as it changes."""

    min: WorkerCount = setting(meaning="The fewest workers that a run starts or resumes with.")
    max: WorkerCount = setting(meaning="The most workers that it has.")


def worker_count(value: Any) -> Any:
    """A number, or {min: ..., max: ...}."""
    if isinstance(value, WorkerRange):
        return value
    if type(value) is int:
        if value < 1:
            raise broken_rule("must be at least 1; write 1 or more")
        if value > MOST_WORKERS:
            raise broken_rule(f"must be at most {MOST_WORKERS}; write {MOST_WORKERS} or less")
        return value
    if not isinstance(value, Mapping):
        raise broken_rule("must be a whole number, or a range like {min: 2, max: 8}")
    numbers = [value.get(name) for name in ("min", "max")]
    if set(value) != {"min", "max"} or not all(type(n) is int and 1 <= n <= MOST_WORKERS for n in numbers):
        raise broken_rule(
            f"must have min and max, whole numbers from 1 to {MOST_WORKERS}, like {{min: 2, max: 8}}"
        )
    if value["min"] > value["max"]:
        raise broken_rule(
            f"must have a min of at most its max; write {{min: {value['max']}, max: {value['min']}}}"
        )
    return WorkerRange(**value)
