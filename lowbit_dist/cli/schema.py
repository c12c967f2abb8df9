"""The JSON schema of a run's YAML file, from the models that read it.

An editor completes and checks with it: `# yaml-language-server: $schema=lowbit.schema.json` as a first line.
"""

import inspect
import sys
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from pydantic_core import to_jsonable_python

from lowbit_dist.config import RunConfig
from lowbit_dist.section import Section

DIALECT = "https://json-schema.org/draft/2020-12/schema"
# Limits of a choice between whole and other numbers, which pydantic leaves under its own names.
_LIMITS = {"gt": "exclusiveMinimum", "ge": "minimum", "lt": "exclusiveMaximum", "le": "maximum"}

Choices = Mapping[str, Mapping[str, type[Section]]]


def schema(choices: Choices, defaults: Mapping[str, str]) -> dict[str, Any]:
    """The schema of a whole configuration.

    choices: section -> name -> the class that the name stands for
    defaults: section -> the name that it has if none is given
    """
    models: list[type[BaseModel]] = [RunConfig, *(m for named in choices.values() for m in named.values())]
    references, parts = models_json_schema([(model, "validation") for model in models])
    definitions: dict[str, Any] = parts["$defs"]
    for section in definitions.values():
        for field in section.get("properties", {}).values():
            field.pop("title", None)
            for name in _LIMITS.keys() & field.keys():
                field[_LIMITS[name]] = field.pop(name)
    whole: dict[str, Any] = definitions.pop("RunConfig")
    for section, content in whole["properties"].items():
        options = []
        for name, model in choices.get(section, {}).items():
            options.append(references[(model, "validation")])
            _name(definitions[_key(options[-1])], model, name, name == defaults[section])
        if options:
            definitions.pop(_key(content), None)  # of what all of them derive from
        elif "$ref" in content:
            options = [{"$ref": content["$ref"]}]
        if options:  # an empty section of a file reads as null
            nothing = [] if section in whole["required"] and section not in choices else [{"type": "null"}]
            extra = {name: content[name] for name in ("may_change",) if name in content}
            whole["properties"][section] = {"anyOf": [*options, *nothing], **extra}
    whole["required"] = [section for section in whole["required"] if section not in defaults]
    return {"$schema": DIALECT, **whole, "$defs": definitions}


def definition(schema: Mapping[str, Any], reference: Mapping[str, Any]) -> dict[str, Any]:
    """What a `$ref` inside a schema stands for."""
    content: dict[str, Any] = schema["$defs"][_key(reference)]
    return content


def _key(reference: Mapping[str, Any]) -> str:
    key: str = reference["$ref"].rpartition("/")[2]
    return key


def _name(content: dict[str, Any], model: type[Section], name: str, is_default: bool) -> None:
    """Complete the definition of a method or an optimizer: what its name is, and what its class inherits."""
    content["description"] = meaning(model)
    fields = content.setdefault("properties", {})
    for field, values in fields.items():
        for base in model.__mro__[1:]:
            if not issubclass(base, Section) or field not in base.model_fields:
                continue
            info = base.model_fields[field]
            extra = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
            for key, value in {"description": info.description, **extra}.items():
                if value is not None:
                    values.setdefault(key, value)
        info = model.model_fields[field]
        if info.default_factory is not None:
            values.setdefault("default", to_jsonable_python(info.get_default(call_default_factory=True)))
    fields["name"] = {"const": name, "description": fields["name"].get("description", "")}
    required = set(content.get("required", ())) - {"name"}
    content["required"] = sorted(required if is_default else required | {"name"})


def meaning(model: type[Section]) -> str:
    """What a class says of itself: the first paragraph of its docstring, or of its file's."""
    text = model.__doc__ or getattr(sys.modules.get(model.__module__), "__doc__", None) or model.__name__
    return " ".join(inspect.cleandoc(text).partition("\n\n")[0].split())
