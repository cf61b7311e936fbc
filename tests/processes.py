"""The processes that tests run in: which tests stay together, which begin first, and what all of them share.

xdist's own groups go into the ids of the tests, which pytest 9.2 no longer lets it change: there its
``--dist loadgroup`` gives every test to any process, without a word. So the groups are made here, of the
tests' paths. Nothing of torch is imported.
"""

from __future__ import annotations

import gc
import os
import sys
from pathlib import PurePosixPath

import pytest

# Each of the many processes that tests start would otherwise compile the whole package anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# Importing and collecting make millions of objects, and they stay.
gc.set_threshold(20_000, 10, 10)

# These share a process from which sweeps are forked, or a server: each takes seconds to start.
TOGETHER = {
    "robustness": "nursery",
    "cli": "sweeps",
    "claims/test_running.py": "sweeps",
    "measure/test_ceilings.py": "sweeps",
    "store/test_catalogue.py": "sweeps",
    "store/test_postgres_sweeps.py": "sweeps",
    "store": "store",
}
# The longest first, or one of them would be left over when the other processes have nothing more to do.
FIRST = (
    "nursery",
    "sweeps",
    "store",
    "dashboard/test_pages_browser.py",
    "dashboard/test_dashboard_browser.py",
    "dashboard/test_shell_browser.py",
    "core/test_packaging.py",
    "test_method_contract.py",
    "quantization/test_on_zoo.py",
)


def group_of(nodeid: str) -> str:
    """The tests of a file stay together, and those of a few files and folders."""
    path = PurePosixPath(nodeid.partition("::")[0])
    if path.parts[0] == "tests":
        path = path.relative_to("tests")
    return TOGETHER.get(str(path)) or TOGETHER.get(path.parts[0]) or str(path)


def begins_first(nodeid: str) -> int:
    group = group_of(nodeid)
    return FIRST.index(group) if group in FIRST else len(FIRST)


def pytest_collection_modifyitems(config, items):
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: begins_first(item.nodeid))


def pytest_collection_finish(session):
    """What lives until the end need not be looked through whenever garbage is collected."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    if config.getvalue("dist") != "loadgroup":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    config.option.loadscopereorder = False  # the order of `FIRST`, not by the number of tests
    return Groups(config, log)
