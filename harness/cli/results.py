"""``harness results``: the store as a table, JSON, CSV or markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from harness.cli.output import Format, print_rows, say

if TYPE_CHECKING:
    import pandas as pd

    from harness.comparability import Conditions
    from harness.store.store import Store
    from harness.sweep import SweepOutcome

__all__ = ["print_summary", "results", "rows_of", "sweep_number"]

JSON_FIELDS = (
    "sweep", "model", "method", "options", "seed", "dtype", "device", "status", "reason", "task",
    "scenario", "metric", "value", "unit", "lower", "upper", "n", "synthetic", "mode", "note",
    "kind", "family", "device_name", "simulated", "limit", "conditions", "origin", "variant",
)  # fmt: skip

PERCENTILES = ("p10", "p50", "p90", "p99")


def results(
    context: typer.Context,
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
    percentiles: Annotated[
        bool,
        typer.Option("--percentiles", help="Percentiles of the raw readings of each record."),
    ] = False,
) -> None:
    """Show what is stored: one row a variant in a table, one object a record in JSON.

    Rows that were imported stand beside those measured here, with their origin.
    """
    if context.invoked_subcommand is not None:
        _refuse_options(context)
        return
    from harness.chain import split_optional
    from harness.cli.sweep import database
    from harness.store import queries
    from harness.store.selection import require_known
    from harness.store.store import Store

    statuses = statuses_of(status)
    wanted = {
        "models": split_optional(models),
        "methods": split_optional(methods),
        "tasks": split_optional(tasks),
        "metrics": split_optional(metrics),
    }
    with Store.open_readonly(database(db)) as store:
        with store.reading() as connection:
            require_known(connection, **wanted)
        frame = queries.results(store, sweep=sweep_number(sweep), statuses=statuses, **wanted)
        rows = rows_of(frame)
        conditions = conditions_by_cell(store, rows)
        if percentiles:
            _add_percentiles(store, rows)
    if output is Format.TABLE and not (records or percentiles):
        print_variants(rows, conditions)
        return
    for row in rows:
        _add_conditions(row, conditions)
    more = PERCENTILES if percentiles else ()
    origin = ["origin"] if any(row["origin"] for row in rows) else []
    columns = [
        "variant", "model", "method", "task", "scenario", "metric", "value", "unit", "lower", "upper", "n",
        *more, "limit", "mode", "status", "reason", *origin,
    ]  # fmt: skip
    if output is Format.JSON:
        rows = [{name: row.get(name) for name in (*JSON_FIELDS, *more)} for row in rows]
    print_rows(rows, [*JSON_FIELDS, *more] if output is Format.CSV else columns, output)


def conditions_by_cell(store: Store, rows: list[dict[str, Any]]) -> dict[int, Conditions]:
    """Under what the cells of these rows were measured."""
    from harness.conditions import read_conditions

    return read_conditions(store, {row["cell"] for row in rows})


def _add_conditions(row: dict[str, Any], conditions: Mapping[int, Conditions]) -> None:
    """`limit`, and `conditions`: equal for rows of one kind that may be compared."""
    from harness.comparability import scope_of

    about = conditions[row["cell"]]
    row["limit"] = about.limit
    row["conditions"] = about.fingerprint(scope_of(row["kind"], row["unit"] or "", row["metric"] or ""))


def _add_percentiles(store: Store, rows: list[dict[str, Any]]) -> None:
    from harness.measure.statistics import percentiles
    from harness.store.readings import all_readings

    readings = all_readings(store, {row["cell"] for row in rows})
    for row in rows:
        samples = readings.get((row["cell"], row["metric"]))
        row |= percentiles(samples) if samples else dict.fromkeys(PERCENTILES)


def _refuse_options(context: typer.Context) -> None:
    """Options between ``results`` and the name of a command below it would do nothing."""
    from harness.errors import ConfigError

    for name in context.params:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            option = {"output": "format"}.get(name, name)
            raise ConfigError(
                f"--{option} stands before {context.invoked_subcommand}: options go behind it, "
                f"as in harness results {context.invoked_subcommand} FILE --db results.db"
            )


def sweep_number(text: str | None) -> Any:
    """What ``--sweep`` means: a number, ``last``, or None.

    Raises:
        ConfigError: neither a number nor ``last``.
    """
    from harness.errors import ConfigError

    if text is None or text == "last":
        return text
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"--sweep takes a number or last, not {text!r}") from None


def statuses_of(text: str | None) -> list[str] | None:
    """What ``--status`` lists; None for all.

    Raises:
        UnknownName: one of them is no status.
    """
    from harness.chain import split_optional
    from harness.errors import UnknownName
    from harness.records import Status

    statuses, known = split_optional(text), [each.value for each in Status]
    for status in statuses or ():
        if status not in known:
            raise UnknownName("status", status, known)
    return statuses


def rows_of(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """A frame's rows as dicts with None for what is missing."""
    import pandas as pd

    missing = frame.astype(object).where(pd.notna(frame), None)
    return [{str(key): value for key, value in row.items()} for row in missing.to_dict("records")]


def print_summary(store: Store, outcome: SweepOutcome) -> None:
    """The table at the end of a sweep."""
    from harness.store import queries

    rows = rows_of(queries.results(store, sweep=outcome.sweep_id))
    print_variants(rows, conditions_by_cell(store, rows))
    counts = ", ".join(f"{count} {status}" for status, count in sorted(outcome.statuses.items()))
    reused = f" ({outcome.reused} measured before)" if outcome.reused else ""
    say(f"{counts}{reused}")


def print_variants(rows: list[dict[str, Any]], conditions: Mapping[int, Conditions]) -> None:
    """One row a variant and prompt shape: the main figures with their intervals, then what failed."""
    from harness.cli.summary import names_of, variant_table

    table = variant_table(rows, conditions)
    print_rows(table.rows, table.columns, Format.TABLE)
    for note in table.footnotes:
        say(note)
    names = names_of(rows)  # also where only one of several seeds is missing
    problems = {
        (
            row["model"],
            names[row["variant"]],
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
