"""Task files for encoders, from the file to the records."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from scipy import stats

from harness.errors import ConfigError, NotApplicable
from harness.evaluate.embedding_engine import EmbeddingEvaluator, load_embeddings
from harness.evaluate.embedding_tasks import embedding_definition, load_embedding_data
from harness.evaluate.engine import evaluate_task
from harness.evaluate.index import BUNDLED_DIR, resolve_tasks
from harness.evaluate.probe import fit_probe
from harness.evaluate.yaml_files import YamlReader
from harness.models.info import info_from_config

from .test_embedding import embedder, make_bert

FOLDER = Path(__file__).parents[1] / "tasks_from_data"
LIGHT = ["Let there be light", "he divided the light", "the light was good", "a light to rule the day"]
WATER = ["the waters under the heaven", "Let the waters bring forth", "the seas he called", "upon the waters"]
PAIRS = [
    {"one": "Let there be light", "two": "there was light", "score": 4.5},
    {"one": "the waters under the heaven", "two": "Let there be light", "score": 0.5},
    {"one": "upon the waters", "two": "under the waters", "score": 3.0},
    {"one": "and it was so", "two": "and it was good", "score": 2.0},
]


def lines(path, rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(path)


def classification(folder, **changes):
    """The task file of labelled sentences, with fields replaced; None removes one."""
    rows = [{"text": t, "label": label} for label, texts in ((0, LIGHT), (1, WATER)) for t in texts]
    content = {
        "task": "elements",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {
                "train": lines(folder / "train.jsonl", rows),
                "test": lines(folder / "test.jsonl", rows[::-1]),
            }
        },
        "output_type": "embedding_classification",
        "training_split": "train",
        "test_split": "test",
        "doc_to_text": "text",
        "doc_to_target": "label",
        **changes,
    }
    return written(folder / "elements.yaml", content)


def similarity(folder, rows=PAIRS, **changes):
    content = {
        "task": "alike",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": lines(folder / "pairs.jsonl", rows)}},
        "output_type": "embedding_similarity",
        "test_split": "test",
        "doc_to_text": ["one", "two"],
        "doc_to_target": "score",
        "metadata": {"item_group": "one"},
        **changes,
    }
    return written(folder / "alike.yaml", content)


def written(path, content):
    path.write_text(yaml.safe_dump({name: value for name, value in content.items() if value is not None}))
    return path


@pytest.fixture(autouse=True)
def own_datasets_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "datasets"))


@pytest.fixture
def bert():
    return make_bert()


def evaluator(model, tokenizer, limit=None):
    info = info_from_config(model.config, "small-bert")
    return EmbeddingEvaluator(model, tokenizer, info, limit=limit, seed=0, batch_size=8)


# --- scoring ------------------------------------------------------------------------------------------


def test_labelled_sentences(tmp_path, bert, tokenizer):
    (task,) = resolve_tasks([str(classification(tmp_path))])
    found = evaluator(bert, tokenizer).evaluate(task)
    (accuracy,) = found.records
    features = embedder(bert, tokenizer).embed([*LIGHT, *WATER]).vectors.double().numpy()
    targets = np.array([0] * 4 + [1] * 4)
    log_p = fit_probe(features, targets, 2).log_probabilities(features)[::-1]
    right = log_p.argmax(1) == targets[::-1]
    assert (accuracy.metric, accuracy.value, accuracy.unit, accuracy.n) == (
        "acc",
        right.mean(),
        "fraction",
        8,
    )
    assert accuracy.lower <= accuracy.value <= accuracy.upper
    assert accuracy.note == "probe of 8 sentences"
    assert [item.outcome for item in found.items] == right.astype(float).tolist()
    assert [item.detail["target"] for item in found.items] == [1] * 4 + [0] * 4
    np.testing.assert_allclose([item.detail["loglikelihoods"] for item in found.items], log_p, atol=1e-9)


def test_scored_pairs(tmp_path, bert, tokenizer):
    (task,) = resolve_tasks([str(similarity(tmp_path))])
    found = evaluator(bert, tokenizer).evaluate(task)
    one, two = (embedder(bert, tokenizer).embed([row[side] for row in PAIRS]) for side in ("one", "two"))
    cosines = torch.nn.functional.cosine_similarity(one.vectors, two.vectors).tolist()
    scores = [row["score"] for row in PAIRS]
    values = {record.metric: record.value for record in found.records}
    assert values == {
        "spearman": pytest.approx(stats.spearmanr(cosines, scores)[0]),
        "pearson": pytest.approx(stats.pearsonr(cosines, scores)[0], abs=1e-5),
    }
    assert all(record.lower <= record.value <= record.upper for record in found.records)
    assert [item.outcome for item in found.items] == pytest.approx(cosines, abs=1e-6)
    assert [item.detail for item in found.items] == [
        {"target": row["score"], "group": row["one"]} for row in PAIRS
    ]


@pytest.mark.parametrize("make", [classification, similarity])
def test_the_distance_from_the_baseline(make, tmp_path, bert, tokenizer):
    (task,) = resolve_tasks([str(make(tmp_path))])
    path = tmp_path / "reference.safetensors"
    baseline = evaluator(bert, tokenizer)
    assert baseline.reference(task, path).fingerprint == load_embeddings(path).fingerprint
    own = {r.metric: r.value for r in baseline.evaluate(task, load_embeddings(path)).records}
    assert own["embedding_distance"] == 0
    other = make_bert()
    with torch.no_grad():
        other.encoder.layer[0].output.dense.weight.mul_(1.5)
    found = evaluator(other, tokenizer).evaluate(task, load_embeddings(path))
    (distance,) = [record for record in found.records if record.metric == "embedding_distance"]
    items = [item.outcome for item in found.items if item.metric == "embedding_distance"]
    texts = [*WATER[::-1], *LIGHT[::-1]] if make is classification else [
        text for row in PAIRS for text in (row["one"], row["two"])
    ]  # fmt: skip
    a, b = (embedder(model, tokenizer).embed(texts).vectors for model in (bert, other))
    expected = 1 - torch.nn.functional.cosine_similarity(a, b)
    assert distance.value == pytest.approx(float(expected.mean()), abs=1e-6)
    assert distance.value == pytest.approx(np.mean(items))
    assert distance.lower < distance.value < distance.upper
    assert len(items) == (8 if make is classification else 4)
    narrow = make_bert(hidden_size=16)
    without = evaluator(narrow, tokenizer).evaluate(task, load_embeddings(path))
    assert "another width" in without.records[0].note
    with pytest.raises(ConfigError, match="other tokens"):
        evaluator(bert, tokenizer, limit=3).evaluate(task, load_embeddings(path))
    path.write_bytes(b"damaged")
    assert load_embeddings(path) is None


def test_the_limit_counts_judged_sentences_and_leaves_the_probe_its_training(tmp_path, bert, tokenizer):
    (task,) = resolve_tasks([str(classification(tmp_path))])
    found = evaluator(bert, tokenizer, limit=3).evaluate(task)
    assert found.records[0].n == len(found.items) == 3
    assert found.records[0].note == "probe of 8 sentences, limit=3"
    whole = evaluator(bert, tokenizer).evaluate(task)
    for one, other in zip(whole.items, found.items, strict=False):
        assert (one.index, one.outcome) == (other.index, other.outcome)
        assert one.detail["loglikelihoods"] == pytest.approx(other.detail["loglikelihoods"], abs=1e-6)


def test_tasks_prepared_together_are_scored_as_alone(tmp_path, bert, tokenizer):
    tasks = resolve_tasks([str(classification(tmp_path)), str(similarity(tmp_path))])
    together = evaluator(bert, tokenizer)
    for task in tasks:
        together.prepare(task)
    shares = together.score_prepared()
    assert set(shares) == {"elements", "alike"}
    assert sum(shares.values()) == pytest.approx(1)
    for task in tasks:
        assert together.evaluate(task) == evaluator(bert, tokenizer).evaluate(task)


def test_each_kind_of_model_has_its_own_tasks(tmp_path, bert, model, tokenizer, info):
    (task,) = resolve_tasks([str(similarity(tmp_path))])
    with pytest.raises(NotApplicable, match="small-llama is a decoder"):
        evaluate_task(task, model, tokenizer, info, limit=None, seed=0, batch_size=8)
    with pytest.raises(NotApplicable, match="small-llama is a decoder"):
        EmbeddingEvaluator(model, tokenizer, info, limit=None, seed=0, batch_size=8)
    with pytest.raises(NotApplicable, match="small-bert is an encoder"):
        evaluator(bert, tokenizer).evaluate(resolve_tasks(["kjv"])[0])


# --- task files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (classification, {"metric_list": []}, "embedding_classification has no field 'metric_list'"),
        (classification, {"doc_to_text": ["text", "label"]}, r"names 1 column\(s\)"),
        (classification, {"training_split": None}, "training_split must be a name, not None"),
        (classification, {"training_limit": 1}, "training_limit must be a number of sentences, not 1"),
        (classification, {"test_split": None}, "validation_split must be a name"),
        (similarity, {"doc_to_text": "one"}, r"names 2 column\(s\).*sentence1, sentence2"),
        (similarity, {"training_split": "train"}, "embedding_similarity has no field 'training_split'"),
        (similarity, {"doc_to_target": None}, "doc_to_target must be a name"),
    ],
)
def test_a_wrong_file_is_refused_before_anything_is_loaded(make, changes, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        resolve_tasks([str(make(tmp_path, **changes))])


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (classification, {"test_split": "dev"}, "no split 'dev'"),
        (classification, {"doc_to_text": "sentence"}, r"no column 'sentence' \(they have text, label\)"),
        (classification, {"training_limit": 4}, "one label only"),
        (similarity, {"rows": PAIRS[:1]}, r"1 equal score\(s\).*raise --limit"),
        (similarity, {"rows": [{**PAIRS[0], "score": "high"}]}, "a score is no number"),
        (similarity, {"dataset_path": None, "dataset_kwargs": None}, "names no data"),
    ],
)
def test_wrong_data_are_one_clear_line(make, changes, message, tmp_path):
    (task,) = resolve_tasks([str(make(tmp_path, **changes))])
    with pytest.raises(ConfigError, match=message):
        load_embedding_data(task, None)


@pytest.mark.parametrize(
    ("label", "message"), [(-1, "a label is negative"), (7, "no training sentence has the label 7")]
)
def test_labels_that_no_probe_can_know(label, message, tmp_path):
    path = classification(tmp_path)
    lines(tmp_path / "test.jsonl", [{"text": "the sun", "label": label}])
    with pytest.raises(ConfigError, match=message):
        load_embedding_data(resolve_tasks([str(path)])[0], None)


def test_the_training_limit(tmp_path):
    path = classification(tmp_path, training_limit=6)
    data = load_embedding_data(resolve_tasks([str(path)])[0], None)
    assert data.training_texts == (*LIGHT, *WATER[:2])
    assert len(data.texts) == 8


def test_the_revision_follows_the_data(tmp_path):
    path = similarity(tmp_path)
    before = resolve_tasks([str(path)])[0].revision
    assert resolve_tasks([str(path)])[0].revision == before
    lines(tmp_path / "pairs.jsonl", [*PAIRS, PAIRS[0]])
    assert resolve_tasks([str(path)])[0].revision != before


@pytest.mark.parametrize("file", ["pairs.jsonl", "alike.yaml"])
def test_a_task_that_was_changed_since_it_was_resolved_is_refused(file, tmp_path):
    (task,) = resolve_tasks([str(similarity(tmp_path))])
    (tmp_path / file).write_text((tmp_path / file).read_text())  # the same content
    load_embedding_data(task, None)
    (tmp_path / file).write_text((tmp_path / file).read_text() + "\n")
    with pytest.raises(ConfigError, match=rf"{file} of task 'alike' was changed since the sweep began"):
        load_embedding_data(task, None)


def test_without_a_network_a_hub_task_says_what_is_missing():
    """Tests run with HF_HUB_OFFLINE=1 and an empty cache."""
    for name, data in (("sst2_probe", "stanfordnlp/sst2"), ("stsb_cosine", "sentence-transformers/stsb")):
        (task,) = resolve_tasks([name])
        with pytest.raises(ConfigError, match=f"data set '{data}'"):
            load_embedding_data(task, None)


def test_a_group_that_aggregates_them_is_refused(tmp_path):
    similarity(tmp_path)
    group = {"group": "mine", "task": ["alike"], "aggregate_metric_list": [{"metric": "spearman"}]}
    written(tmp_path / "mine.yaml", group)
    with pytest.raises(ConfigError, match="name its members"):
        resolve_tasks(["mine"], [tmp_path])


def test_the_documented_task_files_are_sound():
    docs = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text(encoding="utf-8")
    found = [yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", docs, re.DOTALL)]
    own = [content for content in found if content["output_type"].startswith("embedding")]
    assert [embedding_definition(content["task"], content).text_fields for content in own] == [
        ("subject",),
        ("first", "second"),
    ]


@pytest.mark.parametrize("name", ["kjv_books", "sst2_probe", "stsb_cosine"])
def test_the_bundled_files_are_sound(name):
    content = YamlReader().read(BUNDLED_DIR / f"{name}.yaml").content
    assert embedding_definition(name, content).name == name


def test_kjv_books_judges_sentences_that_it_did_not_train_on():
    data = load_embedding_data(resolve_tasks(["kjv_books"])[0], None)
    judged = [text for (text,) in data.texts]
    assert not set(judged) & set(data.training_texts)
    assert (len(data.training_texts), len(judged), len(data.labels)) == (650, 539, 6)
    assert set(data.groups[:6]) == set(data.labels)  # the books take turns


@pytest.mark.parametrize(
    ("name", "file", "count"), [("sst2_local", "sst2-dev", 872), ("stsb_local", "stsb-en-dev", 1500)]
)
def test_the_public_sets_beside_the_checkout(name, file, count):
    from .test_local_data import resolved

    data = load_embedding_data(resolved(name, f"{file}.jsonl.gz"), None)
    assert len(data.texts) == len(data.targets) == count
    assert len(data.training_texts) == (6920 if name == "sst2_local" else 0)
