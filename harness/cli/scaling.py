"""``harness scaling``: how time and memory grow with the prompt."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from harness.cli.output import Format, format_value, print_rows

if TYPE_CHECKING:
    from harness.comparing import LengthSweep
    from harness.scaling import Exponent

__all__ = ["scaling"]


def scaling(
    output: Annotated[Format, typer.Option("--format", help="table, json, csv or markdown.")] = Format.TABLE,
    db: Annotated[str | None, typer.Option(help="The results store (or HARNESS_DB).")] = None,
    models: Annotated[str | None, typer.Option(help="Only these models.")] = None,
    methods: Annotated[str | None, typer.Option(help="Only these methods, as written.")] = None,
    metrics: Annotated[str | None, typer.Option(help="Only these metrics.")] = None,
) -> None:
    """Show the measured exponent of each cost over the prompt length, per variant and batch size.

    Needs three prompt lengths or more: harness sweep --prompt-lens 512,2048,8192.
    """
    from harness.chain import split_optional
    from harness.cli.sweep import database
    from harness.comparing import length_sweeps
    from harness.comparing.lengths import GROWING
    from harness.errors import UnknownName
    from harness.store.store import Store

    with Store.open_readonly(database(db)) as store:
        found = length_sweeps(store, split_optional(models), split_optional(methods))
    wanted = split_optional(metrics)
    if unknown := [name for name in wanted or () if name not in GROWING]:
        raise UnknownName("metric that grows with the prompt:", unknown[0], GROWING)
    rows = [_row(sweep, output) for sweep in found if wanted is None or sweep.metric in wanted]
    columns = ["model", "method", "metric", "batch_size", "mode", "basis", "exponent"]
    columns += ["lengths", "local", "note"]
    if output is Format.CSV:
        columns[6:7] = ["exponent", "lower", "upper"]
    print_rows(rows, columns, output)


def _row(sweep: LengthSweep, output: Format) -> dict[str, Any]:
    shown = {name: value for name, value in asdict(sweep).items() if name not in ("values", "exponent")}
    fitted = sweep.exponent
    if output is Format.JSON:
        shown["values"] = {str(length): value for length, value in sweep.values.items()}
        shown["fit"] = None if fitted is None else asdict(fitted)
        return shown
    shown["lengths"] = " ".join(map(str, sweep.values))
    shown["local"] = "" if fitted is None else "; ".join(map(_local, fitted.local))
    if output is Format.CSV:
        bounds = ("exponent", "lower", "upper")
        return shown | {name: None if fitted is None else getattr(fitted, name) for name in bounds}
    return shown | {"exponent": "" if fitted is None else _with_bounds(fitted)}


def _local(fitted: Exponent) -> str:
    return f"{fitted.first:g}-{fitted.last:g}: {_with_bounds(fitted)}"


def _with_bounds(fitted: Exponent) -> str:
    text = format_value(fitted.exponent)
    if fitted.lower is None or fitted.upper is None:
        return text
    return f"{text} [{format_value(fitted.lower)}, {format_value(fitted.upper)}]"
