"""``harness compare``: two methods side by side, with gates for CI."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from harness.cli.output import Format, print_rows

__all__ = ["compare"]

GATE_TRIPPED = 3


def compare(
    a: Annotated[str, typer.Argument(help="The method to compare with, such as baseline.")],
    b: Annotated[str, typer.Argument(help="The method that is judged, such as gptq:bits=3.")],
    output: Annotated[Format, typer.Option("--format", help="table, json, csv or markdown.")] = Format.TABLE,
    db: Annotated[str | None, typer.Option(help="The results store (or HARNESS_DB).")] = None,
    models: Annotated[str | None, typer.Option(help="Only on these models.")] = None,
    fail_on: Annotated[
        list[str] | None,
        typer.Option(help="Exit with 3 where this holds: 'decode_latency>1.05x', 'acc<-0.01'."),
    ] = None,
) -> int:
    """Compare b with a: ratios of times and sizes, paired tests of quality."""
    from harness.chain import split_list
    from harness.cli.sweep import database
    from harness.comparing import compare_methods, parse_gate, tripped
    from harness.store.store import Store

    gates = [parse_gate(text) for text in fail_on or ()]
    with Store.open_readonly(database(db)) as store:
        found = compare_methods(store, a, b, split_list(models) if models else None)
    trips = tripped(gates, found)
    columns = [
        "model", "cell", "metric", "unit", "a", "b", "ratio", "difference", "lower", "upper", "p",
        "test", "detectable",
    ]  # fmt: skip
    print_rows([asdict(each) for each in found], columns, output, title=f"a = {a}, b = {b}")
    for gate, each in trips:
        typer.echo(
            f"gate {gate.text} trips on {each.model} {each.cell}: {each.a:.6g} -> {each.b:.6g}",
            err=True,
        )
    return GATE_TRIPPED if trips else 0
