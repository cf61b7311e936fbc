"""Round-to-nearest: options, layers, storage, errors."""

from __future__ import annotations

import pytest
import torch
from harness_plugins.quantization import gptq, smoothquant
from harness_plugins.quantization.rtn import METHOD, RtnOptions

from harness.chain import parse_chain
from harness.errors import ConfigError, NotApplicable, NumericalFailure
from harness.models.info import info_from_config
from harness.nn.quantized import Int8Linear, QuantizedLinear
from harness.nn.quantizer import quantize_activation, quantize_weight
from harness.nn.surgery import block_linears
from harness.testing.making import make_context
from harness.testing.models import tiny_model

FAMILIES = ["llama", "opt", "gpt2", "bert", "encoder"]


def options(**values) -> RtnOptions:
    return METHOD.options.parse(values, method="rtn")


def quantized_layers(model) -> dict[str, torch.nn.Module]:
    kinds = (QuantizedLinear, Int8Linear)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


# --- options -------------------------------------------------------------------------------------


def test_defaults_follow_from_the_bits():
    assert options().canonical() == options(bits=4, group_size=128, sym=False, w_gran="per-group").canonical()
    eight = options(bits=8)
    assert (eight.group_size, eight.sym, eight.w_gran, eight.a_bits) == (-1, True, "per-channel", 16)
    three = options(bits=3, group_size=-1)
    assert (three.w_gran, three.sym) == ("per-channel", False)
    assert options(bits=8, group_size=64).w_gran == "per-group"
    assert options(w_gran="per-tensor").group_size == -1
    assert options(w_bits="4", group="64").group_size == 64


@pytest.mark.parametrize(
    "label",
    [
        "rtn",
        "rtn:bits=3",
        "rtn:bits=8",
        "rtn:bits=8:a_bits=8",
        "rtn:bits=4:group_size=64",
        "rtn:bits=4:group_size=-1:sym=true",
        "rtn:bits=8:a_bits=8:w_gran=per-tensor:a_gran=per-tensor-static:calib_method=mse",
        "rtn:group_size=-1:w_gran=per-tensor",
    ],
)
def test_labels_leave_out_what_is_implied(label):
    methods = {"rtn": METHOD}
    chain = parse_chain(label, methods)
    written = chain.label
    assert parse_chain(written, methods).identity() == chain.identity()
    assert len(written) <= len(label)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bits": 5}, "bits"),
        ({"bits": 1}, "bits"),
        ({"group_size": 0}, "contradict"),
        ({"group_size": -2}, "group_size"),
        ({"w_gran": "per-tensor", "group_size": 64}, "contradict"),
        ({"a_bits": 8}, "a_bits=8 needs bits=8"),
        ({"bits": 8, "a_bits": 8, "group_size": 64}, "cannot leave an integer product"),
        ({"bits": 8, "a_bits": 8, "sym": False}, "a_bits=8 needs bits=8, sym=true"),
        ({"bits": 8, "a_gran": "per-tensor-static"}, "needs a_bits=8"),
        ({"bits": 8, "a_bits": 8, "calib_method": "mse"}, "needs a_gran=per-tensor-static"),
        ({"bitz": 4}, "unknown option 'bitz'; did you mean 'bits'"),
    ],
)
def test_options_that_make_no_sense(values, message):
    with pytest.raises(ConfigError, match=message):
        options(**values)


def test_needs_calibration_only_for_static_scales():
    assert METHOD.needs_of(options(bits=8, a_bits=8)) == frozenset()
    assert METHOD.needs_of(options(bits=8, a_bits=8, a_gran="per-tensor-static")) == {"calibration"}


# --- what can be said before loading --------------------------------------------------------------


def test_the_group_size_must_divide_the_widths():
    info = info_from_config(tiny_model("llama").config, "tiny")  # 128 wide, FFN 256
    assert METHOD.applies(info, options()) is None
    assert "256" not in (METHOD.applies(info, options(group_size=96)) or "")
    assert "does not divide the hidden size 128" in METHOD.applies(info, options(group_size=96))
    assert "does not divide the hidden size 128" in METHOD.applies(info, options(group_size=256))
    assert METHOD.applies(info, options(group_size=96, ragged="pad")) is None
    assert METHOD.applies(info, options(bits=8)) is None


@pytest.mark.parametrize("method", [METHOD, gptq.METHOD, smoothquant.METHOD], ids=lambda method: method.name)
def test_untrained_models_are_for_training(method):
    info = info_from_config(tiny_model("llama").config, "scratch:tiny", scratch=True)
    assert "trained after the transform" in method.applies(info, method.options.parse({}))


def test_a_tied_head_stays():
    info = info_from_config(tiny_model("llama").config, "tiny")
    assert "shares its weight" in METHOD.applies(info, options(include_lm_head=True))
    assert METHOD.applies(info, options(include_lm_head=True, untie=True)) is None


# --- what it does ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "values",
    [{}, {"bits": 3, "group_size": 64}, {"bits": 2, "group_size": -1}, {"bits": 8}],
)
def test_every_block_linear_is_replaced_by_its_rounding(apply, weights, family, values):
    model = tiny_model(family)
    before, parsed = weights(model), options(**values)
    model = apply(METHOD, model, **values)
    after = quantized_layers(model)
    assert after.keys() == before.keys()
    for name, layer in after.items():
        expected = quantize_weight(
            before[name], bits=parsed.bits, group_size=parsed.group_size, sym=parsed.sym
        )
        assert torch.equal(layer.dequantize(), expected.dequantize()), name


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_the_whole_model_computes_with_the_rounded_weights(apply, logits, family):
    quantized = apply(METHOD, tiny_model(family), bits=4)
    dense = tiny_model(family)
    for name, linear in block_linears(dense):
        linear.weight.data = quantized.get_submodule(name).dequantize()
    torch.testing.assert_close(logits(quantized), logits(dense), rtol=1e-4, atol=1e-5)


def test_bytes_shrink_to_the_formula(apply):
    model = apply(METHOD, tiny_model("llama"), bits=4)
    layers = quantized_layers(model).values()
    held = sum(t.numel() * t.element_size() for layer in layers for t in layer.state_dict().values())
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    assert held * 8 / weights == pytest.approx(4 + (16 + 4) / 128, rel=0.01)


@pytest.mark.parametrize("a_gran", ["per-token", "per-tensor-dynamic"])
@pytest.mark.parametrize("w_gran", ["per-channel", "per-tensor"])
def test_w8a8_layers(apply, logits, a_gran, w_gran):
    original = logits(tiny_model("llama"))
    model = apply(METHOD, tiny_model("llama"), bits=8, a_bits=8, a_gran=a_gran, w_gran=w_gran)
    layers = quantized_layers(model)
    assert {type(layer) for layer in layers.values()} == {Int8Linear}
    assert {layer.a_gran for layer in layers.values()} == {a_gran}
    assert {layer.scales.numel() == 1 for layer in layers.values()} == {w_gran == "per-tensor"}
    assert float((logits(model) - original).norm() / original.norm()) < 0.1


def test_static_scales_are_those_of_the_calibration_tokens():
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
    parsed = options(bits=8, a_bits=8, a_gran="per-tensor-static")
    model = METHOD.transform(model, parsed, context)
    for name, layer in quantized_layers(model).items():
        assert float(layer.input_scale) == pytest.approx(seen[name] / 127, rel=1e-5), name


@pytest.mark.parametrize("calib_method", ["percentile", "mse"])
def test_static_scales_may_clip(apply, calib_method):
    static = {"bits": 8, "a_bits": 8, "a_gran": "per-tensor-static"}
    peak = quantized_layers(apply(METHOD, tiny_model("opt"), **static))
    clipped = quantized_layers(apply(METHOD, tiny_model("opt"), **static, calib_method=calib_method))
    ratios = [float(clipped[name].input_scale / peak[name].input_scale) for name in peak]
    assert max(ratios) <= 1 + 1e-4
    assert min(ratios) < 0.95


def test_targets_are_part_of_the_full_name(apply):
    model = apply(METHOD, tiny_model("llama"), targets=r"layers\.1\.mlp")
    assert sorted(quantized_layers(model)) == [
        f"model.layers.1.mlp.{name}_proj" for name in ("down", "gate", "up")
    ]
    with pytest.raises(ConfigError, match="matches no linear layer"):
        apply(METHOD, tiny_model("llama"), targets="nothing")


def test_the_head_on_request(apply, logits):
    model = apply(METHOD, tiny_model("llama"), include_lm_head=True, untie=True, bits=8)
    assert isinstance(model.lm_head, QuantizedLinear)
    assert isinstance(model.get_input_embeddings(), torch.nn.Embedding)
    assert bool(torch.isfinite(logits(model)).all())
    with pytest.raises(NotApplicable, match="shares its weight"):
        apply(METHOD, tiny_model("llama"), include_lm_head=True, bits=8)
    with pytest.raises(NotApplicable, match="no linear output head"):
        apply(METHOD, tiny_model("encoder"), include_lm_head=True, untie=True, bits=8)


# --- what it refuses ------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [{}, {"bits": 8}, {"bits": 8, "a_bits": 8}])
def test_a_quantized_model_is_refused(apply, values):
    model = apply(METHOD, tiny_model("llama"))
    with pytest.raises(NotApplicable, match="quantized already"):
        apply(METHOD, model, **values)


def test_a_group_size_that_does_not_fit_names_the_layer(apply):
    with pytest.raises(
        NotApplicable, match=r"96 does not divide the 128 columns of model.*q_proj \[128, 128\]"
    ):
        apply(METHOD, tiny_model("llama"), group_size=96)


def test_ragged_layers_are_padded_or_left_out(apply):
    padded = quantized_layers(apply(METHOD, tiny_model("llama"), group_size=96, ragged="pad"))
    assert len(padded) == 14
    weight = dict(block_linears(tiny_model("llama")))["model.layers.0.mlp.down_proj"].weight  # 256 columns
    expected = quantize_weight(weight, bits=4, sym=False, group_size=96, pad=True).dequantize()
    assert torch.equal(padded["model.layers.0.mlp.down_proj"].dequantize(), expected)

    model = tiny_model("llama")
    context = make_context(model)
    skipped = METHOD.transform(model, options(group_size=256, ragged="skip"), context)
    assert sorted(quantized_layers(skipped)) == [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)]
    (record,) = context.records
    assert (record.metric, record.value) == ("skipped_layers", 12)
    with pytest.raises(NotApplicable, match="leaves nothing"):
        apply(METHOD, tiny_model("llama"), group_size=96, ragged="skip")


@pytest.mark.parametrize("values", [{}, {"bits": 8, "a_bits": 8}])
def test_nan_weights_name_the_layer(apply, values):
    model = tiny_model("llama")
    model.model.layers[1].self_attn.o_proj.weight.data[3, 3] = float("nan")
    with pytest.raises(NumericalFailure, match=r"layers\.1\.self_attn\.o_proj: .*NaN"):
        apply(METHOD, model, **values)


def test_outlier_channels_need_a_scale_per_token_at_least():
    """A channel 64 times larger leaves the others few levels; per-token scales only help other tokens."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 256, generator=generator)
    x[:, :2] *= 64
    codes, scale = quantize_activation(x)
    rest = (codes * scale - x)[:, 2:].norm() / x[:, 2:].norm()
    assert float(rest) > 10 * 0.0074  # ten times what it is without outliers
