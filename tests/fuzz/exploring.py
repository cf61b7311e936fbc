"""Properties over hostile values: a few by default, the same ones over many with ``-m slow``."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from typing import TypeVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness.cli.app import run

__all__ = ["HOSTILE", "examples", "explore", "hostile_text", "refusal", "run_cleanly"]

SOUP = ":=+,@[]{}()\"'\\.~*?%#&!-_<>| \n\t\0éa1"
HOSTILE = (
    "", " ", "\x00", "a\x00b", "\ud800", "\u202e", "\x1b[31m", "é" * 100, "\n", "a\nb", "-", "--",
    "--x", "0", "-1", "1e999", "nan", "inf", "-inf", "9" * 400, "9" * 5000, "true", "null", "none",
    "[]", "{}", "[" * 3000, "x" * 10_000, "gptq:", ":bits=3", "gptq:bits=", "gptq:=3", "gptq:bits==3",
    "gptq+", "+gptq", "gptq++rtn", "gptq:bits=[3", 'gptq:bits="', "zoo:../../x", "zoo:..", "zoo:/etc",
    "package:..", "package:.", "package:sys", "package:a.b", "shape:a/b", "scratch:..", "org/name@",
    "org/name@../../x", "org/..", "../x", "a/b/c", "./dir", "~nobody/x", "C:\\x", "org/name.git",
    "a--b/c", "zoo:llama-6m+outliers:k=nan", "zoo:llama-6m+outliers:k=-1",
    "zoo:llama-6m+outliers:k=1e400", "zoo:llama-6m+outliers:sites=x", "zoo:llama-6m+outliers:seed=-1",
    "zoo:llama-6m+", "*", "?", "kjv,kjv", "x.yaml",
)  # fmt: skip

examples = pytest.mark.parametrize("count", [20, pytest.param(200, marks=pytest.mark.slow)])
"""A test over `count` values."""


def hostile_text() -> st.SearchStrategy[str]:
    """Texts that somebody might type, paste or attack with."""
    return st.one_of(
        st.sampled_from(HOSTILE),
        st.text(max_size=30),
        st.text(alphabet=st.characters(), max_size=30),  # lone surrogates too
        st.text(alphabet=SOUP, max_size=40),
        st.integers().map(str),
        st.floats().map(str),
        st.lists(st.sampled_from(HOSTILE), max_size=3).map(",".join),
    )


T = TypeVar("T")


def explore(strategy: st.SearchStrategy[T], holds: Callable[[T], object], count: int) -> None:
    """Check a property; the quick run is always the same, the long one looks further each time."""

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=count < 100,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def check(value: T) -> None:
        holds(value)

    check()


def refusal(function: Callable[[T], object], value: T, error: type[Exception]) -> str | None:
    """What a function says, in one clear line, of a value that it refuses; None where it takes it."""
    try:
        function(value)
    except error as caught:
        said = str(caught)
    else:
        return None
    assert said.strip()
    assert "\n" not in said
    return said


def run_cleanly(arguments: list[str]) -> tuple[int, str, str]:
    """Run the command line as a terminal would: a documented exit code, and one line for bad input."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    before = sys.getrecursionlimit()
    with redirect_stdout(out), redirect_stderr(err):
        code = run(arguments)
    assert sys.getrecursionlimit() == before
    printed, said = (stream.buffer.getvalue().decode() for stream in (out, err))
    assert code in (0, 1, 2, 3, 130), (code, said)
    assert "Traceback" not in printed + said
    if code == 2:
        errors = [line for line in said.splitlines() if not line.startswith(("see: ", "warning: "))]
        assert len(errors) == 1, errors
        assert errors[0].startswith("error: "), errors
        assert len(errors[0]) > len("error: ")
        assert len(errors[0]) < 2000
        assert not any(character < " " and character != "\n" for character in said), repr(said)
    return code, printed, said
