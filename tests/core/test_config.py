"""The sweep's configuration from YAML and the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.config import load_config
from harness.errors import ConfigError


def _yaml(tmp_path, text):
    file = tmp_path / "sweep.yaml"
    file.write_text(text)
    return file


def test_yaml_and_command_line_join_and_the_command_line_wins(tmp_path):
    file = _yaml(
        tmp_path,
        "methods: [gptq, 'rtn:bits=3']\nbatch-sizes: [1, 8]\nseed: 3\nlimit: 5\n",
    )
    config = load_config(file, {"limit": 7})
    assert config.methods == ("gptq", "rtn:bits=3")
    assert config.batch_sizes == (1, 8)
    assert config.seeds == (3,)
    assert config.limit == 7


def test_lists_are_written_with_commas():
    config = load_config(None, {"methods": "gptq,rtn", "batch_sizes": "1,8", "seeds": "0,1"})
    assert config.methods == ("gptq", "rtn")
    assert config.batch_sizes == (1, 8)
    assert config.seeds == (0, 1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"limit": 0}, "--limit"),
        ({"batch_sizes": "1,x"}, "whole numbers"),
        ({"batch_sizes": "0"}, "--batch-sizes"),
        ({"dtype": "int8"}, "--dtype"),
        ({"timeout_s": -1}, "--timeout"),
        ({"memory_limit_gib": 1e12}, "--memory-limit"),
        ({"executor": "slurm"}, "--executor"),
    ],
)
def test_a_value_out_of_range_names_the_option(given, message):
    with pytest.raises(ConfigError) as caught:
        load_config(None, given)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("methods: [a\n", "is not YAML (line"),
        ("- a\n- b\n", "must hold a mapping"),
        ("metods: [a]\n", "did you mean 'methods'"),
    ],
)
def test_bad_yaml_is_one_clear_error(tmp_path, text, message):
    with pytest.raises(ConfigError) as caught:
        load_config(_yaml(tmp_path, text), {})
    assert message in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(tmp_path / "none.yaml", {})


def test_none_is_written_in_a_file_as_on_the_command_line(tmp_path):
    file = tmp_path / "sweep.yaml"
    file.write_text("tasks: none\nprompt-lens: none\n")
    config = load_config(file, {})
    assert (config.tasks, config.prompt_lens) == ((), ())
    assert load_config(file, {"tasks": "kjv"}).tasks == ("kjv",)
    assert load_config(None, {"tasks": ""}).tasks == ()


def test_one_folder_of_a_file_needs_no_list(tmp_path):
    (tmp_path / "s.yaml").write_text("include_path: ./my, tasks\nplugin: mine.py\n")
    config = load_config(tmp_path / "s.yaml", {})
    assert (config.include_path, config.plugin) == ((Path("my, tasks"),), ("mine.py",))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("methods: {rtn: 4}", "--methods: must be a list"),
        ("batch_sizes: 1.5", "--batch-sizes: must be a list"),
        ("include_path: 3", "--include-path: must be a list"),
        ("text: 3", "--text: must be a path"),
    ],
)
def test_a_wrong_kind_of_value_is_said_in_words_of_the_file(tmp_path, text, message):
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "s.yaml", {})
    assert str(caught.value) == message
