"""A sweep's file, and the children that it defines."""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError
from pydantic_core import PydanticCustomError

from lowbit_dist.config import FilePath, RunConfig, RunName, Section
from lowbit_dist.errors import ConfigError, format_error, nearest, show
from lowbit_dist.yamlfile import read_yaml, written

EXAMPLE = "write sweep: {name: methods}, base: quickstart.yaml, seeds: [0, 1], for example"


def _rule(text: str) -> PydanticCustomError:
    return PydanticCustomError("rule", "{text}", {"text": text})


def _override(name: str, value: Any) -> str:
    """`name=value`, as it would stand on a command line."""
    return f"{name}={written({'value': value}).removeprefix('value: ').rstrip()}"


def _overrides(value: Any) -> tuple[str, ...]:
    """Overrides, from a list of them or from a mapping."""
    value = () if value is None else value
    if isinstance(value, Mapping):
        value = [_override(str(name), item) for name, item in value.items()]
    if not isinstance(value, list | tuple) or not all(
        isinstance(override, str) and "=" in override for override in value
    ):
        raise _rule("must be overrides; write {train.steps: 20}, or [train.steps=20], for example")
    for override in value:
        # Which run a child starts from is its own; `run.from` means the runs beside the sweep, too.
        if re.match(r"\s*run\s*(=|\.(?!\s*(from|with_states)\s*=))", override):
            raise _rule(
                "must not set run: a child's name, seed and folder are the sweep's; write seeds: [0, 1]"
            )
    return tuple(value)


def _labelled(value: Any) -> Any:
    if value is not None and not isinstance(value, Mapping):
        raise _rule("must be labels with overrides; write {dense: {method.name: dense}}, for example")
    return {str(label): item for label, item in (value or {}).items()}


def _grid(value: Any) -> Any:
    if value is not None and not isinstance(value, Mapping):
        raise _rule("must be fields with lists of values; write {optimizer.lr: [0.001, 0.004]}, for example")
    for name, values in (value or {}).items():
        if not isinstance(values, list) or not values:
            raise _rule(f"must give {name} a list of values; write {{{name}: [{show(values)}]}}")
        _overrides({name: None})
    return {str(name): tuple(values) for name, values in (value or {}).items()}


def _seeds(value: Any) -> Any:
    whole = isinstance(value, list) and value and all(type(n) is int and 0 <= n < 2**63 for n in value)
    if not whole or len(set(value)) < len(value):
        raise _rule("must be different whole numbers from 0 up; write [0, 1], for example")
    return tuple(value)


def _at_once(value: Any) -> Any:
    if value != "auto" and not (type(value) is int and value >= 1):
        raise _rule("must be auto, or a whole number from 1 up; write auto, for as many as fit")
    return value


class Options(Section):
    name: RunName
    dir: FilePath = Path("runs")
    at_once: Annotated[Literal["auto"] | int, BeforeValidator(_at_once)] = "auto"  # children at the same time


class Definition(Section):
    """What the file says."""

    sweep: Options
    base: FilePath  # a run's configuration, beside the sweep's file
    set: Annotated[tuple[str, ...], BeforeValidator(_overrides)] = ()
    seeds: Annotated[tuple[int, ...], BeforeValidator(_seeds)] = (0,)
    runs: Annotated[
        dict[RunName, Annotated[tuple[str, ...], BeforeValidator(_overrides)]], BeforeValidator(_labelled)
    ] = Field(default_factory=dict)
    grid: Annotated[dict[str, tuple[Any, ...]], BeforeValidator(_grid)] = Field(default_factory=dict)


@dataclass(frozen=True)
class Child:
    """One run of a sweep."""

    label: str
    config: RunConfig

    @property
    def name(self) -> str:
        return self.config.run.name

    @property
    def seed(self) -> int:
        return self.config.run.seed


@dataclass(frozen=True)
class Sweep:
    """A sweep whose children are all valid configurations."""

    file: Path
    options: Options
    children: tuple[Child, ...]

    @property
    def name(self) -> str:
        return self.options.name

    @property
    def folder(self) -> Path:
        return self.options.dir / self.options.name

    @classmethod
    def load(cls, file: Path) -> "Sweep":
        """ConfigError for whatever is wrong with the file, or with any of the children."""
        definition = _read(file)
        base = file.parent / definition.base
        if not base.is_file():
            raise ConfigError(
                f"base ({definition.base}) does not exist beside {file}; write the path of a configuration"
            )
        folder = definition.sweep.dir / definition.sweep.name
        children = tuple(_children(definition, base, folder))
        _check_different(children)
        return cls(file, definition.sweep, children)


def _read(file: Path) -> Definition:
    data = read_yaml(file)
    for name in data:
        if name not in Definition.model_fields:
            meant = nearest(name, Definition.model_fields)
            answer = (
                f"did you mean {meant!r}?" if meant else f"known are {', '.join(Definition.model_fields)}"
            )
            raise ConfigError(f"{file}: unknown name {show(name)}; {answer}")
    options = data.get("sweep")
    if not isinstance(options, Mapping) or options.get("name") is None:
        raise ConfigError(f"sweep.name is required in {file}; {EXAMPLE}")
    for name in options:
        if name not in Options.model_fields:
            meant = nearest(name, Options.model_fields) or "at_once"
            raise ConfigError(f"sweep: unknown name {show(name)}; did you mean {meant!r}?")
    if data.get("base") is None:
        raise ConfigError(f"base is required in {file}; {EXAMPLE}")
    try:
        return Definition.model_validate({name: item for name, item in data.items() if item is not None})
    except ValidationError as error:
        first: dict[str, Any] = {**error.errors(include_url=False, include_context=True)[0]}
        place = [str(part) for part in first["loc"] if part != "[key]"]
        raise ConfigError(format_error(Definition, {**first, "loc": ()}, tuple(place))) from None


def _children(definition: Definition, base: Path, folder: Path) -> Iterator[Child]:
    from lowbit_dist import configfile

    for label, overrides in _variants(definition, base):
        for seed in definition.seeds:
            own = {"run.name": f"{label}-seed{seed}", "run.seed": seed, "run.dir": str(folder)}
            everything = (*definition.set, *overrides, *(_override(*setting) for setting in own.items()))
            try:
                yield Child(label, configfile.load(base, everything))
            except ConfigError as error:
                raise ConfigError(f"{label}: {error}") from None


def _variants(definition: Definition, base: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Labels and what sets them apart: each of the `runs` at each point of the `grid`."""
    short = {name: name.rpartition(".")[2] for name in definition.grid}
    if len(set(short.values())) < len(short):
        short = {name: name.replace(".", "-") for name in short}
    labelled: list[tuple[str | None, tuple[str, ...]]] = [*definition.runs.items()] or [(None, ())]
    for label, overrides in labelled:
        for values in itertools.product(*definition.grid.values()):
            point = dict(zip(definition.grid, values, strict=True))
            words = [f"{short[name]}-{_word(value)}" for name, value in point.items()]
            parts = ([] if label is None else [label]) + words
            yield (
                "-".join(parts) or base.stem,
                (*overrides, *(_override(name, value) for name, value in point.items())),
            )


def _word(value: Any) -> str:
    """A value as a part of a name."""
    if isinstance(value, Mapping):
        value = "-".join(_word(item) for item in value.values())
    text = f"{value:g}" if isinstance(value, float) else written({"": value}).removeprefix("'': ")
    return re.sub(r"[^A-Za-z0-9._]+", "-", text).strip("-") or "x"


def _check_different(children: Sequence[Child]) -> None:
    """ConfigError if two labels mean one run: its seeds would be counted twice."""
    labels: dict[str, str] = {}
    names: set[str] = set()
    for child in children:
        if child.name in names:
            raise ConfigError(f"grid has {child.label} twice; leave out one of the equal values")
        names.add(child.name)
        same = repr({key: value for key, value in child.config.flat().items() if key != "run.name"})
        if (other := labels.setdefault(same, child.label)) != child.label:
            raise ConfigError(
                f"{other} and {child.label} are the same run; change one of them, or leave it out"
            )
