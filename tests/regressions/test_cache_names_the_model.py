"""A response cache without the model in its key serves model A's answers for model B."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from harness import scoring, zoo
from harness.cache import ContentCache
from harness.keys import content_key

CHECKPOINT = Path(zoo.__file__).parent / "checkpoints" / "llama-6m"


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """Where scoring looks for the baseline's distributions, for a job that differs in one thing."""
    found = object()

    def of(**changes):
        paths: list[Path] = []

        def load(path):
            paths.append(path)
            return found

        monkeypatch.setattr(scoring, "load_reference", load)
        values = {
            "identity": "sha256:a", "dtype": "float32", "seed": 0, "limit": None, "revision": "r1",
            "environment": {"torch": "2.11"}, **changes,
        }  # fmt: skip
        job = SimpleNamespace(
            cache_dir=tmp_path,
            model=SimpleNamespace(identity=values["identity"]),
            dtype=values["dtype"],
            seed=values["seed"],
            limit=values["limit"],
            environment=values["environment"],
            eval_batch_size=4,
        )
        made = SimpleNamespace(info=SimpleNamespace(scratch=False), is_baseline=True)
        task = SimpleNamespace(revision=values["revision"])
        assert scoring._reference(made, job, SimpleNamespace(), task) is found
        return paths[0]

    return of


@pytest.mark.parametrize(
    "changes",
    [
        {"identity": "sha256:b"},
        {"dtype": "bfloat16"},
        {"limit": 10},
        {"revision": "r2"},
        {"environment": {"torch": "2.12"}},
    ],
)
def test_the_reference_of_another_model_or_setting_is_another_file(asked, changes):
    assert asked() == asked()
    assert asked(**changes) != asked()


def test_what_a_method_caches_is_keyed_by_the_model(tiny_llama, tmp_path):
    """The Hessians of one model are not those of another: the context adds the model's identity."""
    from harness.testing import make_context

    first = make_context(tiny_llama, cache_dir=tmp_path)
    other = replace(first, identity={**first.identity, "model": "another"})
    calls = []

    def compute(name):
        return lambda: calls.append(name) or {"name": name}

    assert first.cache({"what": "hessian"}, compute("first")) == {"name": "first"}
    assert first.cache({"what": "hessian"}, compute("again")) == {"name": "first"}
    assert other.cache({"what": "hessian"}, compute("other")) == {"name": "other"}
    assert calls == ["first", "other"]


@pytest.fixture
def two_models():
    """Two models of one configuration, so that only the weights tell them apart, and their tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(LlamaForCausalLM(config).eval())
    return models, tokenizer


def test_a_second_model_in_one_process_gives_its_own_answers(two_models):
    """The same requests to another model: lm-eval's cache, keyed by the request alone, would repeat the
    first one's."""
    from harness.evaluate.engine import evaluate_task
    from harness.evaluate.index import resolve_tasks
    from harness.models.info import info_from_config

    models, tokenizer = two_models
    (task,) = resolve_tasks(["grammar"])

    def scores(model):
        info = info_from_config(model.config, "the same label")
        found = evaluate_task(task, model, tokenizer, info, limit=6, seed=0, batch_size=4)
        return [item.detail["loglikelihoods"] for item in found.items if "loglikelihoods" in item.detail]

    first, second, first_again = scores(models[0]), scores(models[1]), scores(models[0])
    assert len(first) == len(second) == 6
    assert all(one != other for one, other in zip(first, second, strict=True))
    assert first == first_again


def test_keys_of_two_models_with_one_label_differ():
    parts = {"model": "sha256:a", "chain": [], "seed": 0}
    assert content_key(parts) != content_key({**parts, "model": "sha256:b"})
    assert ContentCache(Path("x")).path(parts) != ContentCache(Path("x")).path({**parts, "model": "b"})
