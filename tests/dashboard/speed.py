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
from functools import partial
from pathlib import Path
from typing import Any

from tests.dashboard.browsing import TABLE, browsing, choose, serving, settle, visit

__all__ = ["measure"]

PAGES = {
    "": "Overview",
    "pareto": "Pareto",
    "compare": "Compare",
    "scaling": "Scaling",
    "method": "Method",
    "sweep?sweep=1": "Sweep",
    "survey": "Survey",
    "environment": "Environment",
}
FILTERS = (
    ("Families", "quantization"),
    ("Models", "zoo:model-20m"),
    ("Methods", "gptq:bits=4:group_size=64"),
)


def measure(path: Path, repeats: int = 3) -> dict[str, dict[str, float]]:
    """For each step the median of the repeats: ``seconds`` as the reader waits, and ``server_cpu_s`` of them.

    ``first`` steps are the first of their page since the server was started. The last entry is the server's
    memory when all is done, in MB.
    """
    found: dict[str, dict[str, float]] = {}
    with serving(path) as server, browsing() as page:

        def step(name: str, do: Callable[[], None], before: Callable[[], None] = lambda: None) -> None:
            taken = []
            for _ in range(repeats if "first" not in name else 1):
                before()
                cpu_s, began = server.cpu_s(), time.perf_counter()
                do()
                taken.append((time.perf_counter() - began, server.cpu_s() - cpu_s))
            seconds, used = (round(statistics.median(each), 2) for each in zip(*taken, strict=True))
            found[name] = {"seconds": seconds, "server_cpu_s": used}

        for path_, heading in PAGES.items():
            open_page = partial(drawn, page, f"{server.url}/{path_}", heading)
            step(f"{heading} first", open_page)
            step(heading, open_page)
        overview = partial(drawn, page, f"{server.url}/", "Overview")
        for label, option in FILTERS:
            step(f"filter {label}", partial(filtered, page, label, option), overview)
        assert page.complaints == [], page.complaints
        found["server"] = {"mb": round(server.resident_bytes() / 1e6)}
    return found


def drawn(page: Any, url: str, heading: str) -> None:
    visit(page, url, heading)
    page.locator(f"{TABLE}, [class*=st-key-claim-]").first.wait_for()  # the Survey has cards


def filtered(page: Any, label: str, option: str) -> None:
    """From the click into a list until the number of variants and the table are the new ones."""
    before = page.locator('[data-testid="stMetricValue"]').first.inner_text()
    choose(page, label, option)
    page.wait_for_function(
        "before => document.querySelector('[data-testid=stMetricValue]').innerText != before", arg=before
    )
    settle(page)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.dashboard.speed", description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    asked = parser.parse_args()
    print(json.dumps(measure(asked.file, asked.repeats)))


if __name__ == "__main__":
    main()
