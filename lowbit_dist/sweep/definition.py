"""A sweep's file, and the children that it defines."""

import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError
from pydantic_core import PydanticCustomError

from lowbit_dist.config import FilePath, RunConfig, RunName, Section
from lowbit_dist.errors import ConfigError, format_error, nearest, show
from lowbit_dist.yamlfile import read_yaml, written

LONGEST_NAME = 74  # of a point of a grid: with -seedN it is a run's name, of at most 100 letters
OWN = ("seeds", "grid")  # what a label may have in the place of the sweep's
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
    labels = {str(label): item for label, item in (value or {}).items()}
    if len(labels) < len(value or {}):
        raise _rule("must be labels that differ as words; 1 and '1' do not")
    return labels


def _label(value: Any) -> Any:
    """Its seeds and its grid stand between its overrides."""
    own = {name: value[name] for name in OWN if name in value} if isinstance(value, Mapping) else {}
    if own:
        value = {name: item for name, item in value.items() if name not in own}
    return {"overrides": _overrides(value), **own}


def _grid(value: Any) -> Any:
    if value is not None and not isinstance(value, Mapping):
        raise _rule("must be fields with lists of values; write {optimizer.lr: [0.001, 0.004]}, for example")
    for name, values in (value or {}).items():
        if not isinstance(values, list) or not values:
            example = "0.001, 0.004" if values == [] else show(values)
            raise _rule(f"must give {name} a list of values; write {{{name}: [{example}]}}, for example")
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


Overrides = Annotated[tuple[str, ...], BeforeValidator(_overrides)]
Seeds = Annotated[tuple[int, ...], BeforeValidator(_seeds)]
Grid = Annotated[dict[str, tuple[Any, ...]], BeforeValidator(_grid)]


class Label(Section):
    """What sets the runs of a label apart."""

    overrides: tuple[str, ...] = ()
    seeds: Seeds | None = None  # None: the sweep's, as of the grid
    grid: Grid | None = None


class Definition(Section):
    """What the file says."""

    sweep: Options
    base: FilePath  # a run's configuration, beside the sweep's file
    set: Overrides = ()
    seeds: Seeds = (0,)
    runs: Annotated[dict[RunName, Annotated[Label, BeforeValidator(_label)]], BeforeValidator(_labelled)] = (
        Field(default_factory=dict)
    )
    grid: Grid = Field(default_factory=dict)
    search: Overrides | None = None  # of the runs that find each label's best point of its grid

    def variants(self) -> "list[Variant]":
        """One for each label, or one without."""
        if not self.runs:
            return [Variant(None, (), self.seeds, self.grid)]
        return [
            Variant(
                name,
                label.overrides,
                self.seeds if label.seeds is None else label.seeds,
                self.grid if label.grid is None else label.grid,
            )
            for name, label in self.runs.items()
        ]


@dataclass(frozen=True)
class Variant:
    """A label, what sets it apart, and the seeds and the grid of its runs."""

    label: str | None
    overrides: tuple[str, ...]
    seeds: tuple[int, ...]
    grid: Mapping[str, tuple[Any, ...]]

    def points(self) -> Iterator[dict[str, Any]]:
        """Every combination of the grid's values; one without any, of no grid."""
        for values in itertools.product(*self.grid.values()):
            yield dict(zip(self.grid, values, strict=True))

    def at(self, point: Mapping[str, Any]) -> "Variant":
        """The same at one point of the grid alone."""
        settings = (_override(name, value) for name, value in point.items())
        return replace(self, overrides=(*self.overrides, *settings), grid={})

    def named(self, point: Mapping[str, Any], base: Path) -> str:
        """What runs are called at a point."""
        parts = [] if self.label is None else [self.label]
        name = "-".join([*parts, *in_words(point)]) or base.stem
        if not point or len(name) <= LONGEST_NAME:
            return name
        digest = hashlib.sha256(name.encode()).hexdigest()[:8]
        return f"{name[: LONGEST_NAME - len(digest) - 1]}-{digest}"


@dataclass(frozen=True)
class Child:
    """One run of a sweep."""

    label: str
    config: RunConfig
    point: Mapping[str, Any] = field(default_factory=dict)  # of the grid

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
    remarks: tuple[str, ...] = ()  # what to say before it is run, a line each

    @property
    def name(self) -> str:
        return self.options.name

    @property
    def folder(self) -> Path:
        return self.options.dir / self.options.name


@dataclass(frozen=True)
class SweepFile:
    """A sweep's file, from which its children are made."""

    file: Path
    definition: Definition
    base: Path

    @classmethod
    def read(cls, file: Path) -> "SweepFile":
        """ConfigError for whatever is wrong with the file itself."""
        definition = _read(file)
        base = file.parent / definition.base
        if not base.is_file():
            raise ConfigError(
                f"base ({definition.base}) does not exist beside {file}; write the path of a configuration"
            )
        variants = definition.variants()
        if definition.search is not None and not any(variant.grid for variant in variants):
            raise ConfigError(
                f"search must go with a grid, whose points it tries; write grid: {{optimizer.lr: [0.001, "
                f"0.002, 0.004]}} into {file}, or leave search out"
            )
        return cls(file, definition, base)

    def sweep(
        self,
        variants: Iterable[Variant],
        *,
        suffix: str = "",
        overrides: tuple[str, ...] = (),
        remarks: tuple[str, ...] = (),
    ) -> Sweep:
        """A sweep of these variants; ConfigError for whatever is wrong with any of its children.

        suffix: of the sweep's name; overrides: of every child, over what else is said of it
        """
        options = self.definition.sweep
        options = options.model_copy(update={"name": options.name + suffix})
        children = tuple(self._children(variants, options.dir / options.name, overrides))
        return Sweep(self.file, options, children, remarks)

    def _children(
        self, variants: Iterable[Variant], folder: Path, overrides: tuple[str, ...]
    ) -> Iterator[Child]:
        from lowbit_dist import configfile

        for variant, point in ((one, point) for one in variants for point in one.points()):
            label = variant.named(point, self.base)
            for seed in variant.seeds:
                own = {"run.name": f"{label}-seed{seed}", "run.seed": seed, "run.dir": str(folder)}
                settings = (_override(*setting) for setting in own.items())
                everything = (*self.definition.set, *variant.at(point).overrides, *overrides, *settings)
                try:
                    yield Child(label, configfile.load(self.base, everything), point)
                except ConfigError as error:
                    raise ConfigError(f"{label}: {error}") from None


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


def once(sweep: Sweep) -> Sweep:
    """Without the runs that another label has, too, which is said."""
    first: dict[str, Child] = {}
    remarks: dict[str, None] = {}
    for child in sweep.children:
        if (other := first.setdefault(_all_but_its_name(child), child)) is not child:
            remarks[f"{child.label} is what {other.label} is: it is trained once, as {other.label}"] = None
    return replace(sweep, children=tuple(first.values()), remarks=(*sweep.remarks, *remarks))


def _all_but_its_name(child: Child) -> str:
    return repr({key: value for key, value in child.config.flat().items() if key != "run.name"})


def in_words(point: Mapping[str, Any]) -> list[str]:
    """The values of a point, each behind the last part of its field's name where that tells them apart."""
    short = {name: name.rpartition(".")[2] for name in point}
    if len(set(short.values())) < len(short):
        short = {name: name.replace(".", "-") for name in short}
    return [f"{short[name]}-{_word(value)}" for name, value in point.items()]


def _word(value: Any) -> str:
    """A value as a part of a name."""
    if isinstance(value, Mapping):
        value = "-".join(_word(item) for item in value.values())
    text = f"{value:g}" if isinstance(value, float) else written({"": value}).removeprefix("'': ")
    return re.sub(r"[^A-Za-z0-9._]+", "-", text).strip("-") or "x"


def check_different(children: Sequence[Child]) -> None:
    """ConfigError if two labels mean one run: its seeds would be counted twice."""
    labels: dict[str, str] = {}
    names: set[str] = set()
    for child in children:
        if child.name in names:
            raise ConfigError(
                f"grid has two points that are called {child.label}; leave one out, or write values whose "
                "names differ"
            )
        names.add(child.name)
        if (other := labels.setdefault(_all_but_its_name(child), child.label)) != child.label:
            raise ConfigError(
                f"{other} and {child.label} are the same run; change one of them, or leave it out"
            )
