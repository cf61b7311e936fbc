"""A report as one HTML file: styles inside, no script, no network, every stored text escaped."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from harness.display import DARK_FAMILY_COLOURS, FAMILY_COLOURS
from harness.errors import ConfigError
from harness.report.content import Front, Machine, Report
from harness.report.scatter import has_place, scatter

__all__ = ["LARGEST_BYTES", "to_html"]

LARGEST_BYTES = 5_000_000

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"

_STYLE = """
:root { color-scheme: light dark; --text: #1c1e26; --soft: #6a6f7d; --line: #d9dbe2; --back: #ffffff; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e8e9ee; --soft: #a0a4b0; --line: #3a3d48; --back: #16171d; }
}
body { font: 15px/1.45 system-ui, sans-serif; color: var(--text); background: var(--back);
  max-width: 1280px; margin: 2rem auto; padding: 0 1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .7rem; border-bottom: 1px solid var(--line); vertical-align: top; }
td { white-space: nowrap; } td.words { white-space: normal; min-width: 24rem; }
figure { margin: 1rem 0; max-width: 760px; } figcaption, .soft { color: var(--soft); }
svg { width: 100%; height: auto; } svg text { font: 11px system-ui, sans-serif; fill: var(--soft); }
svg .name { fill: var(--text); } svg .axis { font-size: 12px; }
svg .grid { stroke: var(--line); } svg .front { fill: none; stroke: var(--soft); stroke-dasharray: 4 3; }
svg .bar { stroke: currentColor; stroke-opacity: .5; } svg circle { fill: currentColor; }
svg .hollow circle { fill: var(--back); stroke: currentColor; stroke-width: 2; }
pre { overflow-x: auto; font-size: 12px; } summary { cursor: pointer; }
"""


def to_html(report: Report) -> str:
    """The whole page.

    Raises:
        ConfigError: it would be larger than `LARGEST_BYTES`.
    """
    table = report.table
    body = [
        "<h1>What was measured</h1>",
        f'<p class="soft">{_text(report.made_at)}, harness {_text(report.version)}</p>',
        _table(table.columns, ([row.get(name) or "" for name in table.columns] for row in table.rows)),
        *(f'<p class="soft">{_text(note)}</p>' for note in table.footnotes),
    ]
    if report.fronts:
        body.append("<h2>Quality against cost</h2>")
        for front in report.fronts:
            body.append(f"<figure>{scatter(front)}<figcaption>{_caption(front)}</figcaption></figure>")
    if report.verdicts:
        columns = ("model", "method", "shape", "verdict")
        body += ["<h2>Why</h2>", _table(columns, report.verdicts, words=3)]
    if report.problems:
        columns_of_problems = ("model", "method", "cell", "status", "reason")
        body += ["<h2>Not measured</h2>", _table(columns_of_problems, report.problems, words=4)]
    body += ["<h2>Where</h2>", *(_machine(machine) for machine in report.machines)]
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>harness: what was measured</title><style>{_STYLE}{_families()}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )
    size = len(page.encode())
    if size > LARGEST_BYTES:
        raise ConfigError(
            f"the report would have {size / 1e6:.1f} MB, more than {LARGEST_BYTES / 1e6:.0f}; "
            "narrow it with --sweep, --models, --methods or --tasks"
        )
    return page


def _caption(front: Front) -> str:
    families = dict.fromkeys(point.family for point in front.points)
    legend = " ".join(f'<span class="{_text(name)}">●</span>&nbsp;{_text(name)}' for name in families)
    hollow = " Hollow: simulated or synthetic." if any(point.hollow for point in front.points) else ""
    beyond = ", ".join(point.name for point in front.points if not has_place(point))
    lacking = f" Not drawn, because infinite: {beyond}." if beyond else ""
    told = f"{front.model} on {front.device}. Dashed: what nothing else beats in both.{hollow}{lacking}"
    return f"{legend}<br>{_text(told)}"


def _families() -> str:
    light = "".join(f".{name} {{ color: {colour}; }} " for name, colour in FAMILY_COLOURS.items())
    dark = "".join(f".{name} {{ color: {colour}; }} " for name, colour in DARK_FAMILY_COLOURS.items())
    return f"{light}@media (prefers-color-scheme: dark) {{ {dark}}}"


def _table(columns: Sequence[str], rows: Iterable[Sequence[Any]], words: int | None = None) -> str:
    head = "".join(f'<th scope="col">{_text(name)}</th>' for name in columns)
    lines = []
    for row in rows:
        cells = (
            f'<td class="words">{_text(cell)}</td>' if place == words else f"<td>{_text(cell)}</td>"
            for place, cell in enumerate(row)
        )
        lines.append(f"<tr>{''.join(cells)}</tr>")
    table = f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody>"
    return f'<div class="scroll"><table>{table}</table></div>'


def _machine(machine: Machine) -> str:
    facts: Mapping[str, Any] = machine.facts
    headline = (
        f"sweep {machine.sweep}: {facts.get('device_name', 'unknown device')}, {facts.get('time_utc', '')}"
    )
    told = json.dumps(facts, indent=2, ensure_ascii=False, default=str)
    return (
        f"<details><summary>{_text(headline)}</summary><pre>{_text(machine.command)}</pre>"
        f"<pre>{_text(told)}</pre></details>"
    )


def _text(value: Any) -> str:
    return html.escape(str(value))
