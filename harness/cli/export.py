"""``harness export``: a variant as a checkpoint that the ecosystem loads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from harness.cli.output import Format, print_rows, say

if TYPE_CHECKING:
    from harness.export.exporting import Check, Exported, Written
    from harness.export.remaking import StoredVariant

__all__ = ["export"]

_COLUMNS = ["variant", "model", "method", "seed", "dtype", "device", "status"]


def export(
    variant: Annotated[
        str | None, typer.Argument(help="A number (see --list), or a method as written in the results.")
    ] = None,
    folder: Annotated[Path | None, typer.Argument(help="The folder to write: new or empty.")] = None,
    db: Annotated[str | None, typer.Option(help="The results store (or HARNESS_DB).")] = None,
    model: Annotated[
        str | None, typer.Option("--model", "--models", help="Of this model, where a method is named.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of this seed, where a method is named.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of this dtype, where a method is named.")] = None,
    layout: Annotated[
        str,
        typer.Option(help="auto, compressed-tensors, gptq, or dense: dequantized weights, marked simulated."),
    ] = "auto",
    listed: Annotated[bool, typer.Option("--list", help="Show the variants of the store and end.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export in the folder.")] = False,
    allow_changed: Annotated[
        bool,
        typer.Option(
            "--allow-changed",
            help="Export it although sources, files or versions changed since it was measured; "
            "harness.json says so.",
        ),
    ] = False,
    device: Annotated[
        str | None, typer.Option(help="Make it on another device than it was measured on.")
    ] = None,
    plugin: Annotated[
        list[str] | None, typer.Option(help="Where its plugins lie now, if not where they lay.")
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(min=0.0, help="Let outputs differ by this share of their spread. Default: by format."),
    ] = None,
) -> int:
    """Write a compressed model as a checkpoint that transformers loads without the harness.

    The variant is made again as its sweep made it, written in the format of compressed-tensors or GPTQ (or
    as it is, where nothing is quantized), loaded again with transformers and compared with the variant in
    memory. harness.json holds what was measured. The store gets the size on disk as disk_bytes.
    """
    from harness.cli.sweep import database
    from harness.errors import ConfigError
    from harness.interrupts import Interrupted, Interrupts

    target = database(db)
    if listed:
        _print_list(target)
        return 0
    if variant is None or folder is None:
        raise ConfigError(
            "name a variant and a folder: harness export gptq ./folder; --list shows the variants"
        )
    with Interrupts():
        try:
            done = _export(
                variant, folder, target, model, seed, dtype, layout,
                force, allow_changed, device, tuple(plugin) if plugin else None, tolerance,
            )  # fmt: skip
        except Interrupted as stopped:
            say(f"interrupted ({stopped}); nothing was written", err=True)
            return stopped.exit_code
    if done is None:
        return 1
    found, exported = done
    _print(exported)
    _record_size(target, found, exported.written)
    return 0


def _print_list(target: str) -> None:
    from harness.export.remaking import list_variants
    from harness.store.store import Store

    with Store.open_readonly(target) as store:
        rows = [{**row, "variant": row["id"]} for row in list_variants(store)]
    print_rows(rows, _COLUMNS, Format.TABLE)


def _export(
    text: str,
    folder: Path,
    target: str,
    model: str | None,
    seed: int | None,
    dtype: str | None,
    layout: str,
    force: bool,
    allow_changed: bool,
    device: str | None,
    plugins: tuple[str, ...] | None,
    tolerance: float | None,
) -> tuple[StoredVariant, Exported] | None:
    """What was exported; None where it was rejected, which is said."""
    from harness.errors import ExportRejected, UnknownName
    from harness.export.remaking import find_variant, plan_again
    from harness.store.store import Store

    with Store.open_readonly(target) as store:
        found = find_variant(store, text, model=model, seed=seed, dtype=dtype)
        from harness.export.exporting import export_variant
        from harness.export.folder import check_target
        from harness.export.quiet import without_chatter
        from harness.export.stock import LAYOUTS

        if layout not in LAYOUTS:
            raise UnknownName("layout", layout, LAYOUTS)
        check_target(folder, force=force)
        say(found.label, err=True)
        try:
            with without_chatter():
                exported = export_variant(
                    store,
                    found,
                    plan_again(found, device=device, plugins=plugins),
                    folder,
                    layout=layout,
                    force=force,
                    allow_changed=allow_changed,
                    largest_difference=tolerance,
                    say=lambda line: say(f"  {line}", err=True),
                )
        except ExportRejected as rejected:
            say(f"error: {rejected}", err=True)
            return None
    return found, exported


def _print(exported: Exported) -> None:
    from harness.export.folder import MANIFEST

    written = exported.written
    schemes = ", ".join(f"{count} x {scheme}" for scheme, count in written.schemes.items())
    say(f"format   {written.format}" + (f": {schemes}" if schemes else ""))
    for each in written.simulated:
        say(f"SIMULATED: {each}")
    for change in exported.changes:
        say(f"CHANGED since it was measured: {change}")
    say("weights  decoded from the files, equal to the variant's")
    for check in written.checks:
        say(_told(check))
    if written.unread:
        say(
            f"NOT LOADED again with transformers: {', '.join(written.unread)} not installed; run: "
            f"pip install {' '.join(name.replace('_', '-') for name in written.unread)}"
        )
    weights, whole = written.weight_file_bytes / 1e6, written.folder_bytes / 1e6
    say(f"disk     {weights:,.2f} MB of weights, {whole:,.2f} MB in all")
    say(f"folder   {exported.folder} (what was measured: {MANIFEST})")


def _told(check: Check) -> str:
    found = check.found
    top1 = "" if found.top1 is None else f", same top token at {found.top1:.1%} of {found.tokens} places"
    limit = "not judged" if check.tolerance is None else f"at most {check.tolerance:g}"
    return (
        f"{check.compared}: max difference {found.max_difference:.3g}, "
        f"rms {found.relative_rms:.3g} of the spread ({limit}){top1} [{check.loader}]"
    )


def _record_size(target: str, found: StoredVariant, written: Written) -> None:
    """Add `disk_bytes` to the variant's transform cell; where the store takes nothing, the export stands."""
    from harness.errors import StoreError
    from harness.export.exporting import disk_record
    from harness.store.store import Store

    assert found.transform_cell is not None
    try:
        with Store.open(target) as store:
            store.write_derived(found.transform_cell, [disk_record(written)])
    except StoreError as error:
        say(f"warning: disk_bytes was not recorded: {error}", err=True)
