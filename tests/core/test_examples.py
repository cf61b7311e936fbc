"""The examples in docstrings are what happens."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {"harness": "harness", "plugins": "harness_plugins", "dashboard": "harness_dashboard"}


def modules_with_examples() -> list[str]:
    """By the names under which they are imported."""
    return [
        ".".join((package, *path.relative_to(ROOT / folder).with_suffix("").parts)).removesuffix(".__init__")
        for folder, package in PACKAGES.items()
        for path in sorted((ROOT / folder).rglob("*.py"))
        if ">>> " in path.read_text(encoding="utf-8")
    ]


def test_there_are_examples_in_every_package():
    assert {name.partition(".")[0] for name in modules_with_examples()} == set(PACKAGES.values())


@pytest.mark.parametrize("name", modules_with_examples())
def test_examples(name):
    found = doctest.testmod(importlib.import_module(name))
    assert found.attempted > 0
    assert found.failed == 0
