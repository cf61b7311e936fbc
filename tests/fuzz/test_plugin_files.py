"""`--plugin` with what is no plugin, and plugins that do their worst when they are imported."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.fuzz.exploring import run_cleanly

GOOD = """
from harness import Method, Options, hookimpl


def unchanged(model, options, context):
    return model


@hookimpl
def register_methods():
    return [Method(name={name!r}, options=Options, transform=unchanged)]
"""


def _refused(argument, *messages):
    code, _, said = run_cleanly(["methods", "--plugin", argument])
    assert code == 2
    for message in messages:
        assert message in said
    # A broken plugin does nothing to the next command.
    assert run_cleanly(["plugins"])[0] == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("raise SystemExit(7)", "SystemExit: 7"),
        ("import sys\nsys.exit('bye')", "SystemExit: bye"),
        ("raise RecursionError('deep')", "RecursionError"),
        ("def f():\n    f()\nf()", "RecursionError"),
        ("raise MemoryError", "MemoryError"),
        ("raise GeneratorExit", "GeneratorExit"),
        ("class Own(BaseException):\n    pass\nraise Own('mine')", "Own: mine"),
        ("raise ValueError('first\\nsecond \\x1b[31m')", "ValueError: first"),
        ("raise ValueError('\\ud800')", "ValueError"),
        ("x = = 1", "SyntaxError"),
        ("x = 1\0", "null bytes"),
        ("x = '\udcff'", "SyntaxError"),
        ("", "registers nothing"),
        ("from harness import hookimpl\n@hookimpl\ndef register_methods():\n    return 5", "TypeError"),
        (
            "from harness import hookimpl\n@hookimpl\ndef register_methods():\n    return [None]",
            "list of Method",
        ),
        (
            "from harness import hookimpl\n@hookimpl\ndef register_methods():\n    raise SystemExit",
            "SystemExit",
        ),
        (GOOD.format(name="../../x"), "lower-case words"),
        (GOOD.format(name="a b"), "lower-case words"),
        (GOOD.format(name="a\nb"), "lower-case words"),
        (GOOD.format(name="gptq"), "registered by both"),
    ],
)
def test_a_file_that_does_its_worst(text, message):
    Path("worst.py").write_text(text, encoding="utf-8", errors="surrogateescape")
    _refused("worst.py", message)


def test_an_interrupt_is_an_interrupt():
    Path("stop.py").write_text("raise KeyboardInterrupt")
    assert run_cleanly(["methods", "--plugin", "stop.py"])[0] == 130


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("folder/", "it is a directory"),
        ("./folder", "it is a directory"),
        ("folder.py", "it is a directory"),
        ("binary.py", "SyntaxError"),
        ("gone.py", "no such file"),
        ("a\0b.py", "no such file"),
        ("x" * 5000 + ".py", "no such file"),
        ("~nobody/x.py", "no such file"),
        ("/dev/null", "no such file"),
        ("json", "registers nothing"),
        ("no_such.module", "neither a file"),
        ("json.nothing", "No module named"),
        ("..", "neither a file"),
        ("", "neither a file"),
        (".", "neither a file"),
    ],
)
def test_what_is_no_plugin(argument, message):
    Path("folder").mkdir()
    Path("folder.py").mkdir()
    Path("binary.py").write_bytes(bytes(range(256)))
    _refused(argument, message)


def test_a_file_named_like_a_module_of_python_replaces_none():
    import json

    Path("json.py").write_text(GOOD.format(name="mine"))
    code, printed, _ = run_cleanly(["methods", "--plugin", "./json.py", "--format", "csv"])
    assert code == 0
    assert "mine" in printed
    assert sys.modules["json"] is json


def test_a_file_of_names_cannot_climb_out_of_the_folder():
    """Names that become file names: the new method, and nothing beside it."""
    before = sorted(Path("..").rglob("*"))
    for name in ("../../x", "/tmp/x", "a/b", "..", ".", "", "a\0b", "A", "-x", "x" * 300, "con\n", "é"):
        assert run_cleanly(["new", "--", name])[0] == 2
    assert sorted(Path("..").rglob("*")) == before
    assert run_cleanly(["new", "a-b"])[0] == 0
    assert [path.name for path in Path().iterdir()] == ["a_b.py"]
