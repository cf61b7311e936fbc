"""The bundled tasks: offered as a plugin, shipped with the package, and scored for sense."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import pytest

from harness.corpus import HELD_OUT_BOOKS, kjv_books
from harness.evaluate import bundled
from harness.evaluate.engine import evaluate_task
from harness.evaluate.index import BUNDLED_DIR, resolve_tasks
from harness.evaluate.lm_tasks import load_task
from harness.evaluate.minimal_pairs import PHENOMENA, minimal_pairs
from harness.evaluate.task import TaskSource
from harness.evaluate.yaml_files import YamlReader


def loaded(name):
    return load_task(resolve_tasks([name])[0], seed=0)


def test_offered_through_the_hook():
    (source,) = bundled.register_tasks()
    assert isinstance(source, TaskSource)
    assert source.path == BUNDLED_DIR
    assert bundled.register_tasks.harness_impl


def test_every_file_of_the_tasks_is_yaml_or_python():
    assert {file.suffix for file in BUNDLED_DIR.iterdir() if file.is_file()} == {".yaml", ".py"}


def test_kjv_scores_the_held_out_chapters_and_nothing_else():
    documents = loaded("kjv").documents(None)
    expected = [chapter for book in HELD_OUT_BOOKS for chapter in kjv_books()[book]]
    assert documents == expected
    assert loaded("kjv").documents(2) == expected[:2]
    assert "Now it came to pass in the days when the judges ruled" in documents[0]


def test_grammar_holds_the_generated_pairs():
    task = loaded("grammar").tasks["grammar"]
    documents = list(task.eval_docs)
    assert [(d["phenomenon"], d["good"], d["bad"]) for d in documents] == [
        (pair.phenomenon, pair.good, pair.bad) for pair in minimal_pairs()
    ]
    assert task.doc_to_choice(documents[0]) == [documents[0]["good"], documents[0]["bad"]]


def test_grammar_lists_a_metric_for_each_phenomenon():
    content = YamlReader().read(BUNDLED_DIR / "grammar.yaml").content
    metrics = [entry["metric"] for entry in content["metric_list"]]
    assert metrics == ["acc", *(f"acc_{name}" for name in PHENOMENA)]
    assert f"{len(PHENOMENA)} phenomena" in content["metadata"]["summary"]


def test_the_pairs_are_those_of_this_version():
    """Changing them changes what scores mean: raise the version in grammar.yaml with this hash."""
    text = "\n".join(f"{p.phenomenon}|{p.good}|{p.bad}" for p in minimal_pairs())
    version = YamlReader().read(BUNDLED_DIR / "grammar.yaml").content["metadata"]["version"]
    assert (version, hashlib.sha256(text.encode()).hexdigest()[:16]) == (1.0, "cc379f8fdfb2987f")


@pytest.mark.parametrize("name", ["kjv", "grammar"])
def test_the_data_decide_the_revision(name, monkeypatch):
    before = resolve_tasks([name])[0].revision
    import harness.corpus as corpus
    from harness.evaluate import minimal_pairs as module

    if name == "kjv":
        books = {**kjv_books(), "Ruth": ("another text",)}
        monkeypatch.setattr(corpus, "kjv_books", lambda: books)
    else:
        monkeypatch.setattr(module, "PHENOMENA", {"word_order": module.word_order})
    assert resolve_tasks([name])[0].revision != before


# --- the documentation -------------------------------------------------------------------------------

DOCS = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text(encoding="utf-8")


def test_the_documented_pairs_are_real_and_complete():
    documented = re.findall(r"^\| `(\w+)` \| ([^|]+) \| ([^|]+) \|$", DOCS, re.MULTILINE)
    rows = [row for row in documented if row[0] in PHENOMENA]
    assert [row[0] for row in rows] == list(PHENOMENA)
    assert set(rows) <= {(pair.phenomenon, pair.good, pair.bad) for pair in minimal_pairs()}


def test_the_documented_task_file_works(tmp_path, monkeypatch, model, tokenizer, info):
    import datasets

    text = re.search(r"```yaml\n(task: capitals\n.*?)```", DOCS, re.DOTALL).group(1)
    (tmp_path / "capitals.yaml").write_text(text)
    (tmp_path / "capitals.jsonl").write_text(
        '{"country": "Norway", "choices": ["Oslo", "Bergen"], "answer": 0, "continent": "Europe"}\n'
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    (task,) = resolve_tasks(["capitals"], [tmp_path])
    evaluation = evaluate_task(task, model, tokenizer, info, limit=None, seed=0, batch_size=2)
    (item,) = evaluation.items
    assert (item.metric, item.detail["group"], item.detail["target"]) == ("acc", "Europe", 0)
