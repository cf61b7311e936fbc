"""The catalogue of task files, against lm-eval's own index."""

from __future__ import annotations

import json

import pytest

from harness.errors import ConfigError
from harness.evaluate import catalog
from harness.evaluate.catalog import folder_catalog, lm_eval_catalog, lm_eval_folder
from harness.evaluate.yaml_files import FunctionRef, YamlReader, functions_in


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize("folder", ["blimp", "mmlu/default", "lambada", "squadv2", "arc", "glue"])
def test_names_kinds_files_and_members_are_lm_evals(folder):
    from lm_eval.tasks._index import TaskIndex

    place = lm_eval_folder() / folder
    theirs = TaskIndex.build([place])
    mine = folder_catalog(place, lenient=True)
    assert mine.keys() == theirs.keys()
    kinds = {"TASK": "task", "PY_TASK": "task", "GROUP": "group", "TAG": "tag"}
    for name, entry in mine.items():
        assert entry.kind == kinds[theirs[name].kind.name]
        assert entry.yaml_path == theirs[name].yaml_path
        if entry.kind == "tag":
            assert set(entry.members) == theirs[name].tags


def test_output_types_are_read_through_includes():
    blimp = folder_catalog(lm_eval_folder() / "blimp", lenient=True)
    assert blimp["blimp_adjunct_island"].output_type == "multiple_choice"
    assert blimp["blimp"].whole
    assert len(blimp["blimp"].members) == 67


def test_keys_of_the_file_win_over_included_ones(tmp_path):
    write(tmp_path / "base.yaml", "a: 1\nb: 1\nc: !function helper.f\n")
    write(tmp_path / "more.yaml", "include: base.yaml\nb: 2\nd: [!function other.g]\n")
    path = write(tmp_path / "task.yaml", "include: [more.yaml]\na: 3\n")
    read = YamlReader().read(path)
    assert read.content["a"] == 3
    assert read.content["b"] == 2
    assert [file.name for file in read.files] == ["task.yaml", "more.yaml", "base.yaml"]
    functions = functions_in(read.content)
    assert functions == [FunctionRef(tmp_path, "helper.f"), FunctionRef(tmp_path, "other.g")]
    assert functions[0].file == tmp_path / "helper.py"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task: [", "is not valid YAML"),
        ("- a\n- b\n", "must hold a mapping"),
        ("include: task.yaml\n", "includes itself"),
        ("include: absent.yaml\n", "cannot read the task file .*absent.yaml"),
        ("task: !!python/object:os.system x\n", "is not valid YAML"),
    ],
)
def test_a_broken_file_is_one_clear_line(tmp_path, text, message):
    write(tmp_path / "task.yaml", text)
    with pytest.raises(ConfigError, match=message) as caught:
        folder_catalog(tmp_path)
    assert "\n" not in str(caught.value)
    assert folder_catalog(tmp_path, lenient=True) == {}


def test_a_name_defined_twice_names_both_files(tmp_path):
    write(tmp_path / "one.yaml", "task: same\n")
    write(tmp_path / "two.yaml", "task: same\n")
    with pytest.raises(ConfigError, match=r"defined by both .*one\.yaml and .*two\.yaml"):
        folder_catalog(tmp_path)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ConfigError, match="absent does not exist"):
        folder_catalog(tmp_path / "absent")


def test_tags_gather_their_tasks_and_templates_are_no_tasks(tmp_path):
    write(tmp_path / "template.yaml", "dataset_path: json\noutput_type: multiple_choice\n")
    write(tmp_path / "a.yaml", "include: template.yaml\ntask: a\ntag: [mine]\n")
    write(tmp_path / "b.yaml", "include: template.yaml\ntask: b\ntag: mine\n")
    found = folder_catalog(tmp_path)
    assert set(found) == {"a", "b", "mine"}
    assert found["mine"].members == ("a", "b")


@pytest.mark.parametrize(
    ("rest", "whole", "members"),
    [
        ("task: [a, b]", False, ("a", "b")),
        ("task: [a]\ngroup_alias: G\nmetadata: {version: 1}", False, ("a",)),
        ("task: [a]\naggregate_metric_list: [{metric: acc}]", True, ("a",)),
        ("task: [a, {task: b, num_fewshot: 5}]", True, ("a", "b")),
        ("task: [{group: inner, task: [a, b]}, {dataset_path: x}]", True, ("a", "b")),
        ("task: [a]\nnum_fewshot: 5", True, ("a",)),
    ],
)
def test_a_group_is_whole_where_its_members_say_less(tmp_path, rest, whole, members):
    write(tmp_path / "g.yaml", f"group: g\n{rest}\n")
    entry = folder_catalog(tmp_path)["g"]
    assert (entry.whole, entry.members) == (whole, members)


@pytest.fixture
def small_lm_eval(tmp_path, monkeypatch):
    """A stand-in for lm-eval's folder, so that no 14,000 files are read."""
    folder = tmp_path / "lm_eval" / "tasks"
    write(folder / "x" / "x.yaml", "task: x\ndataset_path: org/x\ntag: letters\n")
    write(folder / "g.yaml", "group: g\ntask: [x]\naggregate_metric_list: [{metric: acc}]\n")
    write(folder / "broken.yaml", "task: [")
    monkeypatch.setattr(catalog, "lm_eval_folder", lambda: folder)
    return folder


def test_lm_evals_catalogue_is_kept_and_read_again(small_lm_eval, cache_dir, monkeypatch):
    first = lm_eval_catalog()
    assert set(first) == {"x", "g", "letters"}
    (stored,) = cache_dir.iterdir()
    assert "0.4" in stored.name

    def refuse(*_args, **_kwargs):
        raise AssertionError("the files were read again")

    monkeypatch.setattr(catalog, "folder_catalog", refuse)
    assert lm_eval_catalog() == first


@pytest.mark.parametrize("content", ["", "{", '{"format": 0}', '{"format": 1, "entries": [{}]}'])
def test_a_damaged_catalogue_is_made_again(small_lm_eval, cache_dir, content):
    first = lm_eval_catalog()
    (stored,) = cache_dir.iterdir()
    stored.write_text(content)
    assert lm_eval_catalog() == first
    assert json.loads(stored.read_text())["format"] == 1


def test_another_version_has_a_catalogue_of_its_own(small_lm_eval, cache_dir, monkeypatch):
    lm_eval_catalog()
    monkeypatch.setattr(catalog, "version", lambda _name: "9.9.9")
    lm_eval_catalog()
    assert len(list(cache_dir.iterdir())) == 2


def test_a_cache_that_cannot_be_written_costs_time_only(small_lm_eval, tmp_path, monkeypatch):
    monkeypatch.setenv("HARNESS_CACHE", str(write(tmp_path / "file", "") / "below"))
    assert "x" in lm_eval_catalog()
