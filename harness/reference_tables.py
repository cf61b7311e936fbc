"""The README's tables, generated from the rows in `reference/` by ``python -m harness.docs docs``.

They stand between two markers, and a test compares them with what the files say now. Every number in
them is a stored record; what could not be measured is listed below with its reason.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.errors import ConfigError

__all__ = [
    "BEGIN",
    "CLAIMS",
    "CLAIMS_BEGIN",
    "CLAIMS_END",
    "END",
    "QUALITY",
    "heading",
    "imported_rows",
    "markdown_table",
    "not_measured",
    "reference_files",
    "reference_section",
    "update_readme",
    "with_section",
]

BEGIN = "<!-- reference:begin (generated from reference/ by `make docs`; do not edit) -->"
END = "<!-- reference:end -->"
CLAIMS_BEGIN = "<!-- claims:begin (generated from reference/ by `make docs`; do not edit) -->"
CLAIMS_END = "<!-- claims:end -->"
QUALITY = "quality-"
"""How the files begin whose rows are in `docs/quality.md` and not in the README."""
CLAIMS = "claims-"
"""The same of the rows that decide the claims of `docs/claims.md`."""

_TIMES = (
    ("decode_latency", "decode_speedup", "One decode step"),
    ("prefill_latency", "prefill_speedup", "Prefill"),
)
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

_MOST_ACROSS = 5  # methods beside each other, where a page still shows them

Row = Mapping[str, Any]


def reference_files(root: Path) -> list[Path]:
    """The files of rows in the checkout's `reference/`, by name."""
    return sorted([*root.glob("reference/*.jsonl"), *root.glob("reference/*.jsonl.gz")])


def update_readme(root: Path) -> None:
    """Write the tables into the checkout's README.

    Raises:
        ConfigError: the README has no place for them, or a file in `reference/` is broken.
    """
    readme = root / "README.md"
    text = readme.read_text(encoding="utf-8")
    files = [file for file in reference_files(root) if not file.name.startswith((QUALITY, CLAIMS))]
    readme.write_text(with_section(text, reference_section(files)), encoding="utf-8")


def with_section(
    readme: str, section: str, page: str = "the README", markers: tuple[str, str] = (BEGIN, END)
) -> str:
    """The text with what stands between the two markers replaced.

    Raises:
        ConfigError: the markers are missing, or are there twice.
    """
    begin, end = markers
    between = re.compile(re.escape(begin) + r".*?" + re.escape(end), flags=re.DOTALL)
    if len(between.findall(readme)) != 1:
        raise ConfigError(f"{page} needs these two lines once: {begin} and {end}")
    return between.sub(lambda _: f"{begin}\n{section}\n{end}", readme)


def reference_section(files: Sequence[Path]) -> str:
    """The tables of all files as Markdown; a sentence where there is no file yet."""
    if not files:
        how = "[reference/README.md](reference/README.md) says how to add some"
        return f"No rows are in `reference/` yet; {how}."
    return "\n\n".join(_of_file(file) for file in files)


def imported_rows(file: Path) -> tuple[list[dict[str, Any]], list[Mapping[str, Any]]]:
    """The rows of a file as a store gives them, and the manifests of its sweeps."""
    from harness.cli.results import rows_of
    from harness.store import queries
    from harness.store.exchange_import import import_results
    from harness.store.exchange_read import read_results
    from harness.store.store import Store

    with tempfile.TemporaryDirectory() as folder, Store.open(Path(folder, "rows.db")) as store:
        import_results(store, [read_results(file)])
        rows = rows_of(queries.results(store))
        return rows, queries.sweeps(store)["manifest"].tolist()


def _of_file(file: Path) -> str:
    rows, manifests = imported_rows(file)
    methods = _methods(rows)
    parts = [heading(file, rows, manifests)]
    for metric, speedup, title in _TIMES:
        parts += _time_table(rows, methods, metric, speedup, title)
    parts += [_fact_table(rows), *not_measured(rows)]
    return "\n\n".join(parts)


def heading(file: Path, rows: Sequence[Row], manifests: Sequence[Mapping[str, Any]], prefix: str = "") -> str:
    """Where, with what and when a file's rows were measured.

    Args:
        prefix: leads from the page to the checkout's root.
    """
    devices = _listed(row["device_name"] for row in rows)
    dtypes = _listed(row["dtype"] for row in rows)
    torch = _listed((manifest.get("versions") or {}).get("torch") for manifest in manifests)
    days = sorted({str(manifest["time_utc"])[:10] for manifest in manifests if manifest.get("time_utc")})
    measuring = _listed(manifest.get("measuring_version") for manifest in manifests)
    when = f", {days[0]}" + (f" to {days[-1]}" if days[-1] != days[0] else "") if days else ""
    modes = {str(row["mode"]).partition(",")[0] for row in rows if row["metric"] in dict(_times_only())}
    synthetic = sorted({row["model"] for row in rows if row["synthetic"]})
    note = f" {', '.join(synthetic)}: random weights, so speed and memory only." if synthetic else ""
    timed = f"timed as {_listed(sorted(modes))}" if (modes := modes - {"None"}) else "nothing timed"
    return (
        f"**{devices}**, {dtypes}, torch {torch}{when} (measuring version {measuring}, {timed}; "
        f"[`reference/{file.name}`]({prefix}reference/{file.name})).{note}"
    )


def _times_only() -> list[tuple[str, str]]:
    return [(metric, title) for metric, _, title in _TIMES]


def _listed(values: Iterable[Any]) -> str:
    found = list(dict.fromkeys(str(value) for value in values if value is not None))
    return " and ".join(found) or "unknown"


# --- tables -----------------------------------------------------------------------------------


def _methods(rows: Sequence[Row]) -> list[str]:
    """The baseline first."""
    names = dict.fromkeys(row["method"] for row in sorted(rows, key=lambda row: row["family"] != "baseline"))
    return list(names)


def _time_table(
    rows: Sequence[Row], methods: Sequence[str], metric: str, speedup: str, title: str
) -> list[str]:
    """Models and shapes down, methods across, or the other way where the methods are many.

    A shape that no method could run is left to the list, a method of which nothing was timed to other tables.
    """
    found = {
        (r["model"], r["scenario"], r["method"], r["metric"]): r for r in rows if r["kind"] == "scenario"
    }
    states = {(r["model"], r["scenario"], r["method"]): r["status"] for r in rows if r["kind"] == "scenario"}
    methods = [method for method in methods if any(method == key[2] for key in states)]
    lines = []
    for model, shape in sorted({key[:2] for key in states}, key=_by_size):
        cells = []
        for method in methods:
            record = found.get((model, shape, method, metric))
            ratio = found.get((model, shape, method, speedup))
            cells.append(_time(record, ratio, states.get((model, shape, method), "")))
        if any((model, shape, method, metric) in found for method in methods):
            lines.append([model, shape, *cells])
    if not lines:
        return []
    head = ["model", "shape", *methods]
    if len(methods) > _MOST_ACROSS:
        head, *lines = [list(line) for line in zip(head, *lines, strict=True)]
        head, lines = ["", *head[1:]], [["shape", *lines[0][1:]], *lines[1:]]
    return [f"{title}, with the speed-up over the baseline:", markdown_table(head, lines)]


def _time(record: Row | None, ratio: Row | None, status: str) -> str:
    if record is None:
        return status.replace("_", " ")
    text = _value(record)
    return f"{text} ({_value(ratio)})" if ratio is not None else text


def _fact_table(rows: Sequence[Row]) -> str:
    """One row a variant: what it weighs, then task by task how good it is."""
    variants: dict[tuple[str, str], dict[str, str]] = {}
    columns: dict[str, tuple[str, int]] = {}  # its label, and where it belongs
    for row in sorted(rows, key=lambda row: (row["model"], row["family"] != "baseline")):
        line = variants.setdefault((row["model"], row["method"]), {})
        for place, (metric, label) in enumerate(_FACTS):
            if row["metric"] == metric:
                name = f"{row['task']} {label}" if row["task"] else label
                columns[name] = (row["task"] or "", place)
                line.setdefault(name, _value(row))
    names = sorted(columns, key=lambda name: columns[name])
    lines = [[model, method, *(line.get(n, "") for n in names)] for (model, method), line in variants.items()]
    return "Size and quality:\n\n" + markdown_table(["model", "method", *names], lines)


def not_measured(rows: Sequence[Row]) -> list[str]:
    """What has no result: one line for each reason, with what it concerns."""
    reasons: dict[tuple[str, str, str, str], list[str]] = {}
    for row in rows:
        if row["status"] != "ok":
            where = row["task"] or row["scenario"] or "transform"
            key = (row["model"], where, row["status"], _short(row["reason"] or ""))
            reasons.setdefault(key, []).append(row["method"])
    if not reasons:
        return []
    lines = [
        f"- {_escaped(model)} {_escaped(where)}: {status.replace('_', ' ')}"
        f"{f' ({_escaped(reason)})' if reason else ''}: {_escaped(', '.join(dict.fromkeys(methods)))}"
        for (model, where, status, reason), methods in sorted(reasons.items())
    ]
    return ["Not measured:\n\n" + "\n".join(lines)]


def _by_size(key: tuple[str, str]) -> tuple[Any, ...]:
    model, shape = key
    return model, [int(number) for number in re.findall(r"\d+", shape)], shape


def _short(reason: str) -> str:
    """The first sentence: an allocator's message goes on with numbers that differ from run to run."""
    return re.split(r"(?<=[a-z])\. ", reason, maxsplit=1)[0][:200]


def _value(record: Row) -> str:
    from harness.cli.summary import value_with_interval

    return value_with_interval(record)


def markdown_table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table whose texts draw nothing."""
    head = [_row(columns), "|" + "---|" * len(columns)]
    return "\n".join([*head, *(_row(line) for line in lines)])


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_escaped(cell) for cell in cells) + " |"


def _escaped(text: str) -> str:
    """What was stored by others draws nothing here."""
    return re.sub(r"([\\`*_<>\[\]|])", r"\\\1", " ".join(text.split())) if _ODD.search(text) else text


_ODD = re.compile(r"[\\`*<>|\n]|\]\(")
