"""`--config`: any file at all is a configuration or one clear error, in bounded time and memory."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import strategies as st

from harness.config import SweepConfig, load_config
from harness.errors import ConfigError
from tests.fuzz.exploring import examples, explore, hostile_text, refusal

FILE = Path("sweep.yaml")
NAMES = (*SweepConfig.model_fields, "batch-sizes", "seed", "timeout", "metods", "")


def _load(content):
    FILE.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    refusal(lambda file: load_config(file, {}), FILE, ConfigError)


def _refused(content, message):
    FILE.write_bytes(content if isinstance(content, bytes) else content.encode())
    start = time.monotonic()
    with pytest.raises(ConfigError, match=message):
        load_config(FILE, {})
    assert time.monotonic() - start < 5


@examples
def test_any_bytes(count):
    explore(st.binary(max_size=60) | hostile_text(), _load, count)


@examples
def test_any_yaml(count):
    leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10) | st.dates()
    values = st.recursive(
        leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(leaves, inner, max_size=2)
    )
    files = st.dictionaries(st.sampled_from(NAMES), values, max_size=3)

    def holds(content):
        _load(yaml.safe_dump(content, allow_unicode=True))

    explore(files, holds, count)


@examples
def test_any_yaml_syntax(count):
    tokens = [
        "methods", "limit", ": ", "- ", "\n", "  ", "&a ", "*a", "<<: ", "!!int ", "!!float ", "!!bool ",
        "!!timestamp ", "!!binary ", "!!set ", "!!omap ", "!!pairs ", "!x ", '"', "'", "[", "]", "{", "}",
        ", ", "? ", "| ", "> ", "---", "%", "#", "1", "2024-13-45", "0o9", "1:99", ".nan", "~", "\t", "=",
    ]  # fmt: skip
    explore(st.lists(st.sampled_from(tokens), max_size=14).map("".join), _load, count)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("methods: !!python/object/apply:os.mkdir [pwned]", "not YAML"),
        ("methods: !!python/name:os.system ''", "not YAML"),
        ("methods: gptq\nmethods: rtn", "'methods' is given twice"),
        ("batch-sizes: 1\nbatch_sizes: 2", "twice"),
        ("seed: 1\nseeds: 2", "twice"),
        ("limit: true", "--limit: cannot be true or false"),
        ("batch_sizes: [1, true]", "--batch-sizes: cannot be true or false"),
        ("limit: .inf", "--limit"),
        ("timeout: .nan", "--timeout"),
        ("timeout: 1.0e+300", "--timeout"),
        ("jobs: 1000000", "--jobs"),
        ("seed: -1", "--seed"),
        ("seed: []", "--seed"),
        ("new_tokens: 99999999999999999999", "--new-tokens"),
        ("models: ''", "--models: names no model"),
        ("methods: {a: b}", "--methods"),
        ("methods: &a [*a]", "--methods"),
        ("limit: !!int ''", "not what it says to be"),
        ("limit: !!bool x", "not what it says to be"),
        ("limit: !!timestamp x", "not what it says to be"),
        ("limit: 2024-13-45", "not what it says to be"),
        ("limit: " + "9" * 5000, "not what it says to be"),
        ("a: " + "[" * 3000, "nested too deeply|not YAML"),
        ("? [a]\n: b", "not YAML"),
        ("x" * 1_000_001, "larger than"),
        (b"\xff\xfe\x00\x01", "no text in UTF-8"),
        (b"\0", "not YAML"),
    ],
)
def test_what_a_configuration_must_not_hold(text, message):
    _refused(text, message)
    assert not Path("pwned").exists()


def test_a_bomb_does_not_go_off():
    levels = [f"x{n}: &x{n} [" + ", ".join([f"*x{n - 1}"] * 9) + "]" for n in range(1, 30)]
    _refused("\n".join(["x0: &x0 [lol]", *levels]), "aliases|did you mean|unknown option")
    _refused("methods: [" + "&a 1, " + "*a, " * 200 + "]", "aliases")


@pytest.mark.parametrize("name", ["gone.yaml", "x" * 5000, "a\0b", "folder", "~nobody/x.yaml", "", "."])
def test_a_file_that_cannot_be_read(name):
    Path("folder").mkdir()
    with pytest.raises(ConfigError, match="configuration file"):
        load_config(Path(name), {})


def test_an_endless_file_ends():
    if os.path.exists("/dev/zero"):
        with pytest.raises(ConfigError, match="larger than"):
            load_config(Path("/dev/zero"), {})
