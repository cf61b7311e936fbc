"""How fast the dashboard is on a store, as a reader sees it, and what memory its server takes.

``python -m tests.dashboard.speed FILE``, after ``python -m harness.testing.large_store FILE``.

The real server and a real browser. A time is from the request, or the click on an option, to everything
drawn: the script has run, and no table or figure is still a placeholder. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.dashboard.browsing import TABLE, browsing, choose, serving, settle, visit

__all__ = ["measure"]

PAGES = {"": "Overview", "pareto": "Pareto", "compare": "Compare", "scaling": "Scaling", "sweep": "Sweep"}
FILTERS = (
    ("Families", "quantization"),
    ("Models", "zoo:model-20m"),
    ("Methods", "gptq:bits=4:group_size=64"),
)


def measure(path: Path, repeats: int = 3) -> dict[str, Any]:
    """Seconds by page (opened for the first time since the server started, and again) and by filter, as the
    median of the repeats; ``server_mb`` when all is done."""
    found: dict[str, Any] = {}
    with serving(path) as server, browsing() as page:
        for name, heading in PAGES.items():
            url = f"{server.url}/{name}"
            found[f"{heading} first"] = timed(lambda url=url, heading=heading: drawn(page, url, heading))
            again = [
                timed(lambda url=url, heading=heading: drawn(page, url, heading)) for _ in range(repeats)
            ]
            found[heading] = statistics.median(again)
        for label, option in FILTERS:
            times = []
            for _ in range(repeats):
                drawn(page, f"{server.url}/", "Overview")
                times.append(filtered(page, label, option))
            found[f"filter {label}"] = statistics.median(times)
        assert page.complaints == [], page.complaints
        found["server_mb"] = server.resident_bytes() / 1e6
    return {name: round(value, 2) for name, value in found.items()}


def timed(step: Callable[[], None]) -> float:
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def drawn(page: Any, url: str, heading: str) -> None:
    visit(page, url, heading)
    page.locator(TABLE).first.wait_for()


def filtered(page: Any, label: str, option: str) -> float:
    """From the click on an option until the number of variants and the table are the new ones."""
    number = page.locator('[data-testid="stMetricValue"]').first
    before = number.inner_text()
    began = time.perf_counter()
    choose(page, label, option)
    page.wait_for_function(
        "before => document.querySelector('[data-testid=stMetricValue]').innerText != before", arg=before
    )
    settle(page)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.dashboard.speed", description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    asked = parser.parse_args()
    print(json.dumps(measure(asked.file, asked.repeats)))


if __name__ == "__main__":
    main()
