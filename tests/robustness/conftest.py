"""Sweeps as processes of their own that start at once, and a model and tasks that take milliseconds."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.robustness.nursery import Nursery
from tests.robustness.tiny import save_model

PLUGIN = str(Path(__file__).parent / "hostile_methods.py")


@pytest.fixture(scope="session")
def the_nursery(tmp_path_factory):
    made = Nursery(tmp_path_factory.mktemp("nursery"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def nursery(the_nursery):
    yield the_nursery
    the_nursery.hang_up()


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def make_command(model):
    """The arguments of a sweep that takes a second: command("scale,raises", "--timeout", 3)."""

    def arguments(methods, *more, task=True):
        folder = Path(__file__).parent
        tasks = ("--include-path", folder, "--tasks", "tiny_words") if task else ("--tasks", "none")
        return (
            "sweep", "--plugin", PLUGIN, "--methods", methods, "--models", model, *tasks,
            "--prompt-lens", 4, "--new-tokens", 1, "--device", "cpu", *more,
        )  # fmt: skip

    return arguments


@pytest.fixture
def command(make_command):
    return make_command
