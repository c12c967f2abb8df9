"""YAML text to plain values, and back: the core schema of YAML 1.2, each name once.

`1e-3` is a number; `no` and `2024-01-01` are text.  Tags, anchors and aliases are refused, so a file can
neither build objects nor grow when it is read.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from lowbit_dist.errors import ConfigError, show

LARGEST_FILE = 1 << 20  # bytes; what is larger is not a configuration

# Numbers and constants: what is none of these is text.
_INT = re.compile(r"[-+]?[0-9](?:_?[0-9])*|0x[0-9a-fA-F]+")
_FLOAT = re.compile(
    r"[-+]?(?:[0-9][0-9_]*(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
# Longer runs of digits stay text: no count has them, and Python limits their conversion.
_SHORT = r"(?=[^\n]{1,40}\Z)"


class _Loader(yaml.SafeLoader):
    """YAML's core schema, without tags and aliases, every name once."""

    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012 (as in the class above it)

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise yaml.composer.ComposerError(
                None, None, "anchors and aliases are not allowed; write the value itself", event.start_mark
            )
        if (tag := getattr(event, "tag", None)) is not None:
            raise yaml.composer.ComposerError(
                None, None, f"tags are not allowed ({show(tag)}); write plain values", event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        mapping: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int | float | None):
                raise yaml.constructor.ConstructorError(
                    None,
                    None,
                    f"a name must be a word, not {show(key)}; write name: value",
                    key_node.start_mark,
                )
            if key in mapping:
                raise yaml.constructor.ConstructorError(
                    None,
                    None,
                    f"{show(key)} stands here a second time; keep one of them",
                    key_node.start_mark,
                )
            mapping[key] = self.construct_object(value_node, deep=deep)
        return mapping


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader` would not read back as text."""

    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012 (as in the class above it)

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _construct_int(loader: Any, node: Any) -> int:
    text = loader.construct_scalar(node).replace("_", "")
    return int(text, 16) if text.startswith("0x") else int(text)


def _construct_float(loader: Any, node: Any) -> float:
    text = loader.construct_scalar(node).replace("_", "").lower()
    return float(text.replace(".inf", "inf").replace(".nan", "nan"))


def _construct_mapping(loader: Any, node: Any) -> Any:
    return loader.construct_mapping(node, deep=True)


for _tag, _pattern, _first in (
    ("null", r"(?:~|null|Null|NULL|)\Z", ["~", "n", "N", ""]),
    ("bool", r"(?:true|True|TRUE|false|False|FALSE)\Z", list("tTfF")),
    ("int", rf"{_SHORT}(?:{_INT.pattern})\Z", list("-+0123456789")),
    ("float", rf"{_SHORT}(?:{_FLOAT.pattern})\Z", list("-+.0123456789")),
):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _construct_float)
_Loader.add_constructor("tag:yaml.org,2002:map", _construct_mapping)


def parse(text: str, place: str) -> Any:
    """The value of a YAML text; `place` names it in messages."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = error.problem or error.context or "not YAML"
        instead = (
            "" if ";" in problem else "; write name: value, indented with spaces, text with signs in quotes"
        )
        raise ConfigError(f"{place}{line}: {problem}{instead}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{place} is not YAML text: {str(error).splitlines()[0]}; leave it out") from None
    except RecursionError:
        raise ConfigError(f"{place} is nested too deeply for a configuration; write plain sections") from None


def written(data: dict[str, Any]) -> str:
    """YAML that `parse` reads back as equal data: one line a section."""
    lines = []
    for name, content in data.items():
        text = yaml.dump(
            content, Dumper=_Dumper, sort_keys=False, default_flow_style=True, allow_unicode=True, width=10**9
        )
        plain = text.removesuffix("...\n").strip()  # "..." ends a document that is a bare word
        lines.append(f"{name}: {plain}\n")
    return "".join(lines)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping that a configuration file holds; an empty file is an empty mapping."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            raw = file.read(LARGEST_FILE + 1)
    except FileNotFoundError:
        raise ConfigError(
            f"{file_name(path)} does not exist; write the path of a configuration file"
        ) from None
    except IsADirectoryError:
        raise ConfigError(
            f"{file_name(path)} is a folder; write the path of a configuration file in it"
        ) from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ConfigError(
            f"{file_name(path)} cannot be read: {reason}; write the path of a configuration file"
        ) from None
    if len(raw) > LARGEST_FILE:
        raise ConfigError(
            f"{file_name(path)} is larger than 1 MiB, which no configuration is; write another path"
        )
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{file_name(path)} is not UTF-8 text (byte {error.start:,}); save it as UTF-8"
        ) from None
    data = parse(text, file_name(path))
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(
            f"{file_name(path)} ({show(data)}) must be a mapping of sections; "
            "write data: {path: FOLDER}, for example"
        )
    return data


def file_name(path: Path) -> str:
    name = str(path)
    return name if name.isprintable() else repr(name)
