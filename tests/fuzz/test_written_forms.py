"""The written forms of methods, models, lists and gates: total parsers, labels that parse to themselves."""

from __future__ import annotations

import json
from typing import Literal

import pytest
from hypothesis import strategies as st
from pydantic import Field

from harness.chain import Chain, Step, parse_chain, split_list
from harness.comparing import parse_gate
from harness.config import load_config
from harness.errors import ConfigError, HarnessError
from harness.method import COMMON_ALIASES, Method, Options
from harness.models.loading import describe, resolve_model
from harness.models.spec import PREFIXES, parse_model
from tests.fuzz.exploring import HOSTILE, examples, explore, hostile_text, refusal


class Every(Options):
    """One option of each kind that a method may have."""

    bits: Literal[2, 3, 4, 8] = 4
    group_size: int = 128
    damp: float = Field(0.01, ge=-1e300, le=1e300)
    sym: bool = False
    mode: Literal["none", "true", "4", "a:b", "x+y"] = "none"
    text: str = ""
    maybe: str | None = None
    layers: list[int] | None = None
    names: tuple[str, ...] = ()
    table: dict[str, float] = Field(default_factory=dict)


def _unchanged(model, options, context):
    return model


METHODS = {name: Method(name=name, options=Every, transform=_unchanged) for name in ("one", "two-2", "w4a8")}
plain_text = hostile_text().map(lambda text: text.encode("utf-8", "replace").decode())  # no lone surrogates
finite = st.floats(min_value=-1e300, max_value=1e300)
whole = st.integers(min_value=-(2**63) + 1, max_value=2**63 - 1)
options = st.builds(
    Every,
    bits=st.sampled_from([2, 3, 4, 8]),
    group_size=whole,
    damp=finite,
    sym=st.booleans(),
    mode=st.sampled_from(["none", "true", "4", "a:b", "x+y"]),
    text=plain_text,
    maybe=st.none() | plain_text,
    layers=st.none() | st.lists(whole, max_size=3),
    names=st.lists(plain_text, max_size=3).map(tuple),
    table=st.dictionaries(plain_text, finite, max_size=2),
)
chains = st.lists(
    st.builds(Step, st.sampled_from(list(METHODS.values())), options), min_size=1, max_size=3
).map(lambda steps: Chain(tuple(steps)))


def _raises_only(error, function):
    return lambda value: refusal(function, value, error)


@examples
def test_a_label_parses_to_the_same_chain(count):
    def holds(chain):
        again = parse_chain(chain.label, METHODS)
        assert again == chain
        assert again.label == chain.label
        # In a list of methods, too.
        assert split_list(f"{chain.label},two-2") == [chain.label, "two-2"]

    explore(chains, holds, count)


@examples
def test_options_round_trip_through_json(count):
    def holds(value):
        assert Every.parse(json.loads(json.dumps(value.canonical(), allow_nan=False))) == value

    explore(options, holds, count)


def test_every_alias_is_stored_under_the_canonical_name():
    for alias, name in COMMON_ALIASES.items():
        if name in Every.model_fields:
            value = {"bits": 3, "group_size": 7, "damp": 0.5, "sym": True}[name]
            assert Every.parse({alias: value}) == Every(**{name: value})


@examples
def test_any_text_is_a_chain_or_one_clear_error(count):
    soup = st.lists(
        st.sampled_from(
            ["one", "two-2", "bits", "text", "=", ":", "+", ",", '"', "[", "]", "3", "x", " ", "\\"]
        ),
        max_size=12,
    ).map("".join)
    parse = _raises_only(ConfigError, lambda text: parse_chain(text, METHODS))
    explore(hostile_text() | soup, parse, count)


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_models_are_described_or_refused(text):
    def holds(text):
        assert describe(resolve_model(text, {})).spec.source in ("zoo", "shape", "scratch")

    refusal(holds, text, HarnessError)


@examples
def test_any_text_is_a_model_or_one_clear_error(count):
    def holds(text):
        spec = parse_model(text)
        assert spec.label == text.strip()
        if spec.source == "hub":
            assert ".." not in spec.name + (spec.revision or "")
            assert spec.name.count("/") == 1
            assert not set(spec.name) & set("\\:~\0 ")
        if spec.source in PREFIXES:
            assert text.strip().startswith(spec.source)

    parts = [
        "zoo:",
        "shape:",
        "package:",
        "org",
        "/",
        "..",
        ".",
        "~",
        "@",
        "main",
        "+outliers",
        ":k=2",
        "\\",
        "C:",
        "-",
    ]
    soup = st.lists(st.sampled_from(parts), max_size=7).map("".join)
    explore(hostile_text() | soup, _raises_only(ConfigError, holds), count)


@examples
def test_gates_and_lists(count):
    explore(hostile_text(), _raises_only(ConfigError, parse_gate), count)
    names = (
        "methods",
        "models",
        "tasks",
        "batch_sizes",
        "prompt_lens",
        "seeds",
        "new_tokens",
        "limit",
        "timeout_s",
    )
    given = st.dictionaries(st.sampled_from(names), hostile_text(), max_size=3)
    explore(given, _raises_only(ConfigError, lambda values: load_config(None, values)), count)


@examples
def test_splitting_loses_nothing_but_blanks(count):
    plain = st.text(alphabet="ab:=1", min_size=1, max_size=5)

    def holds(parts):
        assert split_list(",".join(parts)) == parts

    explore(st.lists(plain, max_size=5), holds, count)
