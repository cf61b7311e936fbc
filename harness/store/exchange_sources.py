"""Where results are read from: an exported file, another store, or lm-eval's output."""

from __future__ import annotations

import tempfile
from pathlib import Path

from harness.errors import ConfigError
from harness.privacy import without_passwords
from harness.store.exchange_export import Wanted, export_results
from harness.store.exchange_read import Contents, read_results
from harness.store.exchange_text import is_store
from harness.store.lm_eval_files import holds_results
from harness.store.store import Store

__all__ = ["is_text", "read_source"]

_EXPORTED = (".jsonl", ".jsonl.gz")


def is_text(target: str | Path) -> bool:
    """Whether this means files of results, not a store: an exported file, or lm-eval's file or folder."""
    text = str(target)
    if text.endswith((*_EXPORTED, ".json")):
        return True
    try:
        return holds_results(Path(text))
    except (OSError, ValueError):  # a name that no folder can have
        return False


def read_source(target: str | Path) -> list[Contents]:
    """Read and check everything that a file, a folder, a store or a URL holds.

    Of a store these are the current cells, with host names, paths, tracebacks and logs, because nothing
    leaves this machine; passwords stay where they are.

    Raises:
        ConfigError: in one line: what cannot be read, or is of no form that is known.
        StoreError: a store that is missing, empty, older or newer than this version.
    """
    text = str(target)
    if "://" in text or text.endswith((".db", ".sqlite", ".sqlite3")) or _is_store(Path(text)):
        return [_read_store(text)]
    path = Path(text)
    if path.is_dir() or text.endswith(".json"):
        from harness.store.lm_eval_read import read_lm_eval

        return read_lm_eval(path)
    if path.name.startswith("samples_") and text.endswith(".jsonl"):
        raise ConfigError(f"{path} holds lm-eval's samples: name the results_*.json beside it, or the folder")
    return [read_results(path)]


def _is_store(path: Path) -> bool:
    try:
        return path.is_file() and is_store(path)
    except (OSError, ValueError):
        return False


def _read_store(target: str) -> Contents:
    with (
        Store.open_readonly(target) as store,
        tempfile.TemporaryDirectory(prefix="harness-import-") as folder,
    ):
        file = Path(folder) / "rows.jsonl"
        export_results(store, file, Wanted(), with_host=True)
        shown = Path(without_passwords(target))
        try:
            contents = read_results(file)
        except ConfigError as error:
            raise ConfigError(f"{shown}: {str(error).removeprefix(f'{file}, ')}") from None
    contents.file = shown
    return contents
