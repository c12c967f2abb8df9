"""The one door through which a configuration comes in: a YAML file, a mapping, `key=value` overrides.

Unknown names, options that belong to another method and values of the wrong kind are each answered in one
line.  This is the only reader of configurations, and the only file that knows which methods and optimizers
there are (registry.py says where they come from); everything else is handed a `RunConfig`.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticUndefined

from lowbit_dist import synonyms
from lowbit_dist.config import RunConfig
from lowbit_dist.errors import ConfigError, format_error, nearest, plain, show
from lowbit_dist.methods import METHODS, Method
from lowbit_dist.optim import OPTIMIZERS, Rule
from lowbit_dist.precision import is_word, written_out
from lowbit_dist.registry import Registry
from lowbit_dist.section import Section
from lowbit_dist.yamlfile import parse, read_yaml

S = TypeVar("S", bound=Section)
NEARLY_EQUAL = 0.85  # the likeness of a misspelt name of another section

# Sections whose fields are those of the class that their `name` stands for, and their default names.
CHOSEN = {
    "method": (Registry("method", "lowbit_dist.methods", METHODS, Method), "dqt"),
    "optimizer": (Registry("optimizer", "lowbit_dist.optimizers", OPTIMIZERS, Rule), "adamw"),
}


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read `path`, then apply `key=value` overrides with dotted names; the last of equal names counts."""
    data = read_yaml(path)
    for override in overrides:
        _apply_override(data, override)
    return from_dict(data)


def from_dict(data: Mapping[str, Any]) -> RunConfig:
    """Check a nested mapping, for instance a parsed YAML file; sections may be missing or None."""
    if not isinstance(data, Mapping):
        raise ConfigError(f"a configuration must be a mapping of sections, not {show(data)}")
    sections: dict[str, Any] = {}
    for name, content in data.items():
        if name not in RunConfig.model_fields:
            raise _unknown(None, name)
        if name == "precision" and isinstance(content, str):  # short for a section
            sections[name] = content
            continue
        # An empty section of a file (`train:` with every line commented out) reads as None.
        content = {} if content is None else content
        if not isinstance(content, Mapping):
            raise ConfigError(
                f"{name} ({show(content)}) must be a section of names and values; {_section_example(name)}"
            )
        for field in content:
            if name not in CHOSEN and field not in _section_fields(name):
                raise _unknown(name, field)
        sections[name] = dict(content)
    for name in CHOSEN:
        sections[name] = _chosen(name, sections.get(name, {}))
    sections.setdefault("data", {})
    return _validated(RunConfig, sections, ())


def providers(content: Mapping[str, Any]) -> dict[str, str]:
    """The installed packages that a run's method and optimizer come from: name -> version and hash of source.

    content: as `RunConfig.to_dict` gives it; what is not installed on this machine is left out
    """
    packages: dict[str, str] = {}
    for section, (registry, _) in CHOSEN.items():
        packages |= registry.provider(content[section]["name"])
    return packages


def is_field(name: str) -> bool:
    """Whether a field has this name, with its section or without, here or in other projects."""
    names = _full_names()
    return name in names or name in names.values() or synonyms.answer(name) is not None


def unknown(name: str) -> ConfigError:
    """The answer to who asks for a section, a field or a `section.field` that there is not."""
    section, _, field = name.partition(".")
    if section in CHOSEN:
        here = [option for options in _own_options(section).values() for option in options.model_fields]
        meant = _elsewhere(section, field, here)
        known = f"known names are {', '.join(dict.fromkeys(here))}"
        return ConfigError(f"{section}: unknown name {show(field)}; {meant or known}")
    return _unknown(section, field) if field and section in RunConfig.model_fields else _unknown(None, name)


def _chosen(section: str, content: Mapping[Any, Any]) -> Section:
    registry, default = CHOSEN[section]
    name = content.get("name", default)
    options: type[Section] = registry.load(name)
    named = options.model_fields.get("name")
    own_name = named.default if named is not None else show(getattr(options, "name", None))
    if own_name not in (name, PydanticUndefined):
        raise ConfigError(
            f"{section}.name ({show(name)}) stands for {options.__module__}.{options.__qualname__}, whose "
            f"own name is {show(own_name)}; mend the package that it comes from: both must be equal"
        )
    for field in content:
        if field not in options.model_fields:
            raise _unknown_option(section, name, options, field)
    chosen = _validated(options, {**content, "name": name}, (section,))
    if name not in registry.own and not _comes_back(chosen):
        raise ConfigError(
            f"{section}.name ({show(name)}) has options that do not come back from YAML as they were; mend "
            "the package that it comes from: each must accept what it is written as"
        )
    return chosen


def _comes_back(section: Section) -> bool:
    """Whether what a section is written as, to workers and files, reads as the same section."""
    try:
        return type(section).model_validate(section.model_dump(mode="json")) == section
    except ValidationError:
        return False


def _unknown_option(section: str, name: str, options: type[Section], field: Any) -> ConfigError:
    """The answer to a wrong name in a section that is chosen by name: the choice that has it, the same name
    elsewhere, else the nearest.
    """
    known = [option for option in options.model_fields if option != "name"]
    owners = [other for other, model in _own_options(section).items() if field in model.model_fields]
    start = f"{section}: unknown name {show(field)}"
    if owners:
        return ConfigError(
            f"{start} for {section} {name}; it belongs to {', '.join(owners)}: leave it out "
            f"({section}={{name: {name}}} drops a file's other options)"
        )
    if meant := _elsewhere(section, field, (*known, "name")):
        return ConfigError(f"{start}; {meant}")
    return ConfigError(f"{start}; {section} {name} has {', '.join(known) if known else 'no options'}")


def _unknown(section: str | None, field: Any) -> ConfigError:
    """The answer to a wrong name."""
    here = RunConfig.model_fields if section is None else _section_fields(section)
    start = f"{section}: unknown name {show(field)}" if section else f"unknown name {show(field)}"
    if meant := _elsewhere(section, field, here):
        return ConfigError(f"{start}; {meant}")
    return ConfigError(f"{start}; known names are {', '.join(here)}")


def _elsewhere(section: str | None, field: Any, here: Iterable[str]) -> str | None:
    """What may have been meant by a name that is not among those `here`, in words.

    The same name elsewhere comes first, then what other projects call things, then the nearest here.  A name
    of another section that is only alike is no help, unless it is nearly equal.
    """
    if section is not None and field in RunConfig.model_fields:
        return f"{field} stands beside {section}, not in it: move it out"
    elsewhere = _full_names()
    if (meant := elsewhere.get(field)) is None:
        if isinstance(field, str) and (answer := synonyms.answer(field)):
            return answer
        meant = nearest(field, here)
    if meant is None and (far := nearest(field, elsewhere, NEARLY_EQUAL)):
        meant = elsewhere[far]
    return f"did you mean {meant!r}?" if meant else None


@cache
def _full_names() -> dict[str, str]:
    """Field -> `section.field`, of the first section that has it; options of this package's choices, too."""
    names: dict[str, str] = {}
    for section in RunConfig.model_fields:
        for option in _section_fields(section):
            names.setdefault(option, f"{section}.{option}")
    for section in CHOSEN:
        for options in _own_options(section).values():
            for option in options.model_fields:
                names.setdefault(option, f"{section}.{option}")
    return names


@cache
def _own_options(section: str) -> dict[str, type[Section]]:
    """This package's own choices; those of other packages are imported by whoever names them alone."""
    registry, _ = CHOSEN[section]
    return {name: registry.load_own(name) for name in registry.own}


def _section_fields(name: str) -> Mapping[str, Any]:
    section = RunConfig.model_fields[name].annotation
    return section.model_fields if isinstance(section, type) and issubclass(section, BaseModel) else {}


def _section_example(name: str) -> str:
    examples = {"data": "path: data/stdlib", "model": "preset: tiny"}
    examples |= {chosen: f"name: {default}" for chosen, (_, default) in CHOSEN.items()}
    if name in examples:
        return f"write {name}: {{{examples[name]}}}"
    field, info = next(iter(_section_fields(name).items()))
    return f"write {name}: {{{field}: {plain(info.default)}}}"


def _validated(section: type[S], content: Mapping[str, Any], prefix: tuple[str, ...]) -> S:
    try:
        return section.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=True)[0]
        raise ConfigError(format_error(section, dict(first), prefix)) from None


def _apply_override(data: dict[str, Any], override: str) -> None:
    """Set one `section.field=value` (or `section={...}`) in the nested mapping `data`."""
    name, equals, text = override.partition("=")
    name = name.strip()
    parts = name.split(".")
    if not equals or not all(parts) or len(parts) > 2:
        instead = (
            f"write {parts[0]}.{parts[1]}=VALUE" if len(parts) == 2 and all(parts) else "write train.steps=20"
        )
        raise ConfigError(f"override ({show(override)}) must be section.field=value; {instead}, for example")
    value = parse(text, f"override {show(override)}")
    if len(parts) == 1:
        data[name] = value
        return
    section, field = parts
    if section in RunConfig.model_fields and _is_text(section, field):
        # A shell takes quotes away: `run.name=2024` and `data.path=a: b` still mean text.
        empty = text.strip() in ("", "~", "null", "Null", "NULL")
        value = value if empty or isinstance(value, str) else text.strip()
    content = data.get(section)
    if section == "precision" and is_word(content):
        content = data[section] = written_out(content)
    if content is None:
        content = data[section] = {}
    if isinstance(content, dict):  # if not, the section itself is the mistake, and is said to be
        content[field] = value


def _is_text(section: str, field: str) -> bool:
    info = _section_fields(section).get(field)
    return info is not None and any(kind in (str, Path) for kind in _types(info.annotation))


def _types(annotation: Any) -> Iterator[Any]:
    """Every type inside an annotation."""
    yield annotation
    for argument in get_args(annotation):
        yield from _types(argument)


def changed(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """The configuration that results when `changes` are written behind the same file."""
    content = config.model_dump(mode="json", exclude_unset=True)
    for name, value in changes.items():
        section, _, field = name.partition(".")
        content[section] = {**content.get(section, {}), field: value} if field else value
    return from_dict(content)
