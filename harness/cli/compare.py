"""``harness compare``: methods, variants, sweeps or stores side by side, with gates for CI."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from harness.cli.output import Format, print_rows, say

if TYPE_CHECKING:
    from harness.comparing import BreakEvenRow, SideName, Stores
    from harness.store.store import Store

__all__ = ["compare"]


def compare(
    a: Annotated[
        str,
        typer.Argument(
            help="What to compare with: a method (baseline), variant:12, sweep:3, sweep:last~1, a store, a "
            "file that `harness results export` or lm-eval wrote, or a part of one (main.db#sweep:2)."
        ),
    ],
    b: Annotated[
        list[str] | None,
        typer.Argument(help="What is judged, written alike: gptq:bits=3 smoothquant, or sweep:last."),
    ] = None,
    output: Annotated[Format, typer.Option("--format", help="table, json, csv or markdown.")] = Format.TABLE,
    db: Annotated[str | None, typer.Option(help="The store of sides that name none (or HARNESS_DB).")] = None,
    models: Annotated[str | None, typer.Option(help="Only on these models.")] = None,
    metrics: Annotated[
        str | None, typer.Option(help="Only these metrics; all for every one. Tables show the leading ones.")
    ] = None,
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
        typer.Option(
            help="Exit with 3 where this holds: 'decode_latency>1.05x', 'acc<-0.01'; with ! behind it only "
            "where it is clear from the interval: 'acc<-0.01!'."
        ),
    ] = None,
    gates: Annotated[
        Path | None, typer.Option(help="A YAML file with such gates, as a list under fail_on:.")
    ] = None,
    allow_missing: Annotated[
        bool,
        typer.Option(
            "--allow-missing",
            help="Do not exit with 3 where a gate cannot be judged, because rows are missing.",
        ),
    ] = False,
) -> int:
    """Compare methods with a, or two sweeps or stores variant by variant.

    Ratios of times and sizes, paired tests of quality. Rows that were measured under different conditions
    are refused (exit code 2). Exit code 3: a gate trips, or it cannot be judged because rows are missing.
    P-values are adjusted over all tests of the call, so give several methods at once.
    """
    from harness.chain import split_list
    from harness.cli.compare_print import print_comparison
    from harness.cli.sweep import database
    from harness.comparing import Stores, compare_sides, load_side, parse_gate, parse_side, read_gates
    from harness.errors import ConfigError

    texts = [*(fail_on or ()), *(read_gates(gates) if gates is not None else ())]
    wanted_gates = [parse_gate(text) for text in dict.fromkeys(texts)]
    if allow_missing and not wanted_gates:
        raise ConfigError("--allow-missing says what becomes of gates: give --fail-on or --gates too")
    only = split_list(models) if models else None
    first = parse_side(a)
    with Stores(database(db)) as stores:
        others = _others(stores, first, b or (), every, only, timed=break_even)
        if break_even:
            if wanted_gates:
                raise ConfigError("gates are not judged on --break-even: leave one of them out")
            return _break_even(stores, first, others, only, allow_different, output)
        is_every = metrics is not None and metrics.strip() == "all"
        wanted = split_list(metrics) if metrics and not is_every else None
        sides = [load_side(name, stores, only) for name in (first, *others)]
        found = compare_sides(sides[0], sides[1:], metrics=wanted)
    return print_comparison(
        found, sides, wanted_gates, output, allow_different, allow_missing, leading_only=metrics is None
    )


def _others(
    stores: Stores,
    a: SideName,
    named: Sequence[str],
    every: bool,
    models: Sequence[str] | None,
    *,
    timed: bool,
) -> list[SideName]:
    from harness.comparing import other_methods, parse_sides
    from harness.errors import ConfigError

    if not every:
        if not named:
            what = "a sweep or store" if a.is_matrix else "the methods"
            raise ConfigError(
                f"name {what} to compare with {a.text}" + ("" if a.is_matrix else ", or give --all")
            )
        return parse_sides(named)
    if named:
        raise ConfigError("give either the methods to judge or --all")
    if a.method is None:
        raise ConfigError(f"--all judges every other method: compare with a method, not with {a.text}")
    return other_methods(a, stores, models, timed=timed)


# --- break-even ---------------------------------------------------------------------------------------


def _break_even(
    stores: Stores,
    a: SideName,
    others: Sequence[SideName],
    models: Sequence[str] | None,
    allow_different: bool,
    output: Format,
) -> int:
    from harness.comparing import break_even_batches
    from harness.errors import ConfigError

    for side in (a, *others):
        if side.method is None or side.sweep is not None or side.store != a.store:
            raise ConfigError(f"--break-even compares methods of one store, not {side.text}")
    store: Store = stores.of(a)
    names = [str(side.method) for side in others]
    return _print_break_even(break_even_batches(store, str(a.method), names, models), allow_different, output)


def _print_break_even(rows: Sequence[BreakEvenRow], allow_different: bool, output: Format) -> int:
    refused = [row for row in rows if row.differences]
    shown = rows if allow_different else [row for row in rows if not row.differences]
    # What all rows have in common need not be said to people.
    telling = [name for name in ("seed", "dtype", "device") if len({getattr(row, name) for row in shown}) > 1]
    columns = [
        "model", "method_a", "method_b", *telling, "metric", "prompt_len", "new_tokens", "break_even", "says",
        "ratios", "basis", "flags",
    ]  # fmt: skip
    print_rows([_break_even_row(row, output) for row in shown], columns, output)
    for row in refused:
        mark = "DIFFERENT" if allow_different else "not compared"
        for each in row.differences:
            say(f"{mark}: {row.method_a} and {row.method_b} differ in {each} ({row.metric})", err=True)
    return 2 if refused and not allow_different else 0


def _break_even_row(row: BreakEvenRow, output: Format) -> dict[str, Any]:
    ratios = {f"b{batch}": ratio for batch, ratio in row.ratios.items()}
    shown: dict[str, Any] = {
        "model": row.model,
        "method_a": row.method_a,
        "method_b": row.method_b,
        "metric": row.metric,
        "prompt_len": row.prompt_len,
        "new_tokens": row.new_tokens,
        "seed": row.seed,
        "dtype": row.dtype,
        "device": row.device,
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
