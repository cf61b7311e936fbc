"""N:M of `wanda` and `sparsegpt`: stored without its zeros where a kernel runs it, and only there."""

from __future__ import annotations

import pytest
import torch
from harness_plugins.pruning import sparsegpt, wanda

from harness.measure.effect import measure_effect, snapshot
from harness.nn.n_of_m_layers import MaskedLinear
from harness.nn.semi_structured import SemiStructuredLinear
from harness.nn.surgery import block_linears
from harness.testing import make_context, tiny_model

METHODS = {"wanda": wanda.METHOD, "sparsegpt": sparsegpt.METHOD}


def _pruned(method, model, *, last_in_chain=True, **options):
    context = make_context(model, calibration_samples=6, calibration_len=24)
    context.last_in_chain = last_in_chain
    METHODS[method].transform(model, METHODS[method].options.parse(options), context)
    return {record.metric: record for record in context.records}


def _kinds(model, names):
    return {type(model.get_submodule(name)) for name in names}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_2_of_4_loses_its_zeros_and_nothing_else(method, family):
    model, dense = (tiny_model(family).to(torch.bfloat16) for _ in range(2))
    names, before = list(dict(block_linears(model))), snapshot(model)
    recorded = _pruned(method, model, n=2, m=4)
    on_paper = _pruned(method, dense, n=2, m=4, backend="dense")
    assert _kinds(model, names) == {SemiStructuredLinear}
    for name in names:
        assert torch.equal(model.get_submodule(name).dense_weight(), dense.get_submodule(name).weight)
    changed = [each for each in measure_effect(before, model).effects if each.changed]
    sizes = [sum(getattr(each, side) for each in changed) for side in ("bytes_after", "bytes_before")]
    assert sizes[0] <= 0.57 * sizes[1]
    assert {each.nm_pattern for each in changed} == {"2:4"}
    assert not any(each.simulated for each in changed)
    assert "bitmap_bytes" not in recorded
    for metric in ("pruned_share_of_targets", "pruned_share_of_all_parameters"):
        assert recorded[metric].value == on_paper[metric].value


@pytest.mark.parametrize("method", METHODS)
def test_other_patterns_stay_dense_and_say_so(method):
    model = tiny_model("llama")
    names, before = list(dict(block_linears(model))), snapshot(model)
    recorded = _pruned(method, model, n=4, m=8)
    assert _kinds(model, names) == {MaskedLinear}
    changed = [each for each in measure_effect(before, model).effects if each.changed]
    assert all(each.simulated and each.nm_pattern == "4:8" for each in changed)
    assert recorded["bitmap_bytes"].value > 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("options", [{"n": 2, "m": 4}, {"sparsity": 0.5}])
def test_what_follows_in_a_chain_finds_plain_layers(method, options):
    model = tiny_model("llama")
    names = list(dict(block_linears(model)))
    _pruned(method, model, last_in_chain=False, **options)
    assert _kinds(model, names) == {torch.nn.Linear}


def test_the_share_of_all_parameters_is_of_the_dense_model():
    """Packed layers have no parameters, which must not shrink what the share is taken of."""
    model = tiny_model("llama")
    places = sum(linear.weight.numel() for _, linear in block_linears(model))
    everything = sum(parameter.numel() for parameter in model.parameters())
    recorded = _pruned("sparsegpt", model, n=2, m=4, bits=4, group_size=32)
    share = recorded["pruned_share_of_all_parameters"].value
    assert share == pytest.approx(0.5 * places / everything)
