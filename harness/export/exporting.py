"""From a variant of a store to a checkpoint on disk, checked and with the row's manifest inside."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from harness.errors import ConfigError, ExportRejected, HarnessError
from harness.export.checking import (
    Agreement,
    agreement,
    build_dense,
    decoded_state,
    load_again,
    missing_reader,
    outputs_of,
    probe_tokens,
    round_no_inputs,
    tolerance,
    weights_differ,
)
from harness.export.contents import Contents
from harness.export.folder import (
    MANIFEST,
    StoredTensors,
    check_target,
    folder_bytes,
    replacing_folder,
    write_checkpoint,
)
from harness.export.manifest import manifest_of
from harness.export.remaking import StoredVariant, Target
from harness.export.stock import contents_of
from harness.records import Record
from harness.store.encoding import dump_json

if TYPE_CHECKING:
    from harness.store.store import Store
    from harness.transforming import MadeVariant

__all__ = [
    "Check",
    "Exported",
    "Written",
    "disk_record",
    "export_variant",
    "make_again",
    "write_variant",
]

Say = Callable[[str], None]
_SAME = 1e-2  # sums in another order move the outputs less, another variant more


@dataclass(frozen=True)
class Check:
    """One comparison of the checkpoint with the variant in memory.

    Args:
        compared: what was compared with what, in words.
        loader: ``transformers``, or ``decoded files`` where the package that reads the format is missing.
        tolerance: of `Agreement.relative_rms`; None where the checkpoint is said to compute otherwise.
    """

    compared: str
    loader: str
    found: Agreement
    tolerance: float | None
    because: str

    @property
    def passed(self) -> bool:
        """Whether the difference is within the tolerance; NaN is not."""
        return self.tolerance is None or self.found.relative_rms <= self.tolerance


@dataclass(frozen=True)
class Written:
    """What a checkpoint is, apart from where it comes from."""

    layout: str
    format: str
    schemes: dict[str, int]
    simulated: list[str]
    checks: list[Check]
    unread: tuple[str, ...]  # packages that would be needed to load it again
    weight_file_bytes: int
    folder_bytes: int


@dataclass(frozen=True)
class Exported:
    """A checkpoint that stands at `folder`, and what is not as it was when its variant was measured."""

    folder: Path
    written: Written
    changes: tuple[str, ...]


def export_variant(
    store: Store,
    found: StoredVariant,
    target: Target,
    folder: Path,
    *,
    layout: str = "auto",
    force: bool = False,
    allow_changed: bool = False,
    largest_difference: float | None = None,
    say: Say = lambda line: None,
) -> Exported:
    """Make the variant again, write it, check it, and put it at `folder`.

    Args:
        target: of `plan_again`.
        largest_difference: in place of the format's own tolerance.
        say: called with a line for each thing that is done.

    Raises:
        ConfigError: the folder cannot be written, or what the variant was made of has changed.
        NotApplicable: there is no standard form of it.
        ExportRejected: what was written is not the variant.
        DiskFull: there is no room.
    """
    check_target(folder, force=force)
    if target.changes and not allow_changed:
        raise ConfigError(
            f"{found.label} cannot be made as it was measured: {'; '.join(target.changes)} changed. Sweep it "
            "again, or export what it is now with --allow-changed"
        )
    say("making the variant again")
    made = make_again(target)
    if made.no_effect is not None:
        raise ConfigError(f"{made.no_effect}: export the baseline")

    again = _compared_with_row(store, found, made)
    changes = (*target.changes, *_not_as_measured(again))
    if changes and not allow_changed:
        raise ConfigError(
            f"{found.label} made again is not what was measured: {'; '.join(changes)}. Its method may draw "
            "numbers that no seed fixes on this device; export it all the same with --allow-changed"
        )

    def manifest(written: Written) -> dict[str, Any]:
        about = {
            **_told(written),
            "exported_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "changed_since_measured": list(changes),
            "made_again": again,
        }
        return manifest_of(store, found, about)

    written = write_variant(
        made.model,
        made.tokenizer,
        folder,
        dtype=made.dtype,
        max_positions=made.info.max_positions,
        layout=layout,
        largest_difference=largest_difference,
        manifest=manifest,
        say=say,
    )
    return Exported(folder, written, changes)


def make_again(target: Target) -> MadeVariant:
    """The variant in memory, with as many threads as its sweep gave it.

    Raises:
        HarnessError: its method fails.
    """
    from harness.planning import variant_job
    from harness.transforming import make_variant

    job = variant_job(target.plan, target.variant, frozenset())
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, job.threads))
    try:
        return make_variant(job, target.plan.plugins, lambda what, done, total: None)
    except HarnessError:
        raise
    except Exception as error:  # the border to methods' code
        text = " ".join(str(error).split())[:600]
        raise HarnessError(
            f"{target.variant.label} cannot be made again: {type(error).__name__}: {text}"
        ) from error
    finally:
        torch.set_num_threads(threads)


def write_variant(
    model: nn.Module,
    tokenizer: Any,
    folder: Path,
    *,
    dtype: torch.dtype,
    max_positions: int,
    layout: str = "auto",
    largest_difference: float | None = None,
    manifest: Callable[[Written], dict[str, Any]] | None = None,
    say: Say = lambda line: None,
) -> Written:
    """Write a transformed model as a checkpoint, all or nothing, and check it against the model.

    Raises:
        NotApplicable, ExportRejected, DiskFull: as `export_variant`.
    """
    model = getattr(model, "_orig_mod", model).eval()
    contents = contents_of(model, layout, dtype)
    say(f"writing {contents.format}")
    with replacing_folder(folder, needed_bytes=contents.stored_bytes) as partial:
        write_checkpoint(contents, partial, model=model, tokenizer=tokenizer)
        sizes = folder_bytes(partial)
        if problem := weights_differ(contents, StoredTensors(partial)):
            raise ExportRejected(f"the checkpoint is not the variant: {problem}; nothing was left of it")
        tokens = probe_tokens(tokenizer, contents.config.vocab_size, max_positions)
        unread = missing_reader(contents.layout)
        checks = _checks(contents, model, partial, tokens, dtype, unread, largest_difference)
        for check in checks:
            if not check.passed:
                raise ExportRejected(
                    f"the checkpoint is not the variant: {check.compared} differ by "
                    f"{check.found.relative_rms:.3g} of their spread, and {check.tolerance:g} is let through "
                    f"({check.because}); nothing was left of it"
                )
        written = Written(
            layout=contents.layout,
            format=contents.format,
            schemes=contents.schemes,
            simulated=contents.simulated,
            checks=checks,
            unread=unread,
            weight_file_bytes=sizes["weights"],
            folder_bytes=sizes["all"],
        )
        if manifest is not None:
            (partial / MANIFEST).write_text(dump_json(manifest(written)) + "\n")
    return written


def disk_record(written: Written) -> Record:
    """The size of a checkpoint as the store keeps it."""
    note = (
        f"weight files of the exported checkpoint; with tokenizer and configuration {written.folder_bytes} B"
    )
    mode = written.format if written.layout != "dense" else "simulated"
    return Record("disk_bytes", written.weight_file_bytes, "B", mode=mode, note=note)


# --- checking ---------------------------------------------------------------------------------------


def _checks(
    contents: Contents,
    model: nn.Module,
    folder: Path,
    tokens: torch.Tensor,
    dtype: torch.dtype,
    unread: tuple[str, ...],
    largest_difference: float | None,
) -> list[Check]:
    kind, device = type(model), next(iter(model.parameters())).device
    has_logits = getattr(model, "get_output_embeddings", lambda: None)() is not None
    ours = outputs_of(model, tokens)
    checks = []

    def compare(what: str, loader: str, expected: torch.Tensor, loaded: nn.Module, *, rounding: bool) -> None:
        most, because = tolerance(contents, dtype, rounding=rounding)
        if largest_difference is not None:
            most, because = largest_difference, "as asked for"
        found = agreement(expected, outputs_of(loaded, tokens), are_logits=has_logits)
        checks.append(Check(what, loader, found, most, because))

    rounding = contents.rounds_inputs
    if unread:
        if not rounding:  # which the files do not tell how to do
            state = decoded_state(contents, StoredTensors(folder))
            built = build_dense(contents, kind, state, dtype).to(device)
            compare("outputs", "decoded files", ours, built, rounding=False)
        return checks
    loaded = load_again(folder, kind, dtype, device)
    if contents.computes_otherwise:
        # By how much is stored, and nothing is too much: it says so.
        found = agreement(ours, outputs_of(loaded, tokens), are_logits=has_logits)
        checks.append(Check("outputs of the simulated form", "transformers", found, None, "simulated"))
        return checks
    compare("outputs", "transformers", ours, loaded, rounding=rounding)
    if rounding:
        # The two round inputs each on a grid of its own; without that they must agree closely.
        dense = build_dense(contents, kind, decoded_state(contents, StoredTensors(folder)), dtype).to(device)
        round_no_inputs(loaded)
        compare(
            "outputs without rounded inputs",
            "transformers",
            outputs_of(dense, tokens),
            loaded,
            rounding=False,
        )
    return checks


def _told(written: Written) -> dict[str, Any]:
    """For the manifest."""
    return {
        "layout": written.layout,
        "quantization_format": written.format,
        "schemes": written.schemes,
        "simulated": written.simulated or None,
        "weight_file_bytes": written.weight_file_bytes,
        "folder_bytes": written.folder_bytes,
        "weights_check": "every tensor, decoded from the files, equals the variant's",
        "output_checks": [asdict(check) for check in written.checks],
        "not_loaded_for_want_of": list(written.unread),
    }


def _not_as_measured(again: dict[str, Any]) -> list[str]:
    """Figures of the variant made again that are not those of the row, but for rounding."""
    return [
        f"{name} ({each['measured']:.6g} then, {each['now']:.6g} now)"
        for name, each in again.items()
        if not math.isclose(each["measured"], each["now"], rel_tol=_SAME, abs_tol=_SAME)
    ]


def _compared_with_row(store: Store, found: StoredVariant, made: MadeVariant) -> dict[str, Any]:
    """What the sweep stored of the transformed model's outputs and size, and what they are now."""
    if found.transform_cell is None:
        return {}
    stored = store.records(found.transform_cell)
    now = {record.metric: record.value for record in made.records}
    return {
        name: {"measured": stored[name].value, "now": now[name]}
        for name in ("probe_output_change", "weight_bytes")
        if name in stored and name in now
    }
