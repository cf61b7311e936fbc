"""The tables of `docs/quality.md`, generated from ``reference/quality-*.jsonl`` by ``make docs``.

One table a model, one line a variant: what it stores for a weight, and what it loses against the untouched
model on the same windows and items. Every number is a stored record with its interval.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.reference_tables import (
    QUALITY,
    heading,
    imported_rows,
    markdown_table,
    not_measured,
    reference_files,
    with_section,
)

__all__ = ["PAGE", "quality_section", "update_quality_page"]

PAGE = "docs/quality.md"

_COLUMNS = (
    (None, "stored_bits_per_weight", "bits/weight", ".3g"),
    (None, "compression_ratio", "smaller", ".3gx"),
    ("kjv", "token_perplexity", "perplexity", ".4g"),
    ("kjv", "nll_rise", "rise of NLL (nats)", "+.3g"),
    ("kjv", "mean_kl", "KL (nats)", ".2g"),
    ("grammar", "acc", "accuracy (%)", "%"),
    ("grammar", "acc_difference", "difference (points)", "+%"),
    ("grammar", "flips", "flips (%)", "%"),
)

Row = Mapping[str, Any]


def update_quality_page(root: Path) -> None:
    """Write the tables into the checkout's page, where it has one.

    Raises:
        ConfigError: the page has no place for them, or a file in `reference/` is broken.
    """
    page = root / PAGE
    if page.exists():
        files = [file for file in reference_files(root) if file.name.startswith(QUALITY)]
        text = page.read_text(encoding="utf-8")
        page.write_text(with_section(text, quality_section(files), PAGE), encoding="utf-8")


def quality_section(files: Sequence[Path]) -> str:
    """The tables of all files as Markdown."""
    return "\n\n".join(_of_file(file) for file in files)


def _of_file(file: Path) -> str:
    rows, manifests = imported_rows(file)
    parts = [heading(file, rows, manifests, prefix="../")]
    for model in sorted({row["model"] for row in rows}):
        variants = _variants([row for row in rows if row["model"] == model])
        parts += [f"### {model}", markdown_table(_header(), [_line(each) for each in variants])]
    return "\n\n".join([*parts, *not_measured(rows)])


def _variants(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Records by (task, metric) of each variant that was scored: fewest bits last, then least loss first."""
    found: dict[str, dict[Any, Any]] = {}
    for row in rows:
        variant = found.setdefault(row["method"], {"row": row})
        variant[row["task"], row["metric"]] = row
    scored = [variant for variant in found.values() if ("kjv", "nll") in variant]
    return sorted(scored, key=_order)


def _order(variant: Mapping[Any, Any]) -> tuple[bool, int, float]:
    bits, rise = variant.get((None, "stored_bits_per_weight")), variant.get(("kjv", "nll_rise"))
    return (
        variant["row"]["family"] != "baseline",
        -round(bits["value"]) if bits else 0,
        rise["value"] if rise else 0.0,
    )


def _header() -> list[str]:
    return ["method", *(f"{task} {label}" if task else label for task, _, label, _ in _COLUMNS)]


def _line(variant: Mapping[Any, Any]) -> list[str]:
    row = variant["row"]
    name = f"{row['method']} (simulated)" if row["simulated"] else row["method"]
    return [name, *(_cell(variant.get((task, metric)), form) for task, metric, _, form in _COLUMNS)]


def _cell(record: Row | None, form: str) -> str:
    if record is None:
        return ""
    text = _number(record["value"], form)
    if "+" in form and record["lower"] is not None:
        text += f" [{_number(record['lower'], form)}, {_number(record['upper'], form)}]"
    return text


def _number(value: float, form: str) -> str:
    if form.endswith("%"):
        return f"{100 * value:{'+' if form[0] == '+' else ''}.1f}"
    if form.endswith("x"):
        return f"{value:{form[:-1]}}x"
    return f"{value:{form}}"
