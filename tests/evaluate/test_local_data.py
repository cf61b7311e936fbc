"""The public sets beside the checkout, through the engine. Skipped, visibly, where they are absent."""

from __future__ import annotations

import importlib.util
import lzma
from pathlib import Path

import pytest

from harness.evaluate.engine import evaluate_task
from harness.evaluate.index import resolve_tasks
from harness.evaluate.lm_tasks import load_task

FOLDER = Path(__file__).parents[1] / "tasks_from_data"


def reader():
    spec = importlib.util.spec_from_file_location("local_data_of_tests", FOLDER / "local_data.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


DATA = reader().data_folder()


def resolved(name, file):
    if not (DATA / file).is_file():
        pytest.skip(f"no {file} in {DATA} (set HARNESS_TEST_DATA)")
    return resolve_tasks([name], [FOLDER])[0]


@pytest.mark.parametrize(
    ("name", "file", "metrics"),
    [
        ("blimp_local", "blimp-first100.jsonl.gz", {"acc"}),
        ("lambada_local", "lambada-openai-test.jsonl.gz", {"acc", "target_perplexity"}),
        ("hellaswag_local", "hellaswag-val-first1000.jsonl.gz", {"acc", "acc_norm"}),
        ("piqa_local", "piqa-valid-first1000.jsonl.gz", {"acc", "acc_norm"}),
        ("arc_easy_local", "arc-easy-test-first1000.jsonl.gz", {"acc", "acc_norm"}),
        ("winogrande_local", "winogrande-dev-first1000.jsonl.gz", {"acc"}),
    ],
)
def test_a_few_items(name, file, metrics, model, tokenizer, info):
    task = resolved(name, file)
    evaluation = evaluate_task(task, model, tokenizer, info, limit=3, seed=0, batch_size=8)
    assert {record.metric for record in evaluation.records} == metrics
    assert all(record.n == 3 for record in evaluation.records)
    assert len({item.index for item in evaluation.items}) == 3


def test_wikitext_is_the_text_of_the_gptq_tables(tokenizer):
    """That code: the rows of the hub's data set, which are lines or nothing, joined by blank lines."""
    file = "wikitext2-test.raw.xz"
    task = resolved("wikitext2_local", file)
    documents = load_task(task, seed=0).documents(None)
    with lzma.open(DATA / file, "rt", encoding="utf-8") as lines:
        rows = [line if line.strip() else "" for line in lines]
    assert "\n\n".join(documents) == "\n\n".join(rows)
    assert len(documents) > 50
    assert documents[1].startswith(" = ")


def test_the_revision_follows_the_file(tmp_path, monkeypatch):
    monkeypatch.setenv("HARNESS_TEST_DATA", str(tmp_path))
    file = tmp_path / "piqa-valid-first1000.jsonl.gz"
    file.write_bytes(b"one")
    first = resolve_tasks(["piqa_local"], [FOLDER])[0].revision
    file.write_bytes(b"two")
    assert resolve_tasks(["piqa_local"], [FOLDER])[0].revision != first
