"""`scratch:` models: trained once, by the harness or by a method that must hold something while it trains."""

from __future__ import annotations

import pytest
import torch

from harness.chain import parse_chain
from harness.errors import ConfigError
from harness.job import Budget, VariantJob
from harness.models.loading import describe
from harness.models.spec import parse_model
from harness.nn.quantized import PackedLinear
from harness.nn.surgery import block_linears
from harness.plugins import load_plugins
from harness.texts import text_hash
from harness.transforming import make_variant

PLUGINS = load_plugins()
STEPS = 4


@pytest.fixture
def made(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("In the beginning was the word, and the word was long. " * 50)

    planned = text_hash(text)

    def make(chain, model="scratch:llama-nano"):
        job = VariantJob(
            variant_key="variant",
            label=chain,
            chain=tuple(
                (step.method.name, step.options.canonical())
                for step in parse_chain(chain, PLUGINS.methods).steps
            ),
            model=describe(parse_model(model)),
            seed=0,
            dtype="float32",
            device="cpu",
            cells=(),
            plugins=(),
            budget=Budget(2, 16, STEPS, 2, 16, text, planned),
            limit=None,
            eval_batch_size=1,
            cache_dir=tmp_path / "cache",
            threads=1,
            environment={},
        )
        return make_variant(job, PLUGINS, lambda _what, _done, _total: None)

    return make


def test_what_a_pruner_made_zero_stays_zero_while_the_next_method_trains(made):
    variant = made("magnitude-prune:sparsity=0.5+qat:bits=8:lr=0.001", "zoo:opt-4m")
    layers = [module for module in variant.model.modules() if isinstance(module, PackedLinear)]
    values = torch.cat([layer.dequantize().flatten() for layer in layers])
    assert 0.5 <= float((values == 0).float().mean()) < 0.6


def _zeros(model) -> float:
    weights = [linear.weight for _, linear in block_linears(model)]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


def _trained_steps(variant) -> int:
    return {record.metric: record.value for record in variant.records}["trained_steps"]


def test_the_baseline_is_trained_by_the_harness(made):
    variant = made("baseline")
    assert _trained_steps(variant) == STEPS
    assert _zeros(variant.model) == 0


def test_what_a_method_pruned_in_training_is_not_trained_away(made):
    variant = made("gmp:sparsity=0.75")
    assert _trained_steps(variant) == STEPS
    assert _zeros(variant.model) == pytest.approx(0.75, abs=1e-3)
    assert variant.no_effect is None
    embeddings = variant.model.get_input_embeddings().weight
    assert not torch.equal(embeddings, made("baseline").model.get_input_embeddings().weight)


def test_one_shot_pruning_of_an_untrained_model_is_refused():
    info = describe(parse_model("scratch:llama-nano")).info
    method = PLUGINS.method("magnitude-prune")
    assert "fill its zeros" in method.applies(info, method.options())


def test_a_run_is_rewound_where_it_was_made(made):
    variant = made("lottery-rewind:sparsity=0.5:k=1")
    assert _trained_steps(variant) == STEPS + STEPS - 1
    assert _zeros(variant.model) == pytest.approx(0.5, abs=1e-3)


def test_a_bundled_teacher_with_the_same_tokens_teaches_an_untrained_model(made):
    variant = made("kd:teacher=llama-6m")
    assert _trained_steps(variant) == STEPS
    assert {record.metric: record.value for record in variant.records}["distillation_loss"] > 0


def test_a_text_that_is_edited_while_a_sweep_runs_is_not_taken_for_what_it_was(made, tmp_path):
    (tmp_path / "text.txt").write_text("In the end was another word, and the word was short. " * 50)
    with pytest.raises(ConfigError, match=r"text\.txt was changed since the sweep began; run the same"):
        made("baseline")
    assert not (tmp_path / "cache").exists()
