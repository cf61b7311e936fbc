"""``harness methods | models | plugins``: what plugins of odd kinds look like in the lists."""

from __future__ import annotations

import json
import textwrap

import pytest

from harness.cli.app import run

ODD = """
    from enum import Enum

    from harness import Method, ModelEntry, Options, TaskSource, hookimpl

    class Mode(Enum):
        FAST = "fast"
        SLOW = "slow"

    class OddOptions(Options):
        mode: Mode = Mode.FAST
        needed: int
        perhaps: Mode | None = None

    def transform(model, options, context):
        return model

    @hookimpl
    def register_methods():
        return [Method(name="odd", options=OddOptions, transform=transform)]

    @hookimpl
    def register_models():
        return [ModelEntry("gone", "./nowhere", "a folder")]

    @hookimpl
    def register_tasks():
        return [TaskSource("tasks")]
"""


@pytest.fixture
def listed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "odd.py").write_text(textwrap.dedent(ODD))

    def run_it(*arguments):
        assert run([*arguments, "--plugin", "odd.py"]) == 0
        return capsys.readouterr().out

    return run_it


def test_options_say_their_choices_and_which_are_required(listed):
    lines = [line.split() for line in listed("methods", "odd").splitlines()]
    assert ["mode", "fast", "|", "slow", "fast"] in lines
    assert ["needed", "integer", "required"] in lines
    assert ["perhaps", "fast", "|", "slow", "|", "null", "None"] in lines


def test_a_model_that_cannot_be_loaded_hides_none_of_the_others(listed):
    rows = {row["model"]: row for row in json.loads(listed("models", "--format", "json"))}
    assert rows["gone"]["summary"] == "a folder; model directory './nowhere' does not exist"
    assert rows["zoo:llama-6m"]["layers"] == 6


def test_a_plugin_registers_its_folders_of_tasks_too(listed):
    rows = {row["plugin"]: row for row in json.loads(listed("plugins", "--format", "json"))}
    assert rows["odd"]["registers"] == "odd, gone, tasks"
