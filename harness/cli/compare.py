"""``harness compare``: methods side by side, with gates for CI."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from harness.cli.output import Format, print_rows, say

if TYPE_CHECKING:
    from harness.comparing import BreakEvenRow, Comparison, Gate
    from harness.store.store import Store

__all__ = ["compare"]

REFUSED = 2
GATE_TRIPPED = 3


def compare(
    a: Annotated[str, typer.Argument(help="The method to compare with, such as baseline.")],
    b: Annotated[
        list[str] | None,
        typer.Argument(help="The methods that are judged, such as gptq:bits=3 smoothquant."),
    ] = None,
    output: Annotated[Format, typer.Option("--format", help="table, json, csv or markdown.")] = Format.TABLE,
    db: Annotated[str | None, typer.Option(help="The results store (or HARNESS_DB).")] = None,
    models: Annotated[str | None, typer.Option(help="Only on these models.")] = None,
    metrics: Annotated[str | None, typer.Option(help="Only these metrics.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Judge every other method in the store.")] = False,
    break_even: Annotated[
        bool,
        typer.Option("--break-even", help="The batch size at which each judged method breaks even with a."),
    ] = False,
    allow_different: Annotated[
        bool,
        typer.Option(
            "--allow-different",
            help="Show rows of different devices, clocks, versions or settings too, marked DIFFERENT.",
        ),
    ] = False,
    fail_on: Annotated[
        list[str] | None,
        typer.Option(help="Exit with 3 where this holds: 'decode_latency>1.05x', 'acc<-0.01'."),
    ] = None,
) -> int:
    """Compare methods with a: ratios of times and sizes, paired tests of quality.

    Rows that were measured under different conditions are refused (exit code 2). P-values are adjusted
    over all tests of the call, so give several methods at once.
    """
    from harness.chain import split_list
    from harness.cli.sweep import database
    from harness.comparing import break_even_batches, compare_methods, parse_gate
    from harness.store.store import Store

    gates = [parse_gate(text) for text in fail_on or ()]
    only = split_list(models) if models else None
    with Store.open_readonly(database(db)) as store:
        others = _others(store, a, b or (), every, only, timed=break_even)
        if break_even:
            found = break_even_batches(store, a, others, only)
            return _print_break_even(found, allow_different, output)
        wanted = split_list(metrics) if metrics else None
        rows = compare_methods(store, a, others, only, metrics=wanted, allow_different=True)
    return _print_comparison(rows, gates, a, others, allow_different, output)


def _others(
    store: Store, a: str, named: Sequence[str], every: bool, models: Sequence[str] | None, *, timed: bool
) -> list[str]:
    from harness.chain import split_list
    from harness.errors import ConfigError
    from harness.store import queries

    if not every:
        if not named:
            raise ConfigError(f"name the methods to compare with {a}, or give --all")
        return list(dict.fromkeys(method for text in named for method in split_list(text)))
    if named:
        raise ConfigError("give either the methods to judge or --all")
    frame = queries.results(store, models=models, statuses=["ok"])
    kept = frame[frame["kind"] == "scenario"] if timed else frame
    return sorted(set(kept["method"]) - {a})


# --- comparing ----------------------------------------------------------------------------------------

_COLUMNS = (
    "model", "method_b", "cell", "metric", "unit", "a", "b", "ratio", "difference", "lower", "upper",
    "p", "test", "detectable", "basis", "verdict", "flags",
)  # fmt: skip


def _print_comparison(
    rows: Sequence[Comparison],
    gates: Sequence[Gate],
    a: str,
    others: Sequence[str],
    allow_different: bool,
    output: Format,
) -> int:
    from harness.comparing import adjusted, incomparable, tripped

    refused = [row for row in rows if not row.is_comparable]
    shown = adjusted(rows if allow_different else [row for row in rows if row.is_comparable])
    judged = gates
    if refused and not allow_different:
        # A gate on rows that are left out neither trips nor passes.
        judged = [gate for gate in gates if any(row.metric == gate.metric for row in shown)]
    trips = tripped(judged, shown)
    columns = [name for name in _COLUMNS if name != "method_b" or len(others) > 1]
    columns = list(asdict(shown[0])) if output is Format.CSV and shown else columns
    table = [_row(row, output) for row in shown]
    print_rows(table, columns, output, title=f"a = {a}, b = {', '.join(others)}")
    tests = next((row.tests for row in shown if row.tests), 0)
    if tests and tests > 1 and output is Format.TABLE:
        say(f"p is adjusted over {tests} tests (Benjamini-Hochberg)")
    for line in incomparable(refused):
        say(f"{'DIFFERENT' if allow_different else 'not compared'}: {line}", err=True)
    for gate, row in trips:
        mark = "" if row.is_comparable else " (rows that should not be compared)"
        say(
            f"gate {gate.text} trips on {row.model} {row.cell}: {row.a:.6g} -> {row.b:.6g}{mark}",
            err=True,
        )
    if refused and not allow_different:
        for gate in gates:
            if any(row.metric == gate.metric for row in refused):
                say(f"gate {gate.text} cannot be judged on rows that are not compared", err=True)
        say(
            f"{len(refused)} of {len(rows)} rows are left out; --allow-different shows them, marked", err=True
        )
        return REFUSED
    return GATE_TRIPPED if trips else 0


def _row(row: Comparison, output: Format) -> dict[str, Any]:
    """A comparison as a row; for people, what is different stands among the flags."""
    shown = asdict(row)
    if output is Format.JSON:
        return shown
    different = [f"DIFFERENT {each}" for each in row.differences]
    shown["flags"] = "; ".join((*different, *row.flags))
    shown["differences"] = "; ".join(map(str, row.differences))
    return shown


# --- break-even ---------------------------------------------------------------------------------------


def _print_break_even(rows: Sequence[BreakEvenRow], allow_different: bool, output: Format) -> int:
    refused = [row for row in rows if row.differences]
    shown = rows if allow_different else [row for row in rows if not row.differences]
    columns = [
        "model", "method_a", "method_b", "metric", "prompt_len", "new_tokens", "break_even", "says",
        "ratios", "basis", "flags",
    ]  # fmt: skip
    print_rows([_break_even_row(row, output) for row in shown], columns, output)
    for row in refused:
        mark = "DIFFERENT" if allow_different else "not compared"
        for each in row.differences:
            say(f"{mark}: {row.method_a} and {row.method_b} differ in {each} ({row.metric})", err=True)
    return REFUSED if refused and not allow_different else 0


def _break_even_row(row: BreakEvenRow, output: Format) -> dict[str, Any]:
    ratios = {f"b{batch}": ratio for batch, ratio in row.ratios.items()}
    shown: dict[str, Any] = {
        "model": row.model,
        "method_a": row.method_a,
        "method_b": row.method_b,
        "metric": row.metric,
        "prompt_len": row.prompt_len,
        "new_tokens": row.new_tokens,
        "break_even": str(row.found),
        "says": row.says,
    }
    if output is Format.JSON:
        return {
            **shown, **asdict(row.found), "ratios": ratios,
            "bases": {f"b{batch}": basis for batch, basis in row.bases.items()},
            "flags": row.flags, "differences": [asdict(each) for each in row.differences],
        }  # fmt: skip
    different = [f"DIFFERENT {each}" for each in row.differences]
    return {
        **shown,
        "ratios": " ".join(f"{name} {ratio:.3g}" for name, ratio in ratios.items()),
        "basis": ", ".join(dict.fromkeys(row.bases.values())),
        "flags": "; ".join((*different, *row.flags)),
    }
