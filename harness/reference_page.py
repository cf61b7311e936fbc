"""The tables of `docs/reference.md`, generated from the rows of devices in `reference/` by ``make docs``.

For each file and model: times with their speed-ups, bytes and quality, the batch sizes at which methods break
even with the baseline, and why a method is slower or no smaller. Every number is a stored record, every
reason a stored verdict.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.errors import ConfigError
from harness.reference_tables import (
    TIMES,
    escaped,
    heading,
    imported_store,
    markdown_table,
    methods_of,
    not_measured,
    rows_in,
    timed_files,
    value_of,
    with_section,
)

if TYPE_CHECKING:
    from harness.store.store import Store

__all__ = ["PAGE", "reference_page_section", "update_reference_page"]

PAGE = "docs/reference.md"

_FACTS = (
    ("weight_bytes", "weights"),
    ("kv_cache_bytes_per_token", "KV/token"),
    ("bits_per_byte", "bits/byte"),
    ("token_perplexity", "perplexity"),
    ("acc", "accuracy"),
    ("spearman", "Spearman"),
    ("mean_kl", "KL"),
    ("embedding_distance", "embedding distance"),
    ("flips", "flips"),
)

Row = Mapping[str, Any]


def update_reference_page(root: Path) -> None:
    """Write the tables into the checkout's page, where it has one.

    Raises:
        ConfigError: the page has no place for them, or a file in `reference/` is broken.
    """
    page = root / PAGE
    if page.exists():
        text = page.read_text(encoding="utf-8")
        page.write_text(with_section(text, reference_page_section(timed_files(root)), PAGE), encoding="utf-8")


def reference_page_section(files: Sequence[Path]) -> str:
    """The tables of all files as Markdown."""
    return "\n\n".join(_of_file(file) for file in files)


def _of_file(file: Path) -> str:
    with imported_store(file) as store:
        rows, manifests = rows_in(store)
        devices = " and ".join(dict.fromkeys(str(row["device_name"]) for row in rows))
        parts = [f"## {escaped(devices)}", heading(file, rows, manifests, prefix="../")]
        for model in sorted({row["model"] for row in rows}):
            of_model = [row for row in rows if row["model"] == model]
            parts += [f"### {escaped(model)}", *_of_model(store, model, of_model)]
    return "\n\n".join([*parts, *not_measured(rows)])


def _of_model(store: Store, model: str, rows: Sequence[Row]) -> list[str]:
    parts = []
    for metric, speedup, title in TIMES:
        parts += _time_table(rows, metric, speedup, title)
    return [*parts, _fact_table(rows), *_break_even(store, model, rows), *_verdicts(rows)]


def _time_table(rows: Sequence[Row], metric: str, speedup: str, title: str) -> list[str]:
    """Methods down and shapes across; a method or a shape with no time is left to the other tables."""
    scenarios = [row for row in rows if row["kind"] == "scenario"]
    found = {(row["scenario"], row["method"], row["metric"]): row for row in scenarios}
    states = {(row["scenario"], row["method"]): row["status"] for row in scenarios}
    shapes = sorted({shape for shape, _, name in found if name == metric}, key=_by_size)
    methods = [method for method in methods_of(rows) if any((s, method, metric) in found for s in shapes)]
    if not methods:
        return []
    lines = []
    for method in methods:
        cells = []
        for shape in shapes:
            record, ratio = (found.get((shape, method, name)) for name in (metric, speedup))
            cells.append(_time(record, ratio, states.get((shape, method), "")))
        lines.append([method, *cells])
    table = markdown_table(["method", *shapes], lines)
    return [f"{title}, with the speed-up over the baseline:", table]


def _time(record: Row | None, ratio: Row | None, status: str) -> str:
    if record is None:
        return status.replace("_", " ")
    return f"{value_of(record)} ({value_of(ratio)})" if ratio is not None else value_of(record)


def _fact_table(rows: Sequence[Row]) -> str:
    """One row a variant: what it weighs, then task by task how good it is."""
    variants: dict[str, dict[str, str]] = {}
    columns: dict[str, tuple[str, int]] = {}  # its label, and where it belongs
    for row in sorted(rows, key=lambda row: row["family"] != "baseline"):
        line = variants.setdefault(row["method"], {})
        for place, (metric, label) in enumerate(_FACTS):
            if row["metric"] == metric:
                name = f"{row['task']} {label}" if row["task"] else label
                columns[name] = (row["task"] or "", place)
                line.setdefault(name, value_of(row))
    names = sorted(columns, key=lambda name: columns[name])
    lines = [[method, *(line.get(name, "") for name in names)] for method, line in variants.items()]
    title = "Size and quality" if any(place for place, _ in columns.values()) else "Size"
    return f"{title}:\n\n" + markdown_table(["method", *names], lines)


def _break_even(store: Store, model: str, rows: Sequence[Row]) -> list[str]:
    """Up to which batch size each method is faster than the baseline, or from which on; nothing where no two
    batch sizes were timed."""
    from harness.comparing.break_even import break_even_batches

    timed = {row["method"] for row in rows if row["kind"] == "scenario"}
    baseline, *others = methods_of(rows)
    try:
        found = break_even_batches(store, baseline, [name for name in others if name in timed], [model])
    except ConfigError:  # not timed at two batch sizes
        return []
    lines = []
    for row in found:
        what = row.metric.removesuffix("_latency").replace("_", " ")
        lines.append([row.method_b, what, str(row.prompt_len), str(row.found), row.says])
    head = ["method", "what", "prompt", "break-even", "in words"]
    return ["Batch size at which a method breaks even with the baseline:", markdown_table(head, lines)]


def _verdicts(rows: Sequence[Row]) -> list[str]:
    """Why a method is slower than the baseline or no smaller, as was stored with its times."""
    order = {method: place for place, method in enumerate(methods_of(rows))}
    found = [row for row in rows if row["metric"] == "verdict" and row["value"]]
    found.sort(key=lambda row: (order[row["method"]], _by_size(row["scenario"] or "")))
    lines = [f"- {escaped(row['method'])}, {row['scenario']}: {escaped(row['note'] or '')}" for row in found]
    return ["Why slower, or no smaller:\n\n" + "\n".join(lines)] if lines else []


def _by_size(shape: str) -> tuple[Any, ...]:
    return [int(number) for number in re.findall(r"\d+", shape)], shape
