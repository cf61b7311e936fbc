"""The harness's own rows inside lm-eval's form.

What lm-eval's files have no place for stands under ``harness``: in the results file the rows of the machine,
the sweep, the variant and its cells as in an exported file, in each sample the outcomes with their details.
lm-eval's tools pass over both, and reading them back gives the rows as they were.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.errors import ConfigError
from harness.store.exchange_layout import FORMAT, VERSION, sections
from harness.store.exchange_read import Contents, RowReader
from harness.store.exchange_rows import Row
from harness.store.exchange_text import problem
from harness.store.lm_eval_layout import Sample
from harness.store.lm_eval_scores import split_record

__all__ = ["OWN", "own_contents", "own_rows"]

OWN = "harness"
_Lines = Sequence[tuple[int, Sample, Mapping[str, Any]]]


def own_rows(roots: Sequence[Row]) -> dict[str, Any]:
    """What stands under `OWN` in a results file: all rows but those of items."""
    declared = [{"table": each.name, "columns": list(each.columns)} for each in sections().values()]
    rows = [
        [row.section.name, *(row.values.get(name) for name in row.section.columns)]
        for root in roots
        for row in root.walk()
        if row.section.name != "items"
    ]
    return {"format": FORMAT, "version": VERSION, "rows": [*declared, *rows]}


def own_contents(file: Path, raw: Mapping[str, Any], samples: Mapping[str, _Lines]) -> Contents:
    """The rows of a file that the harness wrote.

    Raises:
        ConfigError: what an exported file is refused for; and where lm-eval's part and ours disagree,
            because somebody changed one of them.
    """
    own = raw[OWN]
    rows = own.get("rows") if isinstance(own, dict) else None
    if not isinstance(rows, list):
        raise ConfigError(f"{file}: {OWN} holds no rows")
    reader = RowReader(file, is_text=False)
    reader.put({name: own.get(name) for name in ("format", "version")})
    columns: list[str] = []
    left = dict(samples)
    for row in rows:
        reader.put(row)
        if isinstance(row, dict) and row.get("table") == "cells":
            columns = row["columns"]
        elif isinstance(row, list) and row and row[0] == "cells":
            task = dict(zip(columns, row[1:], strict=True)).get("task")
            for item in _items(file, left.pop(str(task), ())):
                reader.put(["items", *(item[name] for name in sections()["items"].columns)])
    if left:
        raise ConfigError(f"{file}: there are samples of {min(left)}, and no such cell")
    reader.end()
    _check_values(file, raw["results"], reader.contents)
    return reader.contents


def _items(file: Path, lines: _Lines) -> list[dict[str, Any]]:
    found = []
    for number, sample, value in lines:
        own = value.get(OWN)
        listed = own.get("items") if isinstance(own, dict) else None
        if not isinstance(listed, list) or not all(
            isinstance(each, list) and len(each) == 3 for each in listed
        ):
            raise problem(file, number, f"a sample of {file.name} without its outcomes under {OWN}")
        for metric, outcome, detail in listed:
            shown = value.get(split_record(str(metric))[0])
            if isinstance(shown, float | int) and not _equal(float(shown), outcome):
                raise problem(file, number, f"{metric} is {shown} in the sample and {outcome} under {OWN}")
            found.append({"metric": metric, "position": sample.doc_id, "outcome": outcome, "detail": detail})
    return found


def _check_values(file: Path, results: Mapping[str, Any], contents: Contents) -> None:
    for variant in contents.variants:
        for cell in variant.children:
            for record in cell.children:
                if record.section.name != "records":
                    continue
                metric, filter_name, subtask = split_record(record.values["metric"])
                entry = results.get(subtask or cell.values["task"])
                shown = entry.get(f"{metric},{filter_name}") if isinstance(entry, dict) else None
                value = record.values["value"]
                if isinstance(shown, float | int) and not _equal(float(shown), value):
                    name = record.values["metric"]
                    raise ConfigError(
                        f"{file}: {name} of {cell.values['task']} is {shown} in results and {value} under "
                        f"{OWN}: one of them was changed"
                    )


def _equal(a: float, b: Any) -> bool:
    return isinstance(b, float | int) and (a == b or (math.isnan(a) and math.isnan(b)))
