"""LLM.int8() on whole models: what is stored, what is measured, what is refused."""

from __future__ import annotations

import pytest
import torch
from harness_plugins.quantization import gptq, rtn, smoothquant
from harness_plugins.quantization.llm_int8 import METHOD, LlmInt8Options

from harness.chain import parse_chain
from harness.errors import ConfigError, NotApplicable, NumericalFailure
from harness.grid import refusal
from harness.measure.counting import count_records, reset_counters
from harness.measure.effect import measure_effect, snapshot
from harness.models.info import info_from_config
from harness.nn.outlier_int8 import OutlierInt8Linear
from harness.nn.outliers import inject_outliers
from harness.nn.surgery import block_linears
from harness.testing.making import make_context
from harness.testing.models import tiny_model

FAMILIES = ["llama", "opt", "gpt2", "bert", "encoder"]
METHODS = {method.name: method for method in (METHOD, rtn.METHOD, gptq.METHOD, smoothquant.METHOD)}


def layers_of(model) -> dict[str, OutlierInt8Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, OutlierInt8Linear)}


def rel(value: torch.Tensor, expected: torch.Tensor) -> float:
    return float((value - expected).norm() / expected.norm())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_block_linear_is_replaced(apply, logits, weights, family):
    model = tiny_model(family)
    original, before = logits(model), weights(model)
    model = apply(METHOD, model)
    after = layers_of(model)
    assert after.keys() == before.keys()
    assert {layer.threshold for layer in after.values()} == {6.0}
    for name, layer in after.items():
        assert rel(layer.dequantize(), before[name]) < 0.01, name
    assert rel(logits(model), original) < 0.05


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_threshold_that_nothing_reaches_is_w8a8(apply, logits, family):
    ours = logits(apply(METHOD, tiny_model(family), threshold=1e9))
    assert torch.equal(ours, logits(apply(rtn.METHOD, tiny_model(family), bits=8, a_bits=8)))


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
@pytest.mark.parametrize("outlier_weight", ["dequant", "fp16-cached"])
def test_it_repairs_what_outliers_break(apply, logits, family, outlier_weight):
    original = logits(tiny_model(family))

    def planted():
        return inject_outliers(tiny_model(family), k=64.0, channels=4)

    naive = logits(apply(rtn.METHOD, planted(), bits=8, a_bits=8))
    model = apply(METHOD, planted(), outlier_weight=outlier_weight)
    # Planting divides the columns of the weight, which int8 then rounds 64 times as coarsely: recovered
    # from int8, they bring the error of 8-bit weights back, and no more than that.
    exact = original if outlier_weight == "fp16-cached" else logits(apply(rtn.METHOD, planted(), bits=8))
    assert rel(logits(model), exact) <= 0.2 * rel(naive, original)
    reset_counters(model)
    logits(model)
    share, beyond = count_records(model)
    # Four channels of 128 at the inputs of norm-fed layers, none at the others.
    assert 0.005 < share.value < 0.1
    assert beyond.value == 0


@pytest.mark.parametrize("w_scale_over", ["all", "regular"])
def test_columns_that_calibration_finds_are_kept(weights, w_scale_over):
    model = inject_outliers(tiny_model("llama"), k=64.0, channels=4)
    before = weights(model)
    context = make_context(model, calibration_samples=4, calibration_len=32)
    peaks: dict[str, torch.Tensor] = {}
    handles = [
        linear.register_forward_pre_hook(
            lambda _m, args, name=name: peaks.update({name: args[0].abs().flatten(0, -2).amax(0)})
        )
        for name, linear in block_linears(model)
    ]
    with torch.no_grad():
        model(input_ids=context.calibration())
    for handle in handles:
        handle.remove()
    options = LlmInt8Options(outlier_weight="fp16-cached", w_scale_over=w_scale_over)
    model = METHOD.transform(model, options, context)
    first = "model.layers.0.self_attn.q_proj"  # calibrated on the very inputs that were seen above
    layer = layers_of(model)[first]
    columns = (peaks[first] >= 6).nonzero()[:, 0]
    assert len(columns) == 4
    assert (layer.place >= 0).nonzero()[:, 0].tolist() == columns.tolist()
    assert torch.equal(layer.kept, before[first][:, columns].T.half())
    assert bool(layer.codes[:, columns].any()) is (w_scale_over == "all")
    (record,) = context.records
    kept = [0 if each.kept is None else each.kept.shape[0] for each in layers_of(model).values()]
    assert record.metric == "calibration_outlier_column_share"
    assert record.value == pytest.approx(
        sum(kept) / sum(each.in_features for each in layers_of(model).values())
    )
    assert f"most in one layer: {max(kept)}" in record.note


@pytest.mark.parametrize(("values", "bits"), [({}, 8 + 32 / 128), ({"outlier_weight": "fp16-cached"}, None)])
def test_the_effect_is_reported_as_it_is(values, bits):
    model = inject_outliers(tiny_model("llama"), k=64.0, channels=4)
    before = snapshot(model)
    model = METHOD.transform(model, LlmInt8Options(**values), make_context(model))
    effect = measure_effect(before, model)
    assert not effect.simulated
    reported = {each.module: each for each in effect.effects if each.changed}
    assert reported.keys() == layers_of(model).keys()
    for name, each in reported.items():
        layer = layers_of(model)[name]
        kept = 0 if layer.kept is None else layer.kept.shape[0]
        assert (each.dtype, each.kernel) == ("int8", "_int_mm + outlier columns")
        expected = 8 + 32 / layer.out_features * (layer.kept is not None) + 32 / layer.in_features
        expected += 16 * kept / layer.in_features
        counters = 8 * 24 / (layer.in_features * layer.out_features)
        assert each.stored_bits_per_weight == pytest.approx(expected + counters, rel=1e-9)


def test_after_smoothing_hardly_an_outlier_is_left(apply, logits):
    def share(*, smooth: bool) -> float:
        model = inject_outliers(tiny_model("opt"), k=64.0, channels=4)
        if smooth:
            model = apply(smoothquant.METHOD, model, last_in_chain=False)
        model = apply(METHOD, model)
        reset_counters(model)
        logits(model)
        return count_records(model)[0].value

    assert share(smooth=True) < 0.05 * share(smooth=False)


def test_chains_are_checked_before_anything_is_loaded(apply):
    info = info_from_config(tiny_model("llama").config, "tiny")

    def problem(text: str):
        return refusal(parse_chain(text, METHODS), info, "cpu")

    assert problem("smoothquant+llm-int8") is None
    assert problem("rtn:targets=mlp+llm-int8") is None
    for text in ("rtn+llm-int8", "gptq+llm-int8", "llm-int8+rtn", "smoothquant:quantize=true+llm-int8"):
        assert "no full-precision layer is left" in problem(text).reason, text
    with pytest.raises(NotApplicable, match="quantized already"):
        apply(METHOD, apply(METHOD, tiny_model("llama")))


def test_targets_are_part_of_the_full_name(apply):
    model = apply(METHOD, tiny_model("llama"), targets=r"layers\.1\.mlp")
    assert sorted(layers_of(model)) == [f"model.layers.1.mlp.{name}_proj" for name in ("down", "gate", "up")]
    with pytest.raises(ConfigError, match="matches no linear layer"):
        apply(METHOD, tiny_model("llama"), targets="nothing")


@pytest.mark.parametrize("outlier_weight", ["dequant", "fp16-cached"])
def test_weights_that_are_no_numbers_name_the_layer(apply, outlier_weight):
    model = tiny_model("llama")
    model.model.layers[1].mlp.down_proj.weight.data[3, 3] = float("nan")
    with pytest.raises(NumericalFailure, match=r"layers\.1\.mlp\.down_proj: .*NaN"):
        apply(METHOD, model, outlier_weight=outlier_weight)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"threshold": -1}, "threshold: .*greater than or equal to 0"),
        ({"threshold": float("inf")}, "threshold"),
        ({"capacity": 0}, "capacity"),
        ({"outlier_weight": "fp16"}, "outlier_weight"),
        ({"w_scale_over": "regular"}, "needs outlier_weight=fp16-cached"),
        ({"treshold": 5}, "did you mean 'threshold'"),
    ],
)
def test_options_that_make_no_sense(values, message):
    with pytest.raises(ConfigError, match=message):
        METHOD.options.parse(values, method="llm-int8")


def test_what_it_needs_and_where_it_fits():
    assert METHOD.needs_of(LlmInt8Options()) == frozenset()
    assert METHOD.needs_of(LlmInt8Options(outlier_weight="fp16-cached")) == {"calibration"}
    config = tiny_model("llama").config
    assert METHOD.applies(info_from_config(config, "tiny"), LlmInt8Options()) is None
    scratch = info_from_config(config, "scratch:tiny", scratch=True)
    assert "trained after the transform" in METHOD.applies(scratch, LlmInt8Options())
