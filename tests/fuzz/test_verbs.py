"""Every verb with every option that the application lists: an exit code and a line, never a traceback."""

from __future__ import annotations

import shutil

import pytest
import typer
from hypothesis import strategies as st

from harness.cli.app import app
from harness.store.store import Store
from tests.dashboard.filling import fill
from tests.fuzz.exploring import examples, explore, hostile_text, run_cleanly


def _verbs():
    found = {}

    def visit(command, words):
        found[words] = command
        for name, inner in getattr(command, "commands", {}).items():
            visit(inner, (*words, name))

    visit(typer.main.get_command(app), ())
    return found


VERBS = _verbs()
MEASURES = ("aa",)  # a minute of timing, each time
# What keeps a verb from measuring; the last one of an option counts.
IDLE = {("sweep",): ("--dry-run",), ("reproduce",): ("--budget", "0")}
SLOW = (("doctor",), ("models",), ("tasks",))
# What a value must not name outside of the test's folder, because the verb would write or read all of it.
_WRITES = {"db", "directory", "file", "include_path"}


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A store with something to show."""
    path = tmp_path_factory.mktemp("filled") / "results.db"
    with Store.open(path) as store:
        fill(store)
    return path


@pytest.fixture(autouse=True)
def _a_store_and_no_server(monkeypatch, filled):
    shutil.copy(filled, "results.db")
    monkeypatch.setattr("harness_dashboard.launch.serve", lambda *_arguments, **_options: 0)


def _inside(text):
    return text.replace("/", "_").replace("~", "_").strip(". ") or "x"


@st.composite
def _commands(draw, words):
    parameters = VERBS[words].params
    arguments = list(words)
    options = [each for each in parameters if each.param_type_name == "option" and each.name not in MEASURES]
    for option in draw(st.lists(st.sampled_from(options), max_size=3)) if options else []:
        arguments.append(draw(st.sampled_from(option.opts)))
        if not option.is_flag:
            value = draw(hostile_text())
            arguments.append(_inside(value) if option.name in _WRITES else value)
    for argument in parameters:
        if argument.param_type_name == "argument" and draw(st.integers(0, 9)):
            arguments.append(
                _inside(draw(hostile_text())) if words[-1] in ("export", "import") else draw(hostile_text())
            )
    return [*arguments, *IDLE.get(words, ())]


@pytest.mark.parametrize("words", VERBS, ids=" ".join)
@examples
def test_any_arguments(words, count):
    # A verb costs some hundredths of a second; these look at the machine or list thousands of tasks.
    share = 10 if words in SLOW else 4
    explore(_commands(words), run_cleanly, count // share)


@examples
def test_any_words(count):
    words = st.sampled_from(
        [*(word for words in VERBS for word in words), "--help", "--version", "-h", "--format"]
    )
    lines = st.lists(words | hostile_text(), max_size=4).filter(
        lambda line: not {"dashboard", "reproduce", "--aa"} & set(line)
    )
    explore(lines, run_cleanly, count)
