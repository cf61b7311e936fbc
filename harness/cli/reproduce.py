"""``harness reproduce``: which of the survey's claims hold on this machine."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from harness.cli.output import Format, print_rows

if TYPE_CHECKING:
    from harness.claims import BoardRow, Claim
    from harness.claims.running import Means, Reproduction
    from harness.interrupts import Interrupts
    from harness.plugins import LoadedPlugins
    from harness.progress import QuietReporter
    from harness.store.store import Store

__all__ = ["claim_rows", "reproduce"]

COLUMNS = ("section", "claim", "outcome", "says", "why", "source")


def reproduce(
    claim: Annotated[
        list[str] | None, typer.Option(help="Only this claim; may be repeated. Default: all of them.")
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            min=0, help="Minutes to measure at most; 0 decides by what is stored. Default: no limit."
        ),
    ] = None,
    db: Annotated[str | None, typer.Option(help="The results store (or HARNESS_DB).")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    output: Annotated[Format, typer.Option("--format", help="table, json, csv or markdown.")] = Format.TABLE,
    list_: Annotated[
        bool,
        typer.Option("--list", help="Only list the claims: sections, sources, methods and what they need."),
    ] = False,
    jobs: Annotated[
        int | None,
        typer.Option(
            min=1, help="Variants at a time where nothing is timed. Default: one a core, up to four."
        ),
    ] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Measure again what failed.")] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Measure again what is stored, such as times of a busy machine.")
    ] = False,
    plugin: Annotated[
        list[str] | None, typer.Option(help="A plugin: FILE.py or a module. May be repeated.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only the board.")] = False,
) -> int:
    """Say which of the survey's claims hold here, with the numbers; measure what is missing first.

    Every claim ends as "holds", "does not hold" or "not decidable", whichever it is, with exit code 0;
    1 where cells failed that were to be measured.
    """
    from harness.claims import chosen
    from harness.claims.running import Means
    from harness.cli.sweep import database
    from harness.interrupts import Interrupted, Interrupts
    from harness.plugins import load_plugins

    if list_:
        wanted = chosen(load_plugins(plugin or ()).claims, claim or ())
        print_rows([_listed(each, output) for each in wanted], _LISTED, output)
        return 0
    with Interrupts() as interrupts:
        try:
            means = Means(budget, jobs, retry_failed, fresh, tuple(plugin or ()))
            return _reproduce(claim or (), means, database(db), device, output, quiet, interrupts)
        except Interrupted as stopped:
            typer.echo(f"interrupted ({stopped}); the same command goes on where this stopped", err=True)
            return stopped.exit_code


def _reproduce(
    names: Sequence[str],
    means: Means,
    target: str,
    device: str,
    output: Format,
    quiet: bool,
    interrupts: Interrupts,
) -> int:
    from harness.claims import board, chosen
    from harness.claims.running import Reproduction
    from harness.measure.machine import resolve_device
    from harness.plugins import load_plugins
    from harness.store.store import Store

    runs = means.budget_min is None or means.budget_min > 0
    if runs:
        # The server's imports take seconds: they run beside the parent's own.
        from harness.executors.server import start_fork_server

        start_fork_server()
    plugins = load_plugins(means.plugin)
    for report in plugins.broken:
        where = f"{report.name} ({report.location})"
        typer.echo(f"warning: plugin {where} could not be loaded: {report.error}", err=True)
    wanted = chosen(plugins.claims, names)
    place = resolve_device(device)
    with Store.open(target) if runs else Store.open_readonly(target) as store:
        done = Reproduction()
        if runs:
            done = _measure(store, wanted, place, means, quiet, interrupts)
        rows = board(store, plugins.claims.values(), device=place.partition(":")[0])
    kept = {each.id for each in wanted}
    rows = [_noted(row, done) for row in rows if row.claim.id in kept]
    print_rows([claim_rows(row, output) for row in rows], _columns(output), output)
    if output is Format.TABLE and not quiet:
        typer.echo(_summary(rows, plugins))
    return 1 if done.failures else 0


def _measure(
    store: Store, claims: Sequence[Claim], device: str, means: Means, quiet: bool, interrupts: Interrupts
) -> Reproduction:
    from contextlib import ExitStack

    from harness.claims.running import reproduce as run
    from harness.privacy import without_passwords
    from harness.progress import make_reporter

    with ExitStack() as stack:

        def reporter() -> QuietReporter:
            stack.close()  # the one before, whose bar must not stand beside this one's
            return stack.enter_context(make_reporter(quiet=quiet))

        return run(
            store,
            claims,
            device=device,
            means=means,
            reporter=reporter,
            interrupts=interrupts,
            command=without_passwords(shlex.join(["harness", *sys.argv[1:]])),
            say=lambda line: None if quiet else typer.echo(line, err=True),
        )


def _noted(row: BoardRow, done: Reproduction) -> BoardRow:
    """With why a claim was not measured, where that is known better than that it was not."""
    note = done.notes.get(row.claim.id)
    if note is None or row.decision.is_measured:
        return row
    return replace(row, decision=replace(row.decision, why=note))


# --- rows ---------------------------------------------------------------------------------------------


def claim_rows(row: BoardRow, output: Format = Format.JSON) -> dict[str, Any]:
    """A claim as a row: in JSON with every finding, elsewhere with its first as columns."""
    claim, decision = row.claim, row.decision
    shown: dict[str, Any] = {
        "section": claim.section,
        "claim": claim.id,
        "outcome": str(decision.outcome) if output in (Format.JSON, Format.CSV) else decision.outcome.words,
        "says": claim.says,
        "why": decision.why,
        "source": claim.source,
        "p": decision.p,
        "p_adjusted": decision.p_adjusted,
        "device": row.device_name or None,
        "origins": list(row.origins) if output is Format.JSON else " ".join(row.origins),
    }
    if output is Format.JSON:
        shown["scale"] = claim.scale
        shown["findings"] = [
            {**asdict(finding), "side": str(finding.side), "expected": str(finding.expected)}
            for finding in decision.findings
        ]
        shown["cells"] = list(decision.cells)
    return shown


def _columns(output: Format) -> list[str]:
    more = ["p", "p_adjusted", "device", "origins"] if output is Format.CSV else []
    return [*COLUMNS, *more] if output is not Format.TABLE else ["claim", "outcome", "why"]


_LISTED = ["section", "claim", "says", "methods", "where", "minutes", "source"]


def _listed(claim: Claim, output: Format) -> dict[str, Any]:
    seconds = sum(
        len(need.models) * len(need.seeds) * (1 + len(need.methods))
        * (need.making_s + need.cell_s * (len(need.tasks) + len(need.prompt_lens) * len(need.batch_sizes)))
        for need in claim.sweep
    )  # fmt: skip
    where = list(claim.where) if output is Format.JSON else " ".join(claim.where)
    methods: Any = list(claim.methods) if output is Format.JSON else ", ".join(claim.methods)
    row: dict[str, Any] = {
        "section": claim.section, "claim": claim.id, "says": claim.says, "methods": methods,
        "where": where, "minutes": round(seconds / 60, 1), "source": claim.source,
    }  # fmt: skip
    if output is Format.JSON:
        row |= {"scale": claim.scale, "sweep": [_need(asdict(need)) for need in claim.sweep]}
    return row


def _need(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _summary(rows: Sequence[BoardRow], plugins: LoadedPlugins) -> str:
    from harness.claims.board import counts, in_words

    how = f"p-values adjusted over all {len(plugins.claims)} (Benjamini-Hochberg)"
    named = "1 claim" if len(rows) == 1 else f"{len(rows)} claims"
    return f"{named}: {in_words(counts(rows))}; {how}"
