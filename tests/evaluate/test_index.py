"""Resolving names to tasks: without lm-eval, with near matches, and with an honest content hash."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import time

import pytest

from harness.errors import ConfigError, HarnessError, UnknownName
from harness.evaluate import index
from harness.evaluate.catalog import Entry, lm_eval_folder
from harness.evaluate.index import BUNDLED_DIR, list_tasks, resolve_tasks

TASK = """\
task: mine
dataset_path: json
dataset_kwargs:
  data_files: {data}
output_type: multiple_choice
test_split: train
doc_to_text: "{{{{q}}}}"
doc_to_choice: "{{{{c}}}}"
doc_to_target: 0
metadata: {{version: 1.0, summary: a task of my own}}
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data.jsonl").write_text('{"q": "one", "c": ["a", "b"]}\n')
    (tmp_path / "mine.yaml").write_text(TASK.format(data=tmp_path / "data.jsonl"))
    return tmp_path


@pytest.fixture
def no_lm_eval(monkeypatch):
    """lm-eval's own catalogue must not be needed."""

    def refuse():
        raise AssertionError("lm-eval's catalogue was read")

    monkeypatch.setattr(index, "lm_eval_catalog", refuse)


@pytest.fixture
def few_of_lm_eval(monkeypatch):
    """A few names of lm-eval's, with their real files."""
    place = lm_eval_folder()
    blimp = ("blimp_adjunct_island", "blimp_passive_1")
    entries = [
        Entry("hellaswag", "task", place / "hellaswag/hellaswag.yaml", "multiple_choice"),
        *(Entry(name, "task", place / f"blimp/{name[6:]}.yaml", "multiple_choice") for name in blimp),
        Entry("blimp", "group", place / "blimp/_blimp.yaml", members=blimp, whole=True),
        Entry("loose", "group", place / "blimp/_blimp.yaml", members=("blimp", "hellaswag")),
        Entry("tagged", "tag", members=("hellaswag", *blimp)),
    ]
    monkeypatch.setattr(index, "lm_eval_catalog", lambda: {entry.name: entry for entry in entries})


def test_bundled_tasks_need_neither_lm_eval_nor_torch(tmp_path):
    code = (
        "import sys, json\n"
        "from harness.evaluate.index import resolve_tasks, list_tasks\n"
        "tasks = resolve_tasks(['kjv', 'grammar']); list_tasks()\n"
        "heavy = [m for m in ('torch', 'lm_eval', 'datasets', 'transformers') if m in sys.modules]\n"
        "print(json.dumps([[t.output_type for t in tasks], heavy]))"
    )
    start = time.monotonic()
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    types, heavy = json.loads(output.stdout)
    assert types == ["loglikelihood_rolling", "multiple_choice"]
    assert heavy == []
    assert time.monotonic() - start < 5


def test_bundled_tasks(no_lm_eval):
    kjv, grammar = resolve_tasks(["kjv", "grammar", "kjv"])
    assert (kjv.name, kjv.origin, kjv.kind, kjv.yaml_path) == (
        "kjv",
        "bundled",
        "task",
        BUNDLED_DIR / "kjv.yaml",
    )
    assert len({kjv.revision, grammar.revision}) == 2
    assert all(len(task.revision) == 64 for task in (kjv, grammar))
    assert pickle.loads(pickle.dumps(kjv)) == kjv


def test_listing(folder, no_lm_eval):
    rows = {row.name: row for row in list_tasks([folder])}
    assert set(rows) == {"kjv", "grammar", "kjv_books", "sst2_probe", "stsb_cosine", "mine"}
    assert rows["mine"].origin == "include"
    assert rows["mine"].summary == "a task of my own"
    assert all(row.summary for row in rows.values())


def test_listing_all(few_of_lm_eval):
    rows = {row.name: row for row in list_tasks(all=True)}
    assert {"kjv", "hellaswag", "blimp"} <= set(rows)
    assert rows["hellaswag"].origin == "lm-eval"
    assert "tagged" not in rows


def test_an_unknown_name_lists_near_ones(few_of_lm_eval):
    with pytest.raises(UnknownName, match="unknown task 'helaswag'; did you mean 'hellaswag'") as caught:
        resolve_tasks(["helaswag"])
    assert "\n" not in str(caught.value)
    with pytest.raises(UnknownName, match="did you mean 'kjv'"):
        resolve_tasks(["kjvv"])


def test_included_folders_and_paths_of_files(folder, no_lm_eval):
    by_name = resolve_tasks(["mine"], [folder])
    assert by_name[0].origin == "include"
    assert by_name == resolve_tasks([str(folder / "mine.yaml")])
    # The bundled folder comes again as a plugin's: that is no duplicate.
    assert resolve_tasks(["kjv"], [BUNDLED_DIR, folder, folder])[0].origin == "bundled"


def test_a_duplicate_name_names_both(folder, tmp_path, no_lm_eval):
    (folder / "mine.yaml").write_text("task: kjv\n")
    with pytest.raises(ConfigError, match=r"'kjv' is defined by both .*tasks/kjv\.yaml and .*mine\.yaml"):
        resolve_tasks(["kjv"], [folder])


def test_two_files_of_one_name_are_not_one_task(folder, tmp_path_factory, no_lm_eval):
    other = tmp_path_factory.mktemp("other") / "other.yaml"
    other.write_text((folder / "mine.yaml").read_text() + "num_fewshot: 1\n")
    mine = str(folder / "mine.yaml")
    assert len(resolve_tasks([mine, "mine", mine], [folder])) == 1
    for names in ([mine, str(other)], ["mine", str(other)]):
        with pytest.raises(ConfigError, match=r"'mine' is defined by both .*mine\.yaml and .*other\.yaml"):
            resolve_tasks(names, [folder])


def test_groups_and_tags(few_of_lm_eval):
    (group,) = resolve_tasks(["blimp"])
    assert (group.kind, group.origin, group.output_type) == ("group", "lm-eval", "multiple_choice")
    assert group.include_dirs == (lm_eval_folder() / "blimp",)
    members = resolve_tasks(["tagged"])
    assert [task.name for task in members] == ["hellaswag", "blimp_adjunct_island", "blimp_passive_1"]
    # A group that lm-eval does not aggregate stands for its members; blimp among them is one task.
    assert [task.name for task in resolve_tasks(["loose"])] == ["blimp", "hellaswag"]


def test_patterns(few_of_lm_eval):
    assert [task.name for task in resolve_tasks(["blimp_*"])] == ["blimp_adjunct_island", "blimp_passive_1"]
    with pytest.raises(UnknownName, match="no name matches"):
        resolve_tasks(["zzz*"])


def revision(folder):
    return resolve_tasks(["mine"], [folder])[0].revision


def test_the_revision_names_yaml_includes_python_and_data(folder, no_lm_eval):
    seen = [revision(folder)]
    assert revision(folder) == seen[0]

    def changed():
        seen.append(revision(folder))
        return seen[-1] not in seen[:-1]

    text = (folder / "mine.yaml").read_text()
    (folder / "base").write_text("num_fewshot: 1\n")
    (folder / "mine.yaml").write_text("include: base\nprocess_docs: !function helper.f\n" + text)
    assert changed()
    (folder / "base").write_text("num_fewshot: 2\n")
    assert changed()
    (folder / "helper.py").write_text("def f(x): return x\n")
    assert changed()
    (folder / "helper.py").write_text("def f(x): return x + x\n")
    assert changed()
    (folder / "data.jsonl").write_text('{"q": "two", "c": ["a", "b"]}\n')
    assert changed()
    (folder / "notes.txt").write_text("nothing to do with it")
    assert not changed()


def test_the_revision_of_a_group_names_the_data_of_tasks_defined_in_place(folder, no_lm_eval, monkeypatch):
    monkeypatch.setattr(index, "lm_eval_catalog", dict)
    group = {
        "group": "g",
        "task": [
            {
                "task": "here",
                "dataset_path": "json",
                "dataset_kwargs": {"data_files": {"test": "here.jsonl"}},
            },
            {"group": "inner", "task": [{"task": "own", "custom_dataset": "FUNCTION"}]},
        ],
        "aggregate_metric_list": [{"metric": "acc"}],
    }
    monkeypatch.chdir(folder)
    (folder / "here.jsonl").write_text("{}\n")
    (folder / "g.yaml").write_text(json.dumps(group).replace('"FUNCTION"', "!function helper.load"))
    (folder / "helper.py").write_text(
        "import pathlib\ndef data_revision(): return pathlib.Path('version').read_text()\n"
    )
    (folder / "version").write_text("1")
    seen = [resolve_tasks(["g"], [folder])[0].revision]
    for file in ("here.jsonl", "version"):
        (folder / file).write_text('{"q": 2}\n')
        seen.append(resolve_tasks(["g"], [folder])[0].revision)
    assert len(set(seen)) == 3


def test_the_revision_is_the_same_on_another_machine(folder, tmp_path_factory, no_lm_eval):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for name in ("mine.yaml", "data.jsonl"):
        (elsewhere / name).write_bytes((folder / name).read_bytes())
    assert revision(elsewhere) == revision(folder)


@pytest.mark.parametrize(
    "helper",
    [
        "import math\ndef load(**_): ...\ndef data_revision(file, **_): return file + '{mark}'\n",
        "def load(**_): ...\nprint('imported without need: {mark}')\n",
    ],
)
def test_own_data_functions(folder, no_lm_eval, capsys, helper):
    (folder / "mine.yaml").write_text(
        "task: mine\ncustom_dataset: !function helper.load\n"
        "dataset_kwargs: {file: a}\nmetadata: {version: 1}\n"
    )
    (folder / "helper.py").write_text(helper.format(mark=1))
    first = revision(folder)
    (folder / "helper.py").write_text(helper.format(mark=2))
    assert revision(folder) != first
    assert capsys.readouterr().out == ""  # a module without data_revision() is not run


def test_a_failing_data_revision_is_one_clear_line(folder, no_lm_eval):
    (folder / "mine.yaml").write_text("task: mine\ncustom_dataset: !function helper.load\n")
    (folder / "helper.py").write_text("def data_revision(**_): open('/absent/file')\n")
    with pytest.raises(ConfigError, match=r"task 'mine': helper\.py: .*absent/file"):
        revision(folder)


def test_absent_data_is_found_before_anything_runs(folder, no_lm_eval):
    (folder / "data.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"task 'mine' reads .*data\.jsonl, which does not exist"):
        revision(folder)


def test_data_files_by_pattern_and_by_address(folder, monkeypatch, no_lm_eval):
    monkeypatch.chdir(folder)
    (folder / "mine.yaml").write_text(TASK.format(data="{train: ['*.jsonl', 'https://host/x.jsonl']}"))
    first = revision(folder)
    (folder / "more.jsonl").write_text("{}\n")
    assert revision(folder) != first


def test_a_group_names_an_unknown_member(folder, no_lm_eval, monkeypatch):
    monkeypatch.setattr(index, "lm_eval_catalog", dict)
    (folder / "g.yaml").write_text("group: g\ntask: [mine, absent]\n")
    with pytest.raises(ConfigError, match="group 'g' names the unknown task 'absent'"):
        resolve_tasks(["g"], [folder])


def test_errors_are_the_harnesss_own(folder):
    assert issubclass(UnknownName, HarnessError)
    (folder / "bad.yaml").write_text("task: [")
    with pytest.raises(ConfigError, match="is not valid YAML"):
        resolve_tasks(["mine"], [folder])
