"""Finding a variant in a store, and making it again exactly as the sweep made it.

A store holds no weights. The variant is planned again from what is stored of its sweep; its content key
(model files, chain, options, sources of the plugins, seed, dtype, library versions, device, calibration)
must come out the same, so that the checkpoint is what was measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy import func, select

from harness.config import SweepConfig
from harness.errors import ConfigError, NotApplicable, UnknownName
from harness.records import CellKind
from harness.store.encoding import dump_json
from harness.store.tables import IMPORTED, cells, sweeps, variants

if TYPE_CHECKING:
    from harness.grid import VariantPlan
    from harness.planning import SweepPlan
    from harness.store.store import Store

__all__ = ["StoredVariant", "Target", "changes_since", "find_variant", "list_variants", "plan_again"]


@dataclass(frozen=True)
class StoredVariant:
    """A row of ``variants`` with the sweep that first made it.

    `transform_cell` is the newest cell of its transform; `status` and `reason` are that cell's.
    """

    id: int
    row: Mapping[str, Any]
    sweep: Mapping[str, Any]
    transform_cell: int | None
    status: str | None
    reason: str | None

    @property
    def label(self) -> str:
        return f"{self.row['model']} · {self.row['method']} (variant {self.id})"


@dataclass(frozen=True)
class Target:
    """The variant planned again: a plan with this one variant, and what is not as it was when measured."""

    plan: SweepPlan
    variant: VariantPlan
    changes: tuple[str, ...]


def list_variants(store: Store) -> list[dict[str, Any]]:
    """What can be named: number, model, method, seed, dtype, device, status of the transform."""
    newest = (
        select(func.max(cells.c.id))
        .where(cells.c.kind == str(CellKind.TRANSFORM))
        .group_by(cells.c.variant_id)
        .scalar_subquery()
    )
    names = ("id", "model", "method", "seed", "dtype", "device", "device_name", "key")
    query = (
        select(*(variants.c[name] for name in names), cells.c.status)
        .outerjoin(cells, (cells.c.variant_id == variants.c.id) & cells.c.id.in_(newest))
        .order_by(variants.c.id)
    )
    with store.reading() as connection:
        return [dict(row) for row in connection.execute(query).mappings()]


def find_variant(
    store: Store,
    text: str,
    *,
    model: str | None = None,
    seed: int | None = None,
    dtype: str | None = None,
) -> StoredVariant:
    """The variant of a number, or the only one of a method (``gptq`` means every setting of it).

    Raises:
        UnknownName: no such variant, with near matches.
        ConfigError: several variants are meant; they are listed.
    """
    rows = list_variants(store)
    if not rows:
        raise ConfigError(f"results store {store.label} holds no variant")
    found: list[Mapping[str, Any]]
    if text.isdecimal():
        found = [row for row in rows if row["id"] == int(text)]
        if not found:
            raise UnknownName("variant", text, [str(row["id"]) for row in rows])
    else:
        found = _of_method(rows, text)
    for name, wanted in (("model", model), ("seed", seed), ("dtype", dtype)):
        if wanted is not None:
            kept = [row for row in found if row[name] == wanted]
            if not kept:
                raise UnknownName(f"{name} of {text!r}", str(wanted), {str(row[name]) for row in found})
            found = kept
    if len(found) > 1:
        listed = "; ".join(f"{row['id']}: {_described(row)}" for row in found[:8])
        more = f" and {len(found) - 8} more" if len(found) > 8 else ""
        raise ConfigError(f"{text!r} is several variants; name one by its number ({listed}{more})")
    return _read(store, int(found[0]["id"]))


def _of_method(rows: Sequence[Mapping[str, Any]], text: str) -> list[Mapping[str, Any]]:
    for label in (text, _shortest(text)):
        if exact := [row for row in rows if row["method"] == label]:
            return exact
    if not set(text) & set(":+"):
        settings = [row for row in rows if row["method"].startswith(f"{text}:") and "+" not in row["method"]]
        if settings:
            return settings
    raise UnknownName("variant", text, {row["method"] for row in rows}, "(a method, or a number of --list)")


def _shortest(text: str) -> str:
    """The label of a chain that was written with options at their defaults, if it is one."""
    from harness.chain import parse_chain
    from harness.plugins import load_plugins

    try:
        return parse_chain(text, load_plugins().methods).label
    except ConfigError:
        return text  # perhaps of a plugin that is not given: then the text must be the label


def _described(row: Mapping[str, Any]) -> str:
    return f"{row['model']} · {row['method']}, seed {row['seed']}, {row['dtype']}, {row['device']}"


def _read(store: Store, variant_id: int) -> StoredVariant:
    newest = (
        select(cells.c.id, cells.c.status, cells.c.reason)
        .where(cells.c.variant_id == variant_id, cells.c.kind == str(CellKind.TRANSFORM))
        .order_by(cells.c.id.desc())
        .limit(1)
    )
    with store.reading() as connection:
        row = dict(connection.execute(select(variants).where(variants.c.id == variant_id)).mappings().one())
        sweep = connection.execute(select(sweeps).where(sweeps.c.id == row["sweep_id"])).mappings().one()
        cell = connection.execute(newest).first()
    id_, status, reason = (None, None, None) if cell is None else cell
    return StoredVariant(variant_id, row, dict(sweep), id_, status, reason)


# --- planning it again --------------------------------------------------------------------------------


def plan_again(
    found: StoredVariant, *, device: str | None = None, plugins: Sequence[str] | None = None
) -> Target:
    """Plan the variant as its sweep did; no weight is loaded.

    Args:
        device: another one than it was measured on, which counts as a change.
        plugins: where its plugins lie now; by default where they lay.

    Raises:
        ConfigError: it was measured elsewhere, or its transform never succeeded, or something that it was
            made of cannot be found any more.
        NotApplicable: it cannot be made on this device.
    """
    from harness.chain import Chain, Step
    from harness.planning import plan_sweep
    from harness.plugins import load_plugins

    row = found.row
    if row["key"].startswith(IMPORTED):
        raise ConfigError(
            f"{found.label} was imported: it was measured elsewhere, and is exported there; or sweep it here"
        )
    if found.status != "ok":
        reason = f" ({found.reason})" if found.reason else ""
        raise ConfigError(f"{found.label} was never made: its transform is {found.status}{reason}")
    stored = SweepConfig(**found.sweep["config"])
    names = tuple(stored.plugin if plugins is None else plugins)
    loaded = load_plugins(names)
    chain = Chain(
        tuple(
            Step(
                loaded.method(step["name"]),
                loaded.method(step["name"]).options.parse(step["options"], method=step["name"]),
            )
            for step in row["chain"]
        )
    )
    config = stored.model_copy(
        update={
            "methods": (chain.label,),
            "models": (row["model"],),
            "tasks": (),
            "prompt_lens": (),
            "seeds": (row["seed"],),
            "dtype": row["dtype"],
            "device": device or row["device"],
            "include_path": (),
            "plugin": names,
        }
    )
    plan = plan_sweep(config)
    variant = next(each for each in plan.grid.variants if each.chain.label == chain.label)
    decision = variant.cells[0].decision
    if decision is not None:
        raise NotApplicable(f"{found.label} cannot be made here: {decision.reason}")
    return Target(plan, variant, changes_since(found, plan, variant))


def changes_since(found: StoredVariant, plan: SweepPlan, variant: VariantPlan) -> tuple[str, ...]:
    """What decides the variant and is not as it was; empty where its content key is the stored one."""
    if variant.key == found.row["key"]:
        return ()
    manifest = found.sweep["manifest"]
    versions = manifest.get("versions") or {}
    environment = plan.environment
    pairs = [
        ("the device", found.row["device_name"], environment["device"]),
        ("torch", versions.get("torch"), environment["torch"]),
        ("transformers", versions.get("transformers"), environment["transformers"]),
        ("lm-eval", versions.get("lm-eval"), environment["lm_eval"]),
        ("the harness", versions.get("transformer-harness"), environment["harness"]),
        ("the measuring version", manifest.get("measuring_version"), environment["measuring"]),
    ]
    changes = [
        f"{name} ({was} then, {now} now)" for name, was, now in pairs if was is not None and was != now
    ]
    if dump_json(found.row["chain"]) != dump_json(variant.chain.described()):
        changes.append("the options that its methods have")
    if found.row["model_identity"] != variant.model.identity:
        changes.insert(0, "the model's files")
    if changes:
        return tuple(changes)
    commit = (manifest.get("git") or {}).get("commit")
    where = f"; it was measured at commit {commit[:10]}" if commit else ""
    steps = ", ".join(step.method.name for step in variant.chain.steps)
    return (f"the source of {steps} or of what it is built on, or the calibration text{where}",)
