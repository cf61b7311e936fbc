"""Parsing of methods and chains."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Literal

import pytest
from pydantic import Field

from harness.chain import parse_chain, split_list
from harness.errors import ConfigError, PluginError, UnknownName
from harness.method import Method, Options


class _Options(Options):
    bits: Literal[2, 3, 4, 8] = 4
    group_size: int = Field(128, ge=-1)
    sym: bool = False
    layers: list[int] | None = None
    alpha: float = Field(0.5, ge=0, le=1)


class _Repaired(Options):
    repair: Literal["fit", "none"] = "fit"
    most: int | None = 3


def _identity(model, options, context):
    return model


METHODS = {name: Method(name=name, options=_Options, transform=_identity) for name in ("gptq", "smooth")}


def test_a_name_alone_has_the_defaults():
    chain = parse_chain("gptq", METHODS)
    assert chain.label == "gptq"
    assert chain.described() == [
        {
            "name": "gptq",
            "options": {"bits": 4, "group_size": 128, "sym": False, "layers": None, "alpha": 0.5},
        }
    ]


def test_none_is_a_choice_where_it_is_one_and_no_value_elsewhere():
    methods = {"prune": Method(name="prune", options=_Repaired, transform=_identity)}
    chain = parse_chain("prune:repair=none:most=none", methods)
    assert chain.steps[0].options == _Repaired(repair="none", most=None)
    assert parse_chain(chain.label, methods) == chain


@pytest.mark.parametrize(
    "text",
    [
        "gptq:bits=3",
        "gptq:bits=3:sym=true",
        "smooth:alpha=0.25+gptq:group_size=-1",
        "gptq:layers=[0,2,5]",
    ],
)
def test_the_label_parses_to_the_same_chain(text):
    chain = parse_chain(text, METHODS)
    assert chain.label == text
    assert parse_chain(chain.label, METHODS).described() == chain.described()


def test_aliases_are_stored_under_the_canonical_name():
    chain = parse_chain("gptq:w_bits=3:group=64", METHODS)
    assert chain.label == "gptq:bits=3:group_size=64"


def test_a_default_written_out_is_the_same_chain():
    assert parse_chain("gptq:bits=4", METHODS).label == "gptq"


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("gptqq", UnknownName, "did you mean 'gptq'"),
        ("gptq:bitz=3", ConfigError, "unknown option 'bitz'; did you mean 'bits'"),
        ("gptq:bits=5", ConfigError, "bits: Input should be 2, 3, 4 or 8, not 5"),
        ("gptq:alpha=2", ConfigError, "alpha: Input should be less than or equal to 1"),
        ("gptq:bits", ConfigError, "write options as name=value"),
        ("gptq:bits=3:bits=4", ConfigError, "given twice"),
        ("gptq:bits=3:w_bits=4", ConfigError, "given twice"),
        ("gptq+", ConfigError, "a name is missing beside the plus sign"),
        ("", ConfigError, "a method is empty"),
        ("gptq:layers=[0,", ConfigError, "is no JSON"),
    ],
)
def test_bad_text_is_one_clear_error(text, error, message):
    with pytest.raises(error) as caught:
        parse_chain(text, METHODS)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_lists_split_outside_brackets_only():
    assert split_list("a:x=[1,2], b ,,c") == ["a:x=[1,2]", "b", "c"]


def test_options_round_trip_through_json():
    options = _Options(bits=3, layers=[1])
    assert _Options.parse(json.loads(json.dumps(options.canonical()))) == options


@pytest.mark.parametrize("name", ["My-Method", "a b", "a+b", "a:b", ""])
def test_a_bad_method_name_is_refused(name):
    with pytest.raises(PluginError, match="lower-case words"):
        Method(name=name, options=_Options, transform=_identity)


def test_an_unknown_need_and_family_are_refused():
    with pytest.raises(PluginError, match="unknown needs"):
        Method(name="m", options=_Options, transform=_identity, needs=["gpu"])
    with pytest.raises(PluginError, match="unknown family"):
        Method(name="m", options=_Options, transform=_identity, family="magic")


def test_a_set_is_written_in_one_order_in_every_process():
    program = (
        "from harness import Options\n"
        "class Sets(Options):\n"
        "    names: frozenset[str] = frozenset()\n"
        "    groups: tuple[frozenset[str], ...] = ()\n"
        "    by_name: dict[str, frozenset[str]] = {}\n"
        "words = ['q', 'k', 'v', 'o', 'up', 'down']\n"
        "print(Sets(names=words, groups=[words], by_name={'all': words}).canonical())\n"
    )
    told = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True, text=True, check=True,
        ).stdout
        for seed in "12"
    }  # fmt: skip
    assert len(told) == 1
    assert told.pop().count("['down', 'k', 'o', 'q', 'up', 'v']") == 3


def test_a_set_equal_to_the_default_is_no_option_of_a_label():
    class Sets(Options):
        names: frozenset[str] = frozenset({"q", "k", "v", "o"})

    assert Sets(names=frozenset({"o", "v", "k", "q"})).non_default() == {}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("smooth", [True]),
        ("smooth+gptq", [False, True]),
        ("smooth+baseline", [True, True]),
        ("baseline+smooth+baseline+baseline", [False, True, True, True]),
        ("smooth+baseline+gptq", [False, False, True]),
    ],
)
def test_a_step_that_only_the_baseline_follows_is_told_that_it_is_the_last(text, told, monkeypatch):
    """Else smoothquant+baseline would smooth, leave the rounding to the baseline, and be stored unrounded."""
    from torch import nn

    from harness import transforming

    def context(*arguments):
        return SimpleNamespace(last_in_chain=arguments[-1])

    monkeypatch.setattr(transforming, "_context", context)
    contexts = []
    methods = {
        **METHODS,
        "baseline": Method(name="baseline", options=_Options, transform=_identity, family="baseline"),
    }
    job, loaded = SimpleNamespace(seed=0), SimpleNamespace(model=nn.Linear(1, 1))
    transforming._apply(parse_chain(text, methods), job, None, loaded, None, None, contexts, print)
    assert [each.last_in_chain for each in contexts] == told
