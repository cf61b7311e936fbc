"""The engine's scores, item by item, against lm-eval's own HFLM with a batch size of one."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from harness.evaluate.engine import TaskEvaluator
from harness.evaluate.index import BUNDLED_DIR, resolve_tasks
from harness.evaluate.lm import quiet
from harness.evaluate.lm_tasks import load_task
from harness.models.info import info_from_config
from tests.zoo_models import zoo_model

from .conftest import make_llama
from .test_local_data import DATA, FOLDER

FILES = {
    "hellaswag_local": "hellaswag-val-first1000.jsonl.gz",
    "piqa_local": "piqa-valid-first1000.jsonl.gz",
    "arc_easy_local": "arc-easy-test-first1000.jsonl.gz",
    "winogrande_local": "winogrande-dev-first1000.jsonl.gz",
    "lambada_local": "lambada-openai-test.jsonl.gz",
    "blimp_local": "blimp-first100.jsonl.gz",
    "wikitext2_local": "wikitext2-test.raw.xz",
}
BUNDLED = ["grammar", "kjv"]
CHOICES = ["grammar", "hellaswag_local", "piqa_local", "arc_easy_local", "lambada_local"]


def zoo_tokenizer():
    from transformers import AutoTokenizer

    from harness.models.loading import ZOO_DIR

    return AutoTokenizer.from_pretrained(ZOO_DIR / "llama-6m")


def present(names):
    found = [name for name in names if name in BUNDLED or (DATA / FILES[name]).is_file()]
    if found == [name for name in names if name in BUNDLED]:
        pytest.skip(f"no data in {DATA} (set HARNESS_TEST_DATA)")
    return resolve_tasks(found, [FOLDER, BUNDLED_DIR])


def lm_evals(model, tokenizer, tasks, limit):
    """By task: the answers of an untouched HFLM and lm-eval's metrics of each document."""
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM

    found = {}
    for task in tasks:
        with quiet():
            loaded = load_task(task, seed=0)
            lm = HFLM(
                pretrained=copy.deepcopy(model),
                tokenizer=copy.deepcopy(tokenizer),
                batch_size=1,
                max_length=model.config.max_position_embeddings,
            )
            tasks_and_groups = {"tasks": loaded.tasks, "groups": loaded.groups}
            results = evaluator.evaluate(lm, tasks_and_groups, limit=limit, bootstrap_iters=0)
        found[task.name] = next(iter(results["samples"].values()))
    return found


def check(model, tokenizer, tasks, limit, tolerance=1e-4):
    expected = lm_evals(model, tokenizer, tasks, limit)
    evaluator = TaskEvaluator(
        model, tokenizer, info_from_config(model.config, "m"), limit=limit, seed=0, batch_size=8
    )
    for task in tasks:
        evaluator.prepare(task)
    shares = evaluator.score_prepared()
    assert sum(shares.values()) == pytest.approx(1)
    for task in tasks:
        evaluation = evaluator.evaluate(task)
        outcomes = {(item.metric, item.index): item.outcome for item in evaluation.items}
        details = {item.index: item.detail for item in evaluation.items if _explains(item)}
        assert len(details) == len(expected[task.name])
        for sample in expected[task.name]:
            answers = sample["filtered_resps"]
            if "loglikelihoods" in details[sample["doc_id"]]:
                theirs = [score for score, _ in answers]
                mine = details[sample["doc_id"]]["loglikelihoods"]
                assert np.argmax(mine) == np.argmax(theirs)
            else:
                theirs = [answers[0][0] if isinstance(answers[0], tuple) else answers[0]]
                mine = [details[sample["doc_id"]]["loglikelihood"]]
            assert mine == pytest.approx(theirs, abs=tolerance, rel=2e-6)
            for metric in {"acc", "acc_norm"} & set(sample["metrics"]):
                assert outcomes[metric, sample["doc_id"]] == sample[metric]


def _explains(item):
    return any(name.startswith("loglikelihood") for name in item.detail)


def tiny(name):
    """A model of random weights with the zoo's vocabulary."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    if name == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "initializer_range": 0.2}
        return GPT2LMHeadModel(GPT2Config(vocab_size=4096, bos_token_id=0, eos_token_id=0, **sizes)).eval()
    return make_llama(vocab_size=4096, max_position_embeddings=256)


@pytest.mark.parametrize("name", ["llama-6m", "opt-4m"])
def test_the_bundled_models(name):
    check(zoo_model(name), zoo_tokenizer(), present(CHOICES), limit=4)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_random_models_on_everything(name):
    check(tiny(name), zoo_tokenizer(), present([*BUNDLED, *FILES]), limit=2)


def test_swapped_attention():
    from harness.nn.attention import use_local_attention
    from harness.nn.masks import Band

    model = tiny("llama")
    use_local_attention(model, [Band("block", 16, 1)] * 2)
    check(model, zoo_tokenizer(), present(CHOICES), limit=4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama-6m", "opt-4m"])
def test_the_bundled_models_on_many_items(name):
    check(zoo_model(name), zoo_tokenizer(), present([*BUNDLED, *FILES]), limit=100, tolerance=3e-4)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["block-local", "rtn", "magnitude-prune", "mqa"])
def test_variants_on_many_items(method):
    from harness.plugins import load_plugins
    from harness.testing import make_context

    model = zoo_model("llama-6m")
    found = load_plugins().method(method)
    model = found.transform(model, found.options(), make_context(model))
    check(model.eval(), zoo_tokenizer(), present(CHOICES), limit=50, tolerance=3e-4)
