"""`lowbit config`: every field of a run's configuration, with its meaning, as the models say it."""

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowbit_dist.cli import console
from lowbit_dist.cli.arguments import Json
from lowbit_dist.errors import ConfigError, plain
from lowbit_dist.yamlfile import written

if TYPE_CHECKING:
    from rich.console import Console

PAGE = """# The configuration of a run

Every field of a run's YAML file.  Each but `data.path` has a default, and each is set on the command line by
its dotted name: `lowbit train configs/quickstart.yaml train.steps=50 'method={name: dense}'`.

An editor completes and checks the file with a JSON schema: `lowbit config --schema > lowbit.schema.json`, and
`# yaml-language-server: $schema=lowbit.schema.json` as the file's first line.

What has a star may have another value when a run of the same name is resumed.  `lowbit config --markdown`
prints this page.
"""
LIMITS = ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum")
LARGE = 1_000_000  # larger limits keep products of two numbers below 2^63, and tell a reader nothing


def config(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME",
            help="Show this section or field alone, for example train, method.grid or adamw.",
            show_default=False,
        ),
    ] = None,
    as_schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema, for editors.")] = False,
    as_page: Annotated[bool, typer.Option("--markdown", help="Print a page in Markdown.")] = False,
    as_json: Json = False,
) -> None:
    """Show every field of a run's configuration, with its meaning, type, default and unit.

    The methods and optimizers of installed packages are among them.

    Example: lowbit config train.batch_tokens
    """
    with console.answering(as_json) as answer:
        if as_schema:
            if name is not None or as_page or as_json:
                raise ConfigError(
                    "--schema is of the whole configuration; write lowbit config --schema alone"
                )
            text = json.dumps(schema(), indent=2)
            answer({}, lambda terminal: terminal.out(text, highlight=False))
            return
        sections = chosen(name)
        if as_page:
            text = page(sections, whole=name is None)
            answer({"page": text}, lambda terminal: terminal.out(text, end="", highlight=False))
            return
        answer({"sections": sections}, lambda terminal: draw(terminal, sections))


def chosen(name: str | None = None) -> list[dict[str, Any]]:
    """The sections, or what is called `name` in them; ConfigError if nothing is."""
    from lowbit_dist import configfile
    from lowbit_dist.config import RunConfig

    if name is None:
        return reference()
    section = name.partition(".")[0]
    # Methods and optimizers take seconds to import: not for what is in none of them.
    is_light = section in RunConfig.model_fields and section not in configfile.CHOSEN
    picked = []
    for part in reference(choices=not is_light):
        if name in (part["section"], part["choice"]):
            picked.append(part)
            continue
        fields = [
            field for field in part["fields"] if name in (field["name"], f"{part['section']}.{field['name']}")
        ]
        if fields:
            picked.append(part | {"fields": fields})
    if not picked:
        raise configfile.unknown(name)
    return picked


def schema(*, installed: bool = True) -> dict[str, Any]:
    """The JSON schema of a run's file; what is installed and cannot be imported is said, and left out."""
    models, errors = _choices(installed=installed)
    for error in errors.values():
        print(f"lowbit: {error}", file=sys.stderr)
    return _schema(models)


def reference(*, choices: bool = True, installed: bool = True) -> list[dict[str, Any]]:
    """Sections with their fields, in the order of `RunConfig`; a section of a method for each method.

    choices: methods and optimizers, too; installed: those of other packages among them
    """
    from lowbit_dist import configfile
    from lowbit_dist.cli.schema import definition, meaning

    models, errors = _choices(installed=installed) if choices else ({}, {})
    whole = _schema(models)
    sections: list[dict[str, Any]] = []

    def add(section: str, text: str, fields: Iterable[dict[str, Any]], choice: str | None = None) -> None:
        is_free = bool(whole["properties"][section].get("may_change"))
        part = {"section": section, "choice": choice, "meaning": text, "may_change": is_free}
        sections.append(part | {"fields": list(fields)})

    for section, content in whole["properties"].items():
        parts = [definition(whole, option) for option in content.get("anyOf", ()) if "$ref" in option]
        if section in configfile.CHOSEN:
            registry, default = configfile.CHOSEN[section]
            name = _field("name", {"description": registry.base.model_fields["name"].description}, whole)
            names = ", ".join(registry.names() if installed else registry.own)
            add(section, meaning(registry.base), [name | {"default": default, "values": names}])
            for choice, part in zip(models.get(section, ()), parts, strict=False):
                add(section, part["description"], _fields(part, whole, without="name"), choice)
            for (chosen_in, choice), error in errors.items():
                if chosen_in == section:
                    add(section, error, (), choice)
        elif parts:
            add(section, parts[0].get("description", ""), _fields(parts[0], whole))
        else:
            add(section, "", [_field(section, content, whole)])
    return sections


def _choices(*, installed: bool) -> tuple[dict[str, dict[str, Any]], dict[tuple[str, str], str]]:
    """Section -> name -> class; and (section, name) -> why it cannot be imported."""
    from lowbit_dist import configfile

    models: dict[str, dict[str, Any]] = {}
    errors = {}
    for section, (registry, _) in configfile.CHOSEN.items():
        models[section] = {}
        for name in registry.names() if installed else registry.own:
            try:
                models[section][name] = registry.load(name) if installed else registry.load_own(name)
            except ConfigError as error:
                errors[section, name] = str(error)
    return models, errors


def _schema(models: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    from lowbit_dist import configfile
    from lowbit_dist.cli import schema

    return schema.schema(models, {section: default for section, (_, default) in configfile.CHOSEN.items()})


def _fields(part: Mapping[str, Any], whole: Mapping[str, Any], without: str = "") -> Iterator[dict[str, Any]]:
    for name, values in part.get("properties", {}).items():
        if name != without:
            yield _field(name, values, whole) | {"required": name in part.get("required", ())}


def _field(name: str, values: Mapping[str, Any], whole: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "name": name,
        "meaning": values.get("description") or "",
        "values": in_words(values, whole),
        "unit": values.get("unit"),
        "default": values.get("default"),
        "required": False,
        "may_change": bool(values.get("may_change")),
    }


def in_words(values: Mapping[str, Any], whole: Mapping[str, Any]) -> str:
    """What a part of a JSON schema allows, as a person says it."""
    words = _alternatives(values, whole)
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _alternatives(values: Mapping[str, Any], whole: Mapping[str, Any]) -> list[str]:
    if "$ref" in values:
        from lowbit_dist.cli.schema import definition

        inner = definition(whole, values).get("properties", {})
        return ["{" + ", ".join(f"{name}: {in_words(part, whole)}" for name, part in inner.items()) + "}"]
    if "const" in values:
        return [plain(values["const"])]
    if "enum" in values:
        return [plain(value) for value in values["enum"]]
    if "anyOf" in values:
        limits = {name: values[name] for name in LIMITS if name in values}
        options = values["anyOf"]
        if any(option.get("type") == "number" for option in options):  # whole ones are among them
            options = [option for option in options if option.get("type") != "integer"]
        return [word for option in options for word in _alternatives({**limits, **option}, whole)]
    kind = values.get("type")
    if kind in ("integer", "number"):
        step = f", a multiple of {values['multipleOf']:,}" if "multipleOf" in values else ""
        return [("whole number" if kind == "integer" else "number") + _range(values) + step]
    if kind == "array":
        items = values.get("prefixItems") or [values.get("items", {})]
        length = f" of {len(items)}" if "prefixItems" in values else ""
        return [f"list{length}: " + ", ".join(dict.fromkeys(in_words(item, whole) for item in items))]
    if kind == "string":
        return ["path" if values.get("format") == "path" else "text"]
    names = {"boolean": "true or false", "null": "null", "object": "mapping"}
    return [names.get(str(kind), "any value")]


def _range(values: Mapping[str, Any]) -> str:
    least, above, most, below = (values.get(name) for name in LIMITS)
    low = f" from {_number(least)}" if least is not None else ""
    low = f" above {_number(above)}" if above is not None else low
    if most is not None and most < LARGE:
        return f"{low} to {_number(most)}" if least is not None else f"{low}, at most {_number(most)}"
    if below is not None and below < LARGE:
        return f"{low}, below {_number(below)}"
    return f"{low} up" if least is not None else low


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _as_yaml(field: Mapping[str, Any]) -> str:
    """`steps: 300`, as it would stand in a file; of a required field, what is to stand there."""
    if field["required"]:
        return f"{field['name']}: {field['values'].upper()}"
    return written({field["name"]: field["default"]}).strip()


def _rules(field: Mapping[str, Any]) -> str:
    unit = f" ({field['unit']})" if field["unit"] else ""
    notes = ["required"] * field["required"] + ["may change on resume"] * field["may_change"]
    return "; ".join([field["values"] + unit, *notes])


def draw(terminal: "Console", sections: list[dict[str, Any]]) -> None:
    """Each field as it stands in a file, and beside it what it means and what it may be."""
    from rich.markup import escape
    from rich.table import Table

    lines = [_as_yaml(field) for part in sections for field in part["fields"]]
    left = min(max(map(len, lines), default=0) + 2, max(24, terminal.width // 2 - 4))
    for part in sections:
        is_field = [field["name"] for field in part["fields"]] == [part["section"]]
        if not is_field:
            name = f" {{name: {part['choice']}}}" if part["choice"] else ""
            note = " [dim](may change on resume)[/]" if part["may_change"] else ""
            terminal.print(f"[bold]{escape(part['section'])}:{escape(name)}[/]{note}")
            terminal.print(part["meaning"], style="italic", markup=False)
        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 1))
        table.add_column(width=left, overflow="fold")
        table.add_column(overflow="fold")
        for field in part["fields"]:
            text = escape(("" if is_field else "  ") + _as_yaml(field))
            table.add_row(text, f"{escape(field['meaning'])}\n[dim]{escape(_rules(field))}[/]")
        if part["fields"]:
            terminal.print(table)
        terminal.print()


def page(sections: list[dict[str, Any]], *, whole: bool = True) -> str:
    """The same as a page in Markdown."""
    lines = [PAGE] if whole else []
    for part in sections:
        name = f": {{name: {part['choice']}}}" if part["choice"] else ""
        lines += [f"## `{part['section']}{name}`{' *' if part['may_change'] else ''}", ""]
        if part["meaning"]:
            lines += [part["meaning"], ""]
        if part["fields"]:
            lines += ["| field | default | values | unit | meaning |", "|---|---|---|---|---|"]
        for field in part["fields"]:
            name = f"`{field['name']}`{' *' if field['may_change'] else ''}"
            default = "required" if field["required"] else f"`{_as_yaml(field).partition(': ')[2]}`"
            cells = (name, default, field["values"], field["unit"] or "", field["meaning"])
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines += [""] if part["fields"] else []
    return "\n".join(lines)
