"""FP8 on whole models: what is stored, what is measured, what is left alone or refused."""

from __future__ import annotations

import pytest
import torch
from harness_plugins.quantization import fp8, rtn
from harness_plugins.quantization.fp8 import METHOD, Fp8Options
from harness_plugins.sparsity import nm_prune

from harness.chain import parse_chain
from harness.errors import ConfigError, NotApplicable, NumericalFailure
from harness.grid import refusal
from harness.measure.effect import measure_effect, snapshot
from harness.models.info import info_from_config
from harness.nn.fp8 import Fp8Linear
from harness.nn.outliers import inject_outliers
from harness.nn.sparse_8_bit import SparseFp8Linear
from harness.nn.surgery import block_linears
from harness.testing.making import make_context
from harness.testing.models import tiny_model

FAMILIES = ["llama", "opt", "gpt2", "bert", "encoder"]
A_GRANS = ["per-token", "per-tensor-dynamic", "per-tensor-static"]


def layers_of(model) -> dict[str, Fp8Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Fp8Linear)}


def rel(value: torch.Tensor, expected: torch.Tensor) -> float:
    return float((value - expected).norm() / expected.norm())


def narrow_llama():
    """An FFN of 200: no multiple of 16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=200, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fmt", ["e4m3", "e5m2"])
def test_every_block_linear_is_replaced(apply, logits, weights, family, fmt):
    model = tiny_model(family)
    original, before = logits(model), weights(model)
    model = apply(METHOD, model, fmt=fmt)
    after = layers_of(model)
    assert after.keys() == before.keys()
    for name, layer in after.items():
        expected = 0.0265 if fmt == "e4m3" else 0.053
        assert rel(layer.dequantize(), before[name]) == pytest.approx(expected, rel=0.1), name
    assert rel(logits(model), original) < (0.1 if fmt == "e4m3" else 0.2)


@pytest.mark.parametrize("a_gran", A_GRANS)
@pytest.mark.parametrize("w_gran", ["per-channel", "per-tensor"])
def test_granularities(apply, logits, a_gran, w_gran):
    original = logits(tiny_model("opt"))
    model = apply(METHOD, tiny_model("opt"), a_gran=a_gran, w_gran=w_gran)
    assert {layer.a_gran for layer in layers_of(model).values()} == {a_gran}
    assert {layer.scales.numel() == 1 for layer in layers_of(model).values()} == {w_gran == "per-tensor"}
    assert rel(logits(model), original) < 0.1


@pytest.mark.parametrize("fmt", ["e4m3", "e5m2"])
def test_static_scales_are_those_of_the_calibration_tokens(fmt):
    model = tiny_model("opt")
    context = make_context(model, calibration_samples=4, calibration_len=32)
    seen: dict[str, float] = {}
    handles = [
        linear.register_forward_pre_hook(
            lambda _m, args, name=name: seen.update({name: float(args[0].abs().max())})
        )
        for name, linear in block_linears(model)
    ]
    with torch.no_grad():
        model(input_ids=context.calibration())
    for handle in handles:
        handle.remove()
    model = METHOD.transform(model, Fp8Options(a_gran="per-tensor-static", fmt=fmt), context)
    largest = {"e4m3": 448, "e5m2": 57344}[fmt]
    for name, layer in layers_of(model).items():
        assert float(layer.input_scale) == pytest.approx(seen[name] / largest, rel=1e-5), name


@pytest.mark.parametrize(("w_gran", "scales"), [("per-channel", None), ("per-tensor", 1)])
@pytest.mark.parametrize("fmt", ["e4m3", "e5m2"])
def test_the_effect_is_reported_as_it_is(fmt, w_gran, scales):
    model = tiny_model("llama")
    before = snapshot(model)
    model = METHOD.transform(model, Fp8Options(fmt=fmt, w_gran=w_gran), make_context(model))
    effect = measure_effect(before, model)
    assert not effect.simulated
    reported = {each.module: each for each in effect.effects if each.changed}
    assert reported.keys() == layers_of(model).keys()
    for name, each in reported.items():
        layer = layers_of(model)[name]
        assert each.dtype == {"e4m3": "float8_e4m3fn", "e5m2": "float8_e5m2"}[fmt]
        assert each.kernel == layer.kernel_name
        expected = 8 + 32 * (scales or layer.out_features) / (layer.in_features * layer.out_features)
        assert each.stored_bits_per_weight == pytest.approx(expected)


def test_layers_that_do_not_fit_stay_and_are_named():
    model = narrow_llama()
    context = make_context(model)
    model = METHOD.transform(model, Fp8Options(), context)
    assert len(layers_of(model)) == 8
    left = [name for name, _ in block_linears(model)]
    assert left == [f"model.layers.{i}.mlp.{n}_proj" for i in (0, 1) for n in ("gate", "up", "down")]
    (record,) = context.records
    assert (record.metric, record.value, record.note) == ("skipped_layers", 6, ", ".join(left))
    with pytest.raises(NotApplicable, match="divisible by 16"):
        METHOD.transform(narrow_llama(), Fp8Options(targets="mlp"), context)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_outliers_cost_it_little(apply, logits, family):
    original = logits(tiny_model(family))

    def planted():
        return inject_outliers(tiny_model(family), k=64.0, channels=4)

    per_tensor = {"w_gran": "per-tensor", "a_gran": "per-tensor-dynamic"}
    ours = logits(apply(METHOD, planted(), **per_tensor))
    int8 = logits(apply(rtn.METHOD, planted(), bits=8, a_bits=8))
    assert rel(ours, original) < 0.5 * rel(int8, original)
    assert rel(ours, original) < 1.5 * rel(logits(apply(METHOD, tiny_model(family), **per_tensor)), original)


def test_an_old_cuda_device_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    model = tiny_model("llama")
    context = make_context(model)
    context.device = torch.device("cuda")
    with pytest.raises(NotApplicable, match=r"8\.9 or newer .* has 8\.0"):
        METHOD.transform(model, Fp8Options(), context)
    assert not layers_of(model)


def test_chains_are_checked_before_anything_is_loaded(apply):
    info = info_from_config(tiny_model("llama").config, "tiny")
    methods = {"fp8": METHOD, "rtn": rtn.METHOD}
    assert "no full-precision layer" in refusal(parse_chain("rtn+fp8", methods), info, "cpu").reason
    assert "no full-precision layer" in refusal(parse_chain("fp8+rtn", methods), info, "cpu").reason
    assert refusal(parse_chain("fp8:targets=mlp+rtn", methods), info, "cpu") is None
    with pytest.raises(NotApplicable, match="quantized already"):
        apply(METHOD, apply(METHOD, tiny_model("llama")))


def test_weights_that_are_no_numbers_name_the_layer(apply):
    model = tiny_model("llama")
    model.model.layers[1].mlp.down_proj.weight.data[3, 3] = float("nan")
    with pytest.raises(NumericalFailure, match=r"layers\.1\.mlp\.down_proj: .*NaN"):
        apply(METHOD, model)


@pytest.mark.parametrize("values", [{"fmt": "e3m4"}, {"w_gran": "per-group"}, {"a_gran": "static"}])
def test_options_that_make_no_sense(values):
    with pytest.raises(ConfigError, match=next(iter(values))):
        METHOD.options.parse(values)


def test_what_it_needs_and_where_it_fits():
    assert METHOD.needs_of(Fp8Options()) == frozenset()
    assert METHOD.needs_of(Fp8Options(a_gran="per-tensor-static")) == {"calibration"}
    scratch = info_from_config(tiny_model("llama").config, "scratch:tiny", scratch=True)
    assert "trained after the transform" in fp8.applies(scratch, Fp8Options())


# --- after 2:4 -----------------------------------------------------------------------------------


def pruned(family: str):
    """A tiny model whose weights are 2:4, still dense."""
    model = tiny_model(family)
    context = make_context(model)
    context.last_in_chain = False
    return nm_prune.METHOD.transform(model, nm_prune.METHOD.options.parse({}, method="nm-prune"), context)


def apply_to(model, **values):
    context = make_context(model)
    made = METHOD.transform(model, Fp8Options.parse(values, method="fp8"), context).eval()
    return made, {record.metric: record for record in context.records}


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_2_of_4_weights_are_stored_as_such_and_compute_the_same(family):
    (sparse, records), (dense, _) = apply_to(pruned(family), sparse=True), apply_to(pruned(family))
    assert records["layers_left_dense"].value == 0
    tokens = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(0))
    assert torch.equal(sparse(tokens).logits, dense(tokens).logits)
    layers = {name: layer for name, layer in dense.named_modules() if isinstance(layer, Fp8Linear)}
    assert layers
    for name, layer in layers.items():
        other = sparse.get_submodule(name)
        assert isinstance(other, SparseFp8Linear)
        assert other.values.numel() * 2 == layer.codes.numel()
        assert not other.simulated


def test_layers_that_are_not_2_of_4_stay_dense_and_are_named():
    model = pruned("llama")
    left = model.model.layers[0].mlp.up_proj
    left.weight.data.fill_(0.5)
    made, records = apply_to(model, sparse=True)
    assert records["layers_left_dense"].value == 1
    assert records["layers_left_dense"].note == "model.layers.0.mlp.up_proj (its weights are not 2:4)"
    assert type(made.model.layers[0].mlp.up_proj) is Fp8Linear
    assert type(made.model.layers[0].mlp.gate_proj) is SparseFp8Linear


def test_a_model_without_2_of_4_weights_is_refused():
    with pytest.raises(NotApplicable, match=r"q_proj: its weights are not 2:4\); put nm-prune"):
        apply_to(tiny_model("llama"), sparse=True)


@pytest.mark.parametrize(
    "bad", [{"fmt": "e5m2"}, {"w_gran": "per-tensor"}, {"a_gran": "per-tensor-dynamic"}], ids=str
)
def test_only_the_form_that_has_a_kernel_is_stored_2_of_4(bad):
    with pytest.raises(ConfigError, match="sparse=true needs fmt=e4m3"):
        Fp8Options.parse({"sparse": True, **bad}, method="fp8")
