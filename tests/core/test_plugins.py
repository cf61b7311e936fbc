"""Finding and loading plugins; containing broken ones."""

from __future__ import annotations

import re
import sys
import textwrap

import pytest

from harness.errors import PluginError, UnknownName
from harness.plugins import load_plugins

GOOD = """
    from harness import Method, Options, hookimpl

    def transform(model, options, context):
        return model

    @hookimpl
    def register_methods():
        return [Method(name={name!r}, options=Options, transform=transform)]
"""


def _write(folder, file, text):
    path = folder / file
    path.write_text(textwrap.dedent(text))
    return str(path)


def test_bundled_methods_are_found_by_scanning():
    loaded = load_plugins()
    expected = {
        "baseline", "rtn", "gptq", "smoothquant", "magnitude-prune", "distilbert", "block-local",
        "mqa",
    }  # fmt: skip
    assert expected <= set(loaded.methods)
    assert not loaded.broken


def test_a_file_and_a_module_can_be_named(tmp_path, monkeypatch):
    file = _write(tmp_path, "one.py", GOOD.format(name="from-file"))
    _write(tmp_path, "two_module.py", GOOD.format(name="from-module"))
    monkeypatch.syspath_prepend(str(tmp_path))
    loaded = load_plugins([file, "two_module"])
    assert {"from-file", "from-module"} <= set(loaded.methods)
    assert [report.origin for report in loaded.reports[-2:]] == ["--plugin", "--plugin"]


@pytest.mark.parametrize("text", ["missing.py", "./no/such.py", "no_such_module_anywhere"])
def test_a_plugin_that_does_not_exist_is_an_error(text):
    with pytest.raises(PluginError, match="--plugin"):
        load_plugins([text])


@pytest.mark.parametrize(
    "entry",
    ["'a:b', 'zoo:opt-4m'", "'zoo:opt-4m', 'zoo:llama-6m'", "'org/name', 'zoo:opt-4m'", "'', 'zoo:opt-4m'",
     "'x+outliers', 'zoo:opt-4m'", "3, 'zoo:opt-4m'", "'x', 3"],
)  # fmt: skip
def test_a_model_that_could_not_be_named_is_refused(tmp_path, entry):
    text = f"""
        from harness import ModelEntry, hookimpl

        @hookimpl
        def register_models():
            return [ModelEntry({entry})]
    """
    with pytest.raises(PluginError, match=r"register_models: .* a name is letters"):
        load_plugins([_write(tmp_path, "named.py", text)])


@pytest.mark.parametrize(
    "entry_points", [b"[harness.plugins]\nno value\n", b"[harness.plugins]\nb\xff = broken\n"]
)
@pytest.mark.parametrize("metadata", ["Metadata-Version: 2.1\nName: broken-thing\nVersion: 1\n", None])
def test_a_distribution_whose_entry_points_cannot_be_read_is_contained(
    tmp_path, monkeypatch, entry_points, metadata
):
    for name in ("broken_thing", "good_thing"):
        (tmp_path / f"{name}-1.dist-info").mkdir()
    (tmp_path / "broken_thing-1.dist-info" / "entry_points.txt").write_bytes(entry_points)
    if metadata is not None:
        (tmp_path / "broken_thing-1.dist-info" / "METADATA").write_text(metadata)
    _write(tmp_path, "good_thing.py", GOOD.format(name="from-a-good-one"))
    good = tmp_path / "good_thing-1.dist-info"
    (good / "METADATA").write_text("Metadata-Version: 2.1\nName: good-thing\nVersion: 1\n")
    (good / "entry_points.txt").write_text("[harness.plugins]\ngood = good_thing\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    loaded = load_plugins()
    assert {"gptq", "from-a-good-one"} <= set(loaded.methods)
    (report,) = loaded.broken
    assert (report.name, report.origin) == ("broken-thing" if metadata else "?", "entry point")
    assert report.error.startswith("its entry_points.txt cannot be read: ")
    with pytest.raises(PluginError, match="cannot be read"):
        load_plugins(strict=True)


def test_damaged_entry_points_of_other_programs_are_not_reported(tmp_path, monkeypatch):
    (tmp_path / "other-1.dist-info").mkdir()
    (tmp_path / "other-1.dist-info" / "entry_points.txt").write_text("[console_scripts]\nno value\n")
    (tmp_path / "other-1.dist-info" / "METADATA").write_text("Name: other\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not load_plugins().broken


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("import nothing_like_this", "ModuleNotFoundError"),
        ("1 +", "SyntaxError"),
        ("raise SystemError('boom')", "SystemError: boom"),
        (GOOD.format(name="gptq"), "'gptq' is registered by both"),
        (
            "from harness import hookimpl\n@hookimpl\ndef register_methods():\n    return [1]\n",
            "must return a list of Method",
        ),
        (
            "from harness import hookimpl\n@hookimpl\ndef register_nothing():\n    return []\n",
            "is no hook of the harness",
        ),
    ],
)
def test_a_broken_entry_point_is_contained(tmp_path, monkeypatch, text, reason):
    _write(tmp_path, "broken_thing.py", text)
    info = tmp_path / "broken_thing-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-thing\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[harness.plugins]\nbroken = broken_thing\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "broken_thing", raising=False)
    loaded = load_plugins()
    (report,) = loaded.broken
    assert reason in report.error
    assert report.location == "broken-thing: broken_thing"
    assert "gptq" in loaded.methods  # the rest is there
    with pytest.raises(PluginError, match="broken"):
        load_plugins(strict=True)
    monkeypatch.delitem(sys.modules, "broken_thing", raising=False)


def test_an_unknown_method_has_near_matches():
    with pytest.raises(UnknownName, match="did you mean 'gptq'"):
        load_plugins().method("gtpq")


def test_the_manager_is_no_singleton():
    assert load_plugins().manager is not load_plugins().manager


@pytest.mark.parametrize(
    ("kind", "count", "advice"),
    [
        ("method", 2, "known: m0, m1"),
        ("method", 21, r"21 are known \(list them: harness methods\)"),
        ("task", 21, r"21 are known \(list them: harness tasks --all\)"),
        ("shape", 21, "21 are known"),
    ],
)
def test_a_name_like_no_other_says_where_the_names_are(kind, count, advice):
    error = UnknownName(kind, "zzz", [f"m{number}" for number in range(count)])
    assert re.fullmatch(f"unknown {kind} 'zzz'; {advice}", str(error))


# --- what is wrong with a plugin ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "from harness import hookimpl\n@hookimpl\ndef variant_started(label, wrong):\n    pass\n",
            "Argument(s) {'wrong'} are declared in the hookimpl",
        ),
        (GOOD.format(name="call").replace("options=Options", "options=Options.parse({'x': 1})"), "unknown"),
    ],
)
def test_an_error_of_several_lines_is_told_to_its_end(tmp_path, text, reason):
    with pytest.raises(PluginError, match=re.escape(reason)) as caught:
        load_plugins([_write(tmp_path, "lines.py", text)])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("field", ["knob: Callable = print", "knob: Any = object()"])
def test_options_that_cannot_be_stored_are_refused_when_the_plugin_is_loaded(tmp_path, field):
    text = GOOD.format(name="odd").replace("options=Options", "options=Odd")
    text = textwrap.dedent(text).replace(
        "def transform", f"class Odd(Options):\n    {field}\n\ndef transform", 1
    )
    file = _write(tmp_path, "odd.py", f"from typing import Any, Callable\n{text}")
    with pytest.raises(PluginError, match="method 'odd': its options are no JSON: "):
        load_plugins([file])


def test_two_files_of_one_name_are_two_plugins_and_one_file_written_twice_is_one(tmp_path, monkeypatch):
    (tmp_path / "other").mkdir()
    _write(tmp_path, "same.py", GOOD.format(name="first"))
    _write(tmp_path / "other", "same.py", GOOD.format(name="second"))
    monkeypatch.chdir(tmp_path)
    loaded = load_plugins(["same.py", "other/same.py", "./same.py"])
    assert {"first", "second"} <= set(loaded.methods)
    assert [report.location for report in loaded.reports[-2:]] == ["same.py", "other/same.py"]


def test_a_plugin_that_is_loaded_already_is_one_short_error():
    with pytest.raises(
        PluginError, match=r"gptq\): it is loaded already, as bundled harness_plugins\S+gptq$"
    ):
        load_plugins(["harness_plugins.quantization.gptq"])
