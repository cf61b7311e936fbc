"""``harness methods | models | tasks | plugins``: what there is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from harness.cli.output import Format, print_rows, say

__all__ = ["methods", "models", "plugins", "tasks"]

FormatOption = Annotated[Format, typer.Option("--format", help="table, json, csv or markdown.")]
PluginOption = Annotated[list[str] | None, typer.Option("--plugin", help="A plugin: FILE.py or a module.")]


def methods(
    name: Annotated[str | None, typer.Argument(help="Show one method: its card and options.")] = None,
    output: FormatOption = Format.TABLE,
    plugin: PluginOption = None,
) -> None:
    """List the methods, or show the card and the options of one."""
    from harness.plugins import load_plugins

    loaded = load_plugins(plugin or ())
    if name is not None:
        _show_method(loaded.method(name), output)
        return
    rows = [_method_row(method) for method in loaded.methods.values()]
    print_rows(rows, ["method", "family", "needs", "options", "claim"], output)


def _method_row(method: Any) -> dict[str, Any]:
    needs = "depends on options" if callable(method.needs) else ", ".join(sorted(method.needs))
    return {
        "method": method.name,
        "family": method.family,
        "needs": needs,
        "options": ", ".join(method.options.model_fields),
        "claim": method.claim,
        "paper": str(method.paper) if method.paper else None,
        "schema": method.options.model_json_schema(),
    }


def _show_method(method: Any, output: Format) -> None:
    rows = option_rows(method)
    if output is Format.JSON:
        print_rows([_method_row(method)], [], output)
        return
    if output is Format.TABLE:
        for line in (f"{method.name} ({method.family})", "", *method.card.splitlines(), ""):
            say(line)
    print_rows(rows, ["option", "type", "default", "meaning"], output)


def option_rows(method: Any) -> list[dict[str, Any]]:
    """The options of a method, one row each."""
    schema = method.options.model_json_schema()
    known = schema.get("$defs", {})
    rows = []
    for name, field in method.options.model_fields.items():
        described = schema.get("properties", {}).get(name, {})
        default = "required" if field.is_required() else str(described.get("default", field.default))
        rows.append(
            {
                "option": name,
                "type": _type_of(described, known),
                "default": default,
                "meaning": field.description or "",
            }
        )
    return rows


def _type_of(described: dict[str, Any], known: dict[str, Any]) -> str:
    """A field's JSON schema in words; `known` holds what it refers to by name."""
    if "$ref" in described:
        return _type_of(known[described["$ref"].rpartition("/")[2]], known)
    if "enum" in described:
        return " | ".join(str(value) for value in described["enum"])
    if "const" in described:
        return str(described["const"])
    if "anyOf" in described:
        return " | ".join(_type_of(each, known) for each in described["anyOf"])
    text = str(described.get("type", "any"))
    bounds = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    limits = [f"{sign} {described[key]}" for key, sign in bounds.items() if key in described]
    return f"{text} {' and '.join(limits)}".strip()


def models(output: FormatOption = Format.TABLE, plugin: PluginOption = None) -> None:
    """List the models that can be named; hub ids and directories work besides."""
    from harness.errors import HarnessError
    from harness.models.loading import describe, resolve_model, zoo_names
    from harness.models.shapes import SCRATCH, SHAPES
    from harness.plugins import load_plugins

    loaded = load_plugins(plugin or ())
    named = [(f"zoo:{name}", "bundled, trained") for name in zoo_names()]
    named += [(entry.name, entry.summary) for entry in loaded.models.values()]
    named += [(f"shape:{name}", "random weights: speed and memory only") for name in SHAPES]
    named += [(f"scratch:{name}", "untrained: trained after the transform") for name in SCRATCH]
    rows: list[dict[str, Any]] = []
    for name, summary in named:
        row: dict[str, Any] = {"model": name, "summary": summary}
        try:
            info = describe(resolve_model(name, loaded.models)).info
            row |= {
                "family": info.family,
                "kind": info.kind,
                "layers": info.num_layers,
                "width": info.hidden_size,
                "heads": info.num_heads,
                "kv_heads": info.num_kv_heads,
                "positions": info.max_positions,
                "synthetic": info.synthetic,
            }
        except HarnessError as error:  # one that cannot be loaded here hides none of the others
            row["summary"] = f"{summary}; {error}"
        rows.append(row)
    columns = ["model", "family", "kind", "layers", "width", "heads", "kv_heads", "positions"]
    print_rows(rows, [*columns, "summary"], output)


def tasks(
    output: FormatOption = Format.TABLE,
    include_path: Annotated[
        list[Path] | None, typer.Option(help="A folder with lm-eval task files of your own.")
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="List lm-eval's own tasks too (many thousands).")
    ] = False,
    plugin: PluginOption = None,
) -> None:
    """List the bundled tasks and your own; every lm-eval task can be named besides."""
    from dataclasses import asdict

    from harness.evaluate.index import list_tasks
    from harness.plugins import load_plugins

    loaded = load_plugins(plugin or ())
    folders = [*(include_path or []), *(Path(source.path) for source in loaded.task_sources)]
    found = [asdict(info) for info in list_tasks(tuple(folders), all=everything)]
    rows = [{"task": row.pop("name"), **row} for row in found]
    print_rows(rows, ["task", "origin", "output_type", "summary"], output)


def plugins(output: FormatOption = Format.TABLE, plugin: PluginOption = None) -> None:
    """List what was found and loaded, and what is broken and why."""
    from dataclasses import asdict

    from harness.plugins import load_plugins

    rows = []
    for report in load_plugins(plugin or ()).reports:
        row = asdict(report)
        registers = [*row["methods"], *row["models"], *row["tasks"], *row["meters"], *row["claims"]]
        rows.append({**row, "plugin": row.pop("name"), "registers": ", ".join(registers)})
    print_rows(rows, ["plugin", "origin", "location", "registers", "error"], output)
