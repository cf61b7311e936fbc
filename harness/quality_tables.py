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

_STORED = (("stored_bits_per_weight", "bits/weight", ".3g"), ("compression_ratio", "smaller", ".3gx"))
_SCORED = (
    ("token_perplexity", "perplexity", ".4g"),
    ("nll_rise", "rise of NLL (nats)", "+.3g"),
    ("mean_kl", "KL (nats)", ".2g"),
    ("acc", "accuracy (%)", "%"),
    ("acc_difference", "difference (points)", "+%"),
    ("flips", "flips (%)", "%"),
    ("spearman", "Spearman", ".4f"),
    ("spearman_difference", "difference", "+.4f"),
    ("embedding_distance", "embedding distance", ".2g"),
)
_LOSSES = (("nll_rise", 1.0), ("spearman_difference", -1.0), ("acc_difference", -1.0))

Column = tuple[str | None, str, str, str]  # task, metric, label, form
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
        of_model = [row for row in rows if row["model"] == model]
        columns = _columns(of_model)
        header = ["method", *(f"{task} {label}" if task else label for task, _, label, _ in columns)]
        lines = [_line(variant, columns) for variant in _variants(of_model)]
        parts += [f"### {model}", markdown_table(header, lines)]
    return "\n\n".join([*parts, *not_measured(rows)])


def _columns(rows: Sequence[Row]) -> list[Column]:
    """What is stored, then task by task what there is of it; perplexities first."""
    there = {(row["task"], row["metric"]) for row in rows}
    tasks = sorted({task for task, _ in there if task}, key=lambda task: ((task, "nll") not in there, task))
    stored: list[Column] = [(None, *column) for column in _STORED]
    scored: list[Column] = [(task, *column) for task in tasks for column in _SCORED]
    return [column for column in (*stored, *scored) if column[:2] in there]


def _variants(rows: Sequence[Row]) -> list[dict[Any, Row]]:
    """Records by (task, metric) of each variant that was scored: fewest bits last, then least loss first."""
    found: dict[str, dict[Any, Row]] = {}
    for row in rows:
        variant = found.setdefault(row["method"], {})
        variant[None, None] = row
        variant[row["task"], row["metric"]] = row
    scored = [variant for variant in found.values() if any(task and metric for task, metric in variant)]
    return sorted(scored, key=_order)


def _order(variant: Mapping[Any, Row]) -> tuple[bool, int, float]:
    bits = variant.get((None, "stored_bits_per_weight"))
    losses = (
        sign * row["value"]
        for metric, sign in _LOSSES
        for (_, name), row in sorted(variant.items(), key=str)
        if name == metric
    )
    is_method = variant[None, None]["family"] != "baseline"
    return is_method, -round(bits["value"]) if bits else 0, next(losses, 0.0)


def _line(variant: Mapping[Any, Row], columns: Sequence[Column]) -> list[str]:
    row = variant[None, None]
    name = f"{row['method']} (simulated)" if row["simulated"] else row["method"]
    return [name, *(_cell(variant.get((task, metric)), form) for task, metric, _, form in columns)]


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
