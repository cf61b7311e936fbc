"""Where results are read from: an exported file, another store, or lm-eval's output."""

from __future__ import annotations

from pathlib import Path

from harness.store.exchange_read import Contents, read_results

__all__ = ["is_text", "read_source"]


def is_text(target: str | Path) -> bool:
    return str(target).endswith((".jsonl", ".jsonl.gz"))


def read_source(target: str | Path) -> Contents:
    return read_results(Path(target))
