"""Q-BERT: what the blocks get, what is stored, and what refuses; the allocation on a trained model."""

from __future__ import annotations

import copy

import pytest
import torch
from harness_plugins.quantization import q_bert
from harness_plugins.quantization._block_curvature import block_eigenvalues, calibration_loss, sensitivities
from harness_plugins.quantization._row_group_training import RoundedLinear
from harness_plugins.quantization.q_bert import METHOD, QBertOptions, allocate
from torch import nn

from harness import ConfigError, NotApplicable
from harness.models.info import info_from_config
from harness.nn.integer_linear import IntegerLinear
from harness.nn.quantized import QuantizedLinear
from harness.nn.quantized_embedding import QuantizedEmbedding
from harness.nn.quantizer import quantize_weight
from harness.nn.row_groups import quantize_in_row_groups, row_group_sizes
from harness.nn.surgery import block_linears
from harness.testing import tiny_model
from harness.testing.making import make_context

from .test_on_zoo import MODELS, zoo_model

QUICK = {"n_subsets": 2, "power_iters": 3}


def info(family="llama", **changes):
    config = tiny_model(family).config
    for name, value in changes.items():
        setattr(config, name, value)
    return info_from_config(config, "m")


# --- allocation ---------------------------------------------------------------------------------------


def test_the_sharpest_blocks_get_the_bits():
    omegas = [23.5, 0.82, 0.41, 1.05, 3.0, 0.67]  # of the tiny Llama in the notes that set the gate below
    assert allocate(omegas, QBertOptions()) == [3, 2, 2, 3, 3, 2]
    assert allocate(omegas, QBertOptions(lo_bits=4, hi_bits=8, hi_share=0.2)) == [8, 4, 4, 4, 4, 4]
    assert allocate([1.0, 1.0, 1.0], QBertOptions(hi_share=0.34)) == [3, 2, 2]


def test_sensitivity_is_the_mean_and_the_spread():
    assert sensitivities([[2.0, 4.0], [-3.0, -3.0]]) == [3.0 + 1.0, 3.0]


@pytest.mark.parametrize("kind", ["llama", "encoder"])
def test_the_eigenvalue_of_a_block_is_that_of_its_explicit_hessian(kind):
    """A model so small that the Hessian in a block's weights can be written down."""
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

    sizes = {
        "vocab_size": 16, "hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 8, "initializer_range": 0.5,
    }  # fmt: skip
    torch.manual_seed(0)
    model = (
        LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2))
        if kind == "llama"
        else BertModel(BertConfig(**sizes))
    ).eval()
    tokens = torch.randint(16, (3, 6), generator=torch.Generator().manual_seed(1))
    loss = calibration_loss("decoder" if kind == "llama" else "encoder")
    found = block_eigenvalues(model, [tokens], loss, make_context(model), iterations=200, tolerance=1e-6)
    assert found["unconverged"] == 0
    for block, (value,) in enumerate(found["eigenvalues"]):
        layers = [linear for name, linear in block_linears(model) if f".{block}." in name]
        with torch.enable_grad():
            flat = explicit(model, [layer.weight for layer in layers], loss, tokens)
        eigenvalues = torch.linalg.eigvalsh(flat)
        expected = float(eigenvalues[eigenvalues.abs().argmax()])
        assert value == pytest.approx(expected, rel=0.02)
        if kind == "encoder":
            assert eigenvalues.min() > -1e-3 * eigenvalues.max()  # Gauss-Newton: no direction bends down
    assert (found["gradient_norm"] == 0) == (kind == "encoder")
    assert all(parameter.requires_grad for parameter in model.parameters())


def explicit(model, weights, loss, tokens):
    """The Hessian [n, n] row by row, in eager attention."""
    model.set_attn_implementation("eager")
    gradient = torch.autograd.grad(loss(model, tokens), weights, create_graph=True)
    rows = []
    for entry in torch.cat([each.flatten() for each in gradient]):
        row = torch.autograd.grad(entry, weights, retain_graph=True, materialize_grads=True)
        rows.append(torch.cat([each.flatten() for each in row]))
    model.set_attn_implementation("sdpa")
    return torch.stack(rows)


# --- what is made -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "encoder"])
@pytest.mark.parametrize("a_bits", [8, 16])
def test_every_layer_holds_its_own_weights_in_its_blocks_bits(family, a_bits, apply, weights):
    model = tiny_model(family)
    before = weights(model)
    made = apply(METHOD, model, a_bits=a_bits, groups=32, **QUICK)
    kinds = {name: module for name, module in made.named_modules() if name in before}
    assert {type(module) for module in kinds.values()} == {IntegerLinear if a_bits == 8 else QuantizedLinear}
    bits = [{module.bits for name, module in kinds.items() if f".{block}." in name} for block in (0, 1)]
    assert sorted(map(tuple, bits)) == [(2,), (3,)]
    for name, module in kinds.items():
        heads = (
            12 if name.endswith("c_attn") else 1
        )  # query, key and value of 4 heads; elsewhere 32 fit evenly
        rows = before[name].split(row_group_sizes(len(before[name]), 32, heads))
        expected = [quantize_weight(part, bits=module.bits, sym=False, per_tensor=True) for part in rows]
        found = module.dequantize()
        torch.testing.assert_close(found, torch.cat([part.dequantize() for part in expected]), rtol=0, atol=0)
        assert not module.simulated
    assert isinstance(made.get_input_embeddings(), QuantizedEmbedding)


@pytest.mark.parametrize(("lo", "hi"), [(2, 3), (3, 4), (4, 8)])
def test_the_stored_bits_are_those_of_the_theory(lo, hi, apply, weights):
    """Bits, and a 16-bit scale (32 at 8 bits) with a zero point for each row, within 2 %."""
    model = tiny_model("llama")
    shapes = {name: weight.shape for name, weight in weights(model).items()}
    made = apply(METHOD, model, lo_bits=lo, hi_bits=hi, **QUICK)
    stored = theory = 0
    for name, (out, columns) in shapes.items():
        layer = made.get_submodule(name)
        stored += 8 * sum(t.numel() * t.element_size() for t in layer.state_dict().values())
        theory += out * (columns * layer.bits + layer.bits + (32 if layer.bits == 8 else 16))
    assert stored == pytest.approx(theory, rel=0.02)


def test_equal_bits_ask_for_no_calibration_and_give_rounding_per_row(apply, weights):
    assert METHOD.needs_of(QBertOptions()) == {"calibration"}
    options = {"lo_bits": 3, "hi_bits": 3, "groups": -1, "emb_bits": 16, "a_bits": 16}
    assert METHOD.needs_of(QBertOptions(**options)) == frozenset()
    assert METHOD.needs_of(QBertOptions(**options, steps=2)) == {"training"}
    before = weights(tiny_model("opt"))
    made = apply(METHOD, tiny_model("opt"), **options)
    for name, weight in before.items():
        expected = quantize_weight(weight, bits=3, sym=False).dequantize()
        assert torch.equal(made.get_submodule(name).dequantize(), expected)


def test_random_weights_are_not_analysed():
    """shape: models are timed and weighed: the first blocks get the bits, and no Hessian is taken."""
    model = tiny_model("llama")
    context = make_context(model)
    context.info = info_from_config(model.config, "m", synthetic=True)
    made = METHOD.transform(model, QBertOptions(), context)
    assert [made.model.layers[i].mlp.up_proj.bits for i in (0, 1)] == [3, 2]
    assert [record.metric for record in context.records] == ["average_bits"]


def test_the_figures_are_recorded_and_a_steep_model_is_noted():
    model = tiny_model("llama")
    context = make_context(model)
    METHOD.transform(model, QBertOptions(**QUICK, grad_norm_max=1e-6), context)
    records = {record.metric: record for record in context.records}
    assert records["average_bits"].value == 2.5
    assert records["gradient_norm"].value > 0
    assert "not near a minimum" in records["gradient_norm"].note
    assert records["unconverged_eigenvalues"].note == "of 4"
    assert records["largest_sensitivity"].value > 0


def test_half_precision_weights_come_back_as_they_were():
    model = tiny_model("llama").to(torch.bfloat16)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    tokens = torch.randint(256, (2, 8), generator=torch.Generator().manual_seed(0))
    block_eigenvalues(
        model, [tokens], calibration_loss("decoder"), make_context(model), iterations=2, tolerance=0.1
    )
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, before[name])


# --- training -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("a_bits", [8, 16])
def test_the_training_form_computes_what_is_stored_and_passes_gradients_straight(a_bits):
    linear = nn.Linear(24, 12)
    sizes = [3] * 4
    rounded = RoundedLinear(linear, bits=3, sizes=sizes, a_bits=a_bits)
    x = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = rounded(x)
    kind = IntegerLinear if a_bits == 8 else QuantizedLinear
    stored = kind.from_weight(quantize_in_row_groups(linear.weight, bits=3, sizes=sizes), linear.bias)
    torch.testing.assert_close(y, stored(x.detach()), atol=1e-5, rtol=1e-5)
    y.sum().backward()
    torch.testing.assert_close(x.grad[0, 0], stored.dequantize().sum(0), atol=1e-5, rtol=1e-5)
    tokens = x.detach().flatten(0, 1)
    expected = tokens.sum(0).expand(12, -1)
    torch.testing.assert_close(linear.weight.grad, expected, atol=0.3 if a_bits == 8 else 1e-4, rtol=0)


@pytest.mark.parametrize("family", ["llama", "encoder"])
def test_training_moves_weights_and_ends_packed(family, weights):
    model = tiny_model(family)
    before = weights(model)
    context = make_context(model)
    made = METHOD.transform(model, QBertOptions(**QUICK, steps=3, lo_bits=3, hi_bits=4), context)
    assert context.trained_steps == 3
    assert not any(isinstance(module, RoundedLinear) for module in made.modules())
    for name, weight in before.items():
        layer = made.get_submodule(name)
        sizes = q_bert._sizes(tiny_model(family), name, 128, context.info)
        untrained = quantize_in_row_groups(weight, bits=layer.bits, sizes=sizes).dequantize()
        assert not torch.equal(layer.dequantize(), untrained)


# --- what does not fit --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {"groups": 129}, "query matrix: groups=129: a matrix of 128 rows has 1 to 128 groups"),
        ({"num_key_value_heads": 2}, {}, "key matrix: groups=128: a matrix of 64 rows"),
        ({}, {"groups": 3}, "query matrix: groups=3 would split a head"),
        ({"model_type": "bloom"}, {}, "not known"),
    ],
)
def test_models_that_do_not_fit(changes, options, message):
    if "model_type" in changes:
        known = info()
        described = type(known)(**{**{f: getattr(known, f) for f in known.__slots__}, "family": "other"})
    else:
        described = info(**changes)
    assert message in METHOD.applies(described, QBertOptions(**options))


def test_models_that_fit():
    for family in ("llama", "opt", "gpt2", "bert", "encoder"):
        assert METHOD.applies(info(family), QBertOptions()) is None
    assert "384 rows" in METHOD.applies(info("gpt2"), QBertOptions(groups=400))


def test_the_rows_of_heads_that_have_a_size_of_their_own_are_counted():
    from transformers import Qwen3Config

    config = Qwen3Config(hidden_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=64)
    assert METHOD.applies(info_from_config(config, ""), QBertOptions(groups=128)) is None
    assert "128 rows" in METHOD.applies(info_from_config(config, ""), QBertOptions(groups=130))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lo_bits": 4}, "lo_bits=4 is above hi_bits=3"),
        ({"groups": 0}, "groups must be positive"),
        ({"lo_bits": 5}, "lo_bits"),
        ({"hi_share": 1.5}, "hi_share"),
        ({"tol": 0}, "tol"),
        ({"emb_bits": 2}, "emb_bits"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ConfigError, match=message):
        METHOD.options.parse(options, method="q-bert")


def test_too_few_sequences_for_the_subsets(apply):
    with pytest.raises(ConfigError, match=r"n_subsets=10 needs as many calibration sequences; there are 4"):
        apply(METHOD, tiny_model("llama"))


def test_a_quantized_model_is_refused(apply):
    made = apply(METHOD, tiny_model("llama"), **QUICK)
    with pytest.raises(NotApplicable, match="quantized already"):
        apply(METHOD, copy.deepcopy(made), **QUICK)


# --- on trained models --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_order_of_sensitivity_beats_its_reverse(name, monkeypatch):
    """Measured, opt / llama, half of the blocks at 3 bits and half at 2, a range for each row: the loss rises
    by 1.600 / 1.275 nats, with the order reversed by 1.689 / 1.586 (.95 / .80 of it).

    At 2 bits these models lose over a nat, far outside where a Hessian describes the loss. Among sampled
    allocations (every 16th window) the order is third of 6 / first of 7; with 4 and 3 bits it is no help:
    fourth of 6 / last of 7, 1.07 / 1.23 of the reversed order.
    """
    zoo = zoo_model(name)
    options = {
        "groups": -1, "emb_bits": 16, "a_bits": 16, "n_subsets": 2, "power_iters": 10,
    }  # fmt: skip
    ordered = zoo.rise(METHOD, samples=8, **options)
    monkeypatch.setattr(q_bert, "sensitivities", lambda found: [-omega for omega in sensitivities(found)])
    reverse = zoo.loss(zoo.make(METHOD, samples=8, **options), 8) - zoo.original_loss(8)
    assert ordered <= 0.98 * reverse
