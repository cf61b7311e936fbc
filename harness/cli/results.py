"""``harness results``: the store as a table, JSON, CSV or markdown."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from harness.cli.output import Format, format_value, print_rows

if TYPE_CHECKING:
    import pandas as pd

    from harness.store.store import Store
    from harness.sweep import SweepOutcome

__all__ = ["print_summary", "results", "rows_of"]

JSON_FIELDS = (
    "sweep", "model", "method", "options", "seed", "dtype", "device", "status", "reason", "task",
    "scenario", "metric", "value", "unit", "lower", "upper", "n", "synthetic", "mode", "note",
    "kind", "family", "device_name", "simulated",
)  # fmt: skip

SUMMARY = (
    ("weight_bytes", "weights"),
    ("prefill_latency", "prefill"),
    ("decode_latency", "decode/token"),
    ("kv_cache_bytes_per_token", "KV/token"),
    ("token_perplexity", "perplexity"),
    ("bits_per_byte", "bits/byte"),
    ("acc", "accuracy"),
    ("mean_kl", "KL"),
    ("flips", "flips"),
)


def results(
    output: Annotated[Format, typer.Option("--format", help="table, json, csv or markdown.")] = Format.TABLE,
    db: Annotated[str | None, typer.Option(help="The results store (or HARNESS_DB).")] = None,
    sweep: Annotated[
        str | None,
        typer.Option(help="Only this sweep: its number, or last. Default: the newest of each cell."),
    ] = None,
    models: Annotated[str | None, typer.Option(help="Only these models.")] = None,
    methods: Annotated[str | None, typer.Option(help="Only these methods, as written.")] = None,
    tasks: Annotated[str | None, typer.Option(help="Only these tasks.")] = None,
    metrics: Annotated[str | None, typer.Option(help="Only these metrics.")] = None,
    status: Annotated[str | None, typer.Option(help="Only cells with these statuses.")] = None,
    records: Annotated[
        bool,
        typer.Option("--records", help="One row a record in the table too, not one a variant."),
    ] = False,
) -> None:
    """Show what is stored: one row a variant in a table, one object a record in JSON."""
    from harness.chain import split_list
    from harness.cli.sweep import database
    from harness.store import queries
    from harness.store.store import Store

    def names(text: str | None) -> list[str] | None:
        return None if text is None else split_list(text)

    with Store.open_readonly(database(db)) as store:
        frame = queries.results(
            store,
            sweep=_sweep_number(sweep),
            models=names(models),
            methods=names(methods),
            tasks=names(tasks),
            metrics=names(metrics),
            statuses=names(status),
        )
    rows = rows_of(frame)
    if output is Format.TABLE and not records:
        print_variants(rows)
        return
    columns = [
        "model", "method", "task", "scenario", "metric", "value", "unit", "lower", "upper", "n",
        "mode", "status", "reason",
    ]  # fmt: skip
    if output is Format.JSON:
        rows = [{name: row.get(name) for name in JSON_FIELDS} for row in rows]
    print_rows(rows, list(JSON_FIELDS) if output is Format.CSV else columns, output)


def _sweep_number(text: str | None) -> Any:
    from harness.errors import ConfigError

    if text is None or text == "last":
        return text
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"--sweep takes a number or last, not {text!r}") from None


def rows_of(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """A frame's rows as dicts with None for what is missing."""
    import pandas as pd

    missing = frame.astype(object).where(pd.notna(frame), None)
    return [{str(key): value for key, value in row.items()} for row in missing.to_dict("records")]


def print_summary(store: Store, outcome: SweepOutcome) -> None:
    """The table at the end of a sweep."""
    from harness.store import queries

    print_variants(rows_of(queries.results(store, sweep=outcome.sweep_id)))
    counts = ", ".join(f"{count} {status}" for status, count in sorted(outcome.statuses.items()))
    reused = f" ({outcome.reused} measured before)" if outcome.reused else ""
    typer.echo(f"{counts}{reused}")


def print_variants(rows: list[dict[str, Any]]) -> None:
    """One row a variant and prompt shape: the main figures with their intervals, then what failed."""
    table = variant_rows(rows)
    shown = [label for _, label in SUMMARY if any(row.get(label) for row in table)]
    print_rows(table, ["model", "method", "scenario", *shown, "status"], Format.TABLE)
    problems = {
        (
            row["model"],
            row["method"],
            row["task"] or row["scenario"] or "",
            row["status"],
            row["reason"],
        )
        for row in rows
        if row["status"] != "ok"
    }
    if problems:
        columns = ["model", "method", "cell", "status", "reason"]
        listed = [dict(zip(columns, problem, strict=True)) for problem in sorted(problems, key=str)]
        print_rows(listed, columns, Format.TABLE, title="Not measured")


def variant_rows(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Pivot records: task and transform figures appear in each of a variant's shapes."""
    variants: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        key = (row["model"], row["method"], row["seed"], row["dtype"], row["device_name"])
        variants.setdefault(key, []).append(row)
    table = []
    for (model, method, *_), records in variants.items():
        shapes = sorted({r["scenario"] for r in records if r["kind"] == "scenario"}) or [""]
        statuses = {r["status"] for r in records}
        for shape in shapes:
            line: dict[str, Any] = {"model": model, "method": method, "scenario": shape}
            for metric, label in SUMMARY:
                line[label] = next(
                    (
                        _with_interval(record)
                        for record in records
                        if record["metric"] == metric
                        and (record["kind"] != "scenario" or record["scenario"] == shape)
                    ),
                    None,
                )
            line["status"] = "ok" if statuses == {"ok"} else ", ".join(sorted(statuses))
            if any(r["synthetic"] for r in records):
                line["status"] += " (synthetic)"
            if any(r["simulated"] for r in records):
                line["status"] += " (simulated)"
            table.append(line)
    return table


_SCALES = {
    "s": ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")),
    "B": ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B")),
}


def _with_interval(record: dict[str, Any]) -> str:
    value, unit = record["value"], record["unit"] or ""
    if value is None:
        return "nan"
    scale, shown = next(((s, u) for s, u in _SCALES.get(unit, ()) if abs(value) >= s), (1.0, ""))
    if unit in _SCALES and not shown:
        scale, shown = 1.0, unit
    text = format_value(value / scale)
    if record["lower"] is not None and record["upper"] is not None:
        text += f" [{format_value(record['lower'] / scale)}, {format_value(record['upper'] / scale)}]"
    return f"{text} {shown}".strip()
