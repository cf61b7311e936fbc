"""``harness why``: kernels, achieved against possible, memory in parts, and the verdict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from harness.cli.output import Format, format_value, print_rows, say
from harness.display import in_times

if TYPE_CHECKING:
    from collections.abc import Sequence

    from harness.why import Explanation

__all__ = ["why"]

_SCALES = {
    "s": ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")),
    "B": ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B")),
    "B/s": ((1e12, "TB/s"), (1e9, "GB/s"), (1e6, "MB/s")),
    "FLOP/s": ((1e12, "TFLOP/s"), (1e9, "GFLOP/s"), (1e6, "MFLOP/s")),
}
_CSV = (
    "model",
    "method",
    "seed",
    "dtype",
    "device",
    "scenario",
    "phase",
    "kernel",
    "family",
    "calls",
    "seconds",
    "share",
)


def why(
    methods: Annotated[
        list[str] | None, typer.Argument(help="Methods as written in the results. Default: all.")
    ] = None,
    output: Annotated[Format, typer.Option("--format", help="table, json, csv or markdown.")] = Format.TABLE,
    db: Annotated[str | None, typer.Option(help="The results store (or HARNESS_DB).")] = None,
    sweep: Annotated[
        str | None,
        typer.Option(help="Only this sweep: its number, or last. Default: the newest of each cell."),
    ] = None,
    models: Annotated[str | None, typer.Option("--models", "--model", help="Only these models.")] = None,
    scenarios: Annotated[str | None, typer.Option(help="Only these shapes, such as b1-p512-g64.")] = None,
    top: Annotated[int, typer.Option(min=1, help="How many kernels a phase the table shows.")] = 6,
) -> None:
    """Say why a variant is as fast and as large as it is.

    For each variant and shape: the verdict against the baseline, the share of the device's ceilings that
    was reached, the kernels that ran, and the memory in parts. CSV and markdown list the kernels.
    """
    from harness.chain import split_list
    from harness.cli.results import sweep_number
    from harness.cli.sweep import database
    from harness.store.store import Store
    from harness.why import explanations

    named = [name for text in methods or () for name in split_list(text)]
    with Store.open_readonly(database(db)) as store:
        found = explanations(
            store,
            named or None,
            models=split_list(models) if models else None,
            scenarios=split_list(scenarios) if scenarios else None,
            sweep=sweep_number(sweep),
        )
    if output is Format.JSON:
        print_rows([each.as_json() for each in found], (), output)
    elif output is Format.TABLE:
        for each in found:
            _print_tables(each, top, _telling(each, found))
    else:
        print_rows([row for each in found for row in _kernel_rows(each)], list(_CSV), output)


def _kernel_rows(found: Explanation) -> list[dict[str, Any]]:
    return [
        {
            "model": found.model,
            "method": found.method,
            "seed": found.seed,
            "dtype": found.dtype,
            "device": found.device,
            "scenario": found.scenario,
            "phase": kernel.phase,
            "kernel": kernel.name,
            "family": kernel.family,
            "calls": kernel.calls,
            "seconds": kernel.seconds,
            "share": kernel.share,
        }
        for kernel in found.kernels
    ]


def _telling(one: Explanation, found: Sequence[Explanation]) -> list[str]:
    """What tells it from others of its model, method and shape."""
    alike = [
        each
        for each in found
        if (each.model, each.method, each.scenario) == (one.model, one.method, one.scenario)
    ]
    told = {f"seed {one.seed}": "seed", one.dtype: "dtype", one.device: "device"}
    return [text for text, name in told.items() if len({getattr(each, name) for each in alike}) > 1]


def _print_tables(found: Explanation, top: int, telling: Sequence[str]) -> None:
    synthetic = " (synthetic)" if found.synthetic else ""
    say(" · ".join((f"{found.model}{synthetic}", found.method, found.scenario, *telling)))
    say(f"  {_effect(found)}")
    say(f"  verdict: {found.verdict or 'none: nothing to compare with'}")
    columns = ["phase", "time", "speed-up", "achieved", "of the ceiling", "J/token", "mode"]
    print_rows(_achieved_rows(found), columns, Format.TABLE)
    for reason in _reasons_of_modes(found):
        say(f"  {reason}")
    rows = [
        {
            "phase": kernel.phase,
            "share": f"{kernel.share:.0%}",
            "kernel": kernel.name,
            "family": kernel.family,
            "calls": kernel.calls,
            "time": _scaled(kernel.seconds, "s"),
        }
        for phase in ("prefill", "decode")
        for kernel in [each for each in found.kernels if each.phase == phase][:top]
    ]
    if rows:
        print_rows(rows, ["phase", "share", "kernel", "family", "calls", "time"], Format.TABLE)
    else:
        reason = found.records.get("prefill_kernels", {}).get("note") or "they were not recorded"
        say(f"  no kernels: {reason}")
    memory = [
        {name: value if name == "phase" else _scaled(value, "B") for name, value in row.items()}
        for row in found.memory()
    ]
    if memory:
        print_rows(memory, list(memory[0]), Format.TABLE)


def _effect(found: Explanation) -> str:
    """Real or simulated, coverage, bits, both ratios, and what the transform cost."""
    parts = []
    for metric, words in (
        ("parameters_changed_share", "covers {:.0%} of the parameters"),
        ("stored_bits_per_weight", "{:.3g} bits a weight"),
        ("compression_ratio", "{:.3g}× smaller"),
        ("theoretical_compression_ratio", "{:.3g}× on paper"),
        ("transform_s", "transformed in {:.3g} s"),
        ("transform_energy", "with {:.3g} J"),
        ("calibration_tokens", "{:,.0f} calibration tokens"),
        ("trained_tokens", "{:,.0f} trained tokens"),
    ):
        value = found.value(metric)
        if value or (value is not None and metric.endswith("_share")):
            parts.append(words.format(value))
    if found.simulated is not None:
        parts.insert(0, "simulated" if found.simulated else "real")
    return ", ".join(parts) or "nothing is known of the transform"


def _achieved_rows(found: Explanation) -> list[dict[str, Any]]:
    from harness.why import ACHIEVED

    rows = []
    for phase, time, speedup, achieved, share in ACHIEVED:
        if found.value(time) is None:
            continue
        reached, faster = found.value(share), found.value(speedup)
        unit = str(found.records.get(achieved, {}).get("unit") or "")
        rows.append(
            {
                "phase": phase,
                "time": _scaled(found.value(time), "s"),
                "speed-up": None if faster is None else f"{in_times(faster)}×",
                "achieved": _scaled(found.value(achieved), unit),
                "of the ceiling": None
                if reached is None
                else f"{reached:.1%} {share.rpartition('_')[2].upper()}",
                "J/token": found.value(f"{phase}_energy"),
                "mode": found.records[time]["mode"],
            }
        )
    return rows


def _reasons_of_modes(found: Explanation) -> list[str]:
    """Why a phase is not compiled, or is so in pieces; one line where it is the same for both."""
    from harness.why import ACHIEVED

    phases: dict[str, list[str]] = {}
    for time, phase in {time: phase for phase, time, *_ in ACHIEVED}.items():
        record = found.records.get(time, {})
        if note := record.get("note"):
            mode = record.get("mode") or "how it ran"
            phases.setdefault(note if note.startswith(mode) else f"{mode}: {note}", []).append(phase)
    return [f"{' and '.join(names)}: {reason}" for reason, names in phases.items()]


def _scaled(value: float | None, unit: str) -> str | None:
    if value is None:
        return None
    scales = _SCALES.get(unit, ((1.0, unit),))
    scale, name = next((pair for pair in scales if abs(value) >= pair[0]), scales[-1])
    return f"{format_value(value / scale)} {name}".strip()
