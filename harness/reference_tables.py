"""The README's tables, generated from the rows in `reference/` by ``python -m harness.docs docs``.

They stand between two markers, and a test compares them with what the files say now. Every number in
them is a stored record. One table a file: the model that most is known of, at its shortest prompt;
`harness.reference_page` has everything.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.comparing.growth import shape_of
from harness.errors import ConfigError

if TYPE_CHECKING:
    from harness.store.store import Store

__all__ = [
    "BEGIN",
    "CLAIMS",
    "CLAIMS_BEGIN",
    "CLAIMS_END",
    "END",
    "QUALITY",
    "TIMES",
    "escaped",
    "heading",
    "imported_rows",
    "imported_store",
    "markdown_table",
    "methods_of",
    "not_measured",
    "reference_files",
    "reference_section",
    "rows_in",
    "timed_files",
    "update_readme",
    "value_of",
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

TIMES = (
    ("decode_latency", "decode_speedup", "One decode step"),
    ("prefill_latency", "prefill_speedup", "Prefill"),
)
"""What is timed: its metric, that of its ratio to the baseline, and what it is called."""

Row = Mapping[str, Any]


def reference_files(root: Path) -> list[Path]:
    """The files of rows in the checkout's `reference/`, by name."""
    return sorted([*root.glob("reference/*.jsonl"), *root.glob("reference/*.jsonl.gz")])


def timed_files(root: Path) -> list[Path]:
    """Those of times on a device, which stand in the README."""
    return [file for file in reference_files(root) if not file.name.startswith((QUALITY, CLAIMS))]


def update_readme(root: Path) -> None:
    """Write the tables into the checkout's README.

    Raises:
        ConfigError: the README has no place for them, or a file in `reference/` is broken.
    """
    readme = root / "README.md"
    text = readme.read_text(encoding="utf-8")
    readme.write_text(with_section(text, reference_section(timed_files(root))), encoding="utf-8")


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
    everything = (
        "[docs/reference.md](docs/reference.md) has all models, methods and shapes, "
        "where methods break even, and why one is slower."
    )
    return "\n\n".join([*(_of_file(file) for file in files), everything])


@contextmanager
def imported_store(file: Path) -> Iterator[Store]:
    """A store, for as long as the context lasts, with the rows of a file."""
    from harness.store.exchange_import import import_results
    from harness.store.exchange_read import read_results
    from harness.store.store import Store

    with tempfile.TemporaryDirectory() as folder, Store.open(Path(folder, "rows.db")) as store:
        import_results(store, [read_results(file)])
        yield store


def rows_in(store: Store) -> tuple[list[dict[str, Any]], list[Mapping[str, Any]]]:
    """The rows of a store, and the manifests of its sweeps."""
    from harness.cli.results import rows_of
    from harness.store import queries

    return rows_of(queries.results(store)), queries.sweeps(store)["manifest"].tolist()


def imported_rows(file: Path) -> tuple[list[dict[str, Any]], list[Mapping[str, Any]]]:
    """The rows of a file as a store gives them, and the manifests of its sweeps."""
    with imported_store(file) as store:
        return rows_in(store)


def _of_file(file: Path) -> str:
    rows, manifests = imported_rows(file)
    model, prompt = _most_known(rows)
    of_model = [row for row in rows if row["model"] == model]
    return "\n\n".join([heading(file, rows, manifests), *_summary(of_model, prompt)])


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
    times = {metric for metric, _, _ in TIMES}
    modes = {str(row["mode"]).partition(",")[0] for row in rows if row["metric"] in times}
    synthetic = sorted({row["model"] for row in rows if row["synthetic"]})
    note = f" {', '.join(synthetic)}: random weights, so speed and memory only." if synthetic else ""
    timed = f"timed as {_listed(sorted(modes))}" if (modes := modes - {"None"}) else "nothing timed"
    return (
        f"**{devices}**, {dtypes}, torch {torch}{when} (measuring version {measuring}, {timed}; "
        f"[`reference/{file.name}`]({prefix}reference/{file.name})).{note}"
    )


def _listed(values: Iterable[Any]) -> str:
    found = list(dict.fromkeys(str(value) for value in values if value is not None))
    return " and ".join(found) or "unknown"


# --- tables -----------------------------------------------------------------------------------


def methods_of(rows: Sequence[Row]) -> list[str]:
    """The baseline first."""
    names = dict.fromkeys(row["method"] for row in sorted(rows, key=lambda row: row["family"] != "baseline"))
    return list(names)


def _most_known(rows: Sequence[Row]) -> tuple[str | None, int]:
    """The model of which most methods were timed with more than one batch size, and its shortest prompt."""
    batches: dict[tuple[str, int], dict[str, set[int]]] = {}
    for row in rows:
        if row["metric"] == TIMES[0][0] and (shape := shape_of(row["scenario"] or "")):
            batch, prompt, _ = shape
            of_prompt = batches.setdefault((row["model"], prompt), {})
            of_prompt.setdefault(row["method"], set()).add(batch)
    if not batches:
        return None, 0

    def known(key: tuple[str, int]) -> tuple[int, int, int, str]:
        methods = batches[key].values()
        return sum(len(found) > 1 for found in methods), len(methods), -key[1], key[0]

    return max(batches, key=known)


def _summary(rows: Sequence[Row], prompt: int) -> list[str]:
    """Bytes and times of the methods that were timed with more than one batch size (of all where none was):
    the baseline's as they are, and of the others how much faster they are.

    Args:
        rows: of one model.
    """
    cells: dict[tuple[str, str, int], Row] = {}
    weights: dict[str, Row] = {}
    for row in rows:
        shape = shape_of(row["scenario"] or "")
        if shape is not None and shape[1] == prompt:
            cells[row["method"], row["metric"], shape[0]] = row
        elif row["metric"] == "weight_bytes":
            weights.setdefault(row["method"], row)
    batches = sorted({batch for _, metric, batch in cells if metric == TIMES[0][0]})
    timed = {method: sum((method, TIMES[0][0], batch) in cells for batch in batches) for method in weights}
    least = 2 if any(count > 1 for count in timed.values()) else 1
    lines = []
    for method in methods_of(rows):
        if timed.get(method, 0) < least:
            continue
        line = [method, value_of(weights[method])]
        for metric, speedup, _ in TIMES:
            for batch in batches:
                found = cells.get((method, speedup, batch)) or cells.get((method, metric, batch))
                line.append("" if found is None else value_of(found))
        lines.append(line)
    if not lines:
        return []
    head = ["method", "weights"]
    head += [f"{name}, batch {batch}" for name in ("decode", "prefill") for batch in batches]
    model = rows[0]["model"]
    about = f"{model}, prompts of {prompt} tokens; of the methods the speed-up over the baseline:"
    return [about, markdown_table(head, lines)]


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
        f"- {escaped(model)} {escaped(where)}: {status.replace('_', ' ')}"
        f"{f' ({escaped(reason)})' if reason else ''}: {escaped(', '.join(dict.fromkeys(methods)))}"
        for (model, where, status, reason), methods in sorted(reasons.items())
    ]
    return ["Not measured:\n\n" + "\n".join(lines)]


def _short(reason: str) -> str:
    """The first sentence: an allocator's message goes on with numbers that differ from run to run."""
    return re.split(r"(?<=[a-z])\. ", reason, maxsplit=1)[0][:200]


def value_of(record: Row) -> str:
    """With its interval."""
    from harness.cli.summary import value_with_interval

    return value_with_interval(record)


def markdown_table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table whose texts draw nothing."""
    head = [_row(columns), "|" + "---|" * len(columns)]
    return "\n".join([*head, *(_row(line) for line in lines)])


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(escaped(cell) for cell in cells) + " |"


def escaped(text: str) -> str:
    """What was stored by others draws nothing here."""
    return re.sub(r"([\\`*_<>\[\]|])", r"\\\1", " ".join(text.split())) if _ODD.search(text) else text


_ODD = re.compile(r"[\\`*<>|\n]|\]\(")
