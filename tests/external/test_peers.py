"""Other libraries' methods: what they store, what they say where they are absent, and what they need."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import nn

from harness import ConfigError, NotApplicable
from harness.measure.effect import measure_effect, snapshot
from harness.models.info import info_from_config
from harness.plugins import load_plugins
from harness.testing import make_context, tiny_model

METHODS = load_plugins().methods
PACKAGES = {
    "torchao": ("torchao", "peers"),
    "bitsandbytes": ("bitsandbytes", "peers"),
    "llm-compressor": ("llmcompressor", "llm-compressor"),
}


def transformed(name, family="llama", dtype=torch.float32, **options):
    method, model = METHODS[name], tiny_model(family).to(dtype)
    before = snapshot(model)
    weights = {n: m.weight.detach().clone() for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    context = make_context(model)
    model = method.transform(model, method.options.parse(options, method=name), context)
    return model, measure_effect(before, model), weights


@torch.no_grad()
def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("name", PACKAGES)
def test_an_absent_library_is_a_reason_with_the_pip_line(name, monkeypatch):
    package, extra = PACKAGES[name]
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == package else find(n))
    method = METHODS[name]
    info = info_from_config(tiny_model("llama").config, "tiny")
    options = method.options.parse({"group_size": 32} if name == "llm-compressor" else {})
    assert method.applies(info, options) == (
        f"{package} is not installed; run: pip install 'transformer-harness[{extra}]'"
    )


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("torchao", {"group_size": 64}, "group_size belongs to scheme=int4"),
        ("torchao", {"scheme": "int4", "group_size": 48}, "32, 64, 128 or 256"),
        ("bitsandbytes", {"scheme": "nf4", "threshold": 5.0}, "threshold belongs to scheme=llm-int8"),
        ("bitsandbytes", {"threshold": -1}, "greater than or equal to 0"),
        ("llm-compressor", {"alpha": 0.7}, "alpha belongs to scheme=smoothquant"),
        ("llm-compressor", {"scheme": "smoothquant", "bits": 8}, "smoothquant is W8A8"),
    ],
)
def test_options_that_contradict_each_other(name, options, words):
    with pytest.raises(ConfigError, match=words):
        METHODS[name].options.parse(options, method=name)


# --- torchao ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["int8-weight-only", "int8-dynamic"])
def test_torchao_stores_rows_of_int8(scheme):
    pytest.importorskip("torchao")
    model, effect, weights = transformed("torchao", scheme=scheme)
    layers = [each for each in effect.effects if each.changed]
    assert len(layers) == 14
    assert not effect.simulated
    for each in layers:
        layer, weight = model.get_submodule(each.module), weights[each.module]
        scale = weight.abs().amax(1, keepdim=True) / 127.5
        expected = (weight / scale).round().clamp(-128, 127) * scale
        assert relative(layer.weight.dequantize(), expected) < 0.005
        # A byte a weight, and a scale (and a zero point, always 0) a row.
        assert 8 <= each.stored_bits_per_weight <= 8 + 8 * 8 / layer.in_features
        assert each.kernel == f"torchao {scheme}"


def test_torchaos_int4_wants_bfloat16_and_says_so():
    pytest.importorskip("torchao")
    with pytest.raises(NotApplicable, match="--dtype bfloat16"):
        transformed("torchao", scheme="int4")


def test_torchao_leaves_no_layer_out_silently():
    pytest.importorskip("torchao")
    with pytest.raises(NotApplicable, match="group_size 256 does not divide the 128 columns"):
        transformed("torchao", scheme="int4", group_size=256, dtype=torch.bfloat16)


# --- bitsandbytes -------------------------------------------------------------------------------------


@torch.no_grad()
def with_outliers():
    torch.manual_seed(0)
    x = torch.randn(64, 256)
    x[:, [3, 77, 200]] *= 60
    return nn.Linear(256, 128), x


@torch.no_grad()
def test_bitsandbytes_int8_stores_rounded_rows():
    pytest.importorskip("bitsandbytes")
    from harness_plugins.external._bitsandbytes import Int8OutlierLinear

    linear, x = with_outliers()
    layer = Int8OutlierLinear(linear, 6.0)
    expected = (linear.weight / (linear.weight.abs().amax(1, keepdim=True) / 127)).round()
    assert int((layer.codes - expected).abs().max()) <= 1  # it rounds in float16
    assert float((layer.codes != expected).float().mean()) < 0.05
    # Without CUDA the library rounds no activation, whatever the threshold, and the layer says so.
    assert layer.kernel_name == "dequantize+matmul"
    assert relative(layer(x), nn.functional.linear(x, layer.dense_weight(), linear.bias)) < 1e-3


@pytest.mark.parametrize("kind", ["Int8OutlierLinear", "Nf4Linear"])
def test_bitsandbytes_scales_keep_their_type_when_a_model_changes_its_own(kind):
    pytest.importorskip("bitsandbytes")
    from harness_plugins.external import _bitsandbytes

    linear = nn.Linear(256, 128)
    layer = getattr(_bitsandbytes, kind)(*((linear, 6.0) if kind == "Int8OutlierLinear" else (linear,)))
    before = layer.dense_weight()
    layer = layer.to(torch.bfloat16)
    assert torch.equal(layer.dense_weight(), before)
    assert layer.bias.dtype == torch.bfloat16


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@torch.no_grad()
def test_bitsandbytes_int8_keeps_outlier_columns_in_16_bit():
    pytest.importorskip("bitsandbytes")
    from harness_plugins.external._bitsandbytes import Int8OutlierLinear

    linear, x = (each.cuda() for each in with_outliers())
    regular = torch.ones(256, dtype=torch.bool, device="cuda")
    regular[[3, 77, 200]] = False
    outliers = nn.functional.linear(x * ~regular, linear.weight)
    exact = nn.functional.linear(x * regular, linear.weight)
    errors = []
    for threshold in (6.0, 0.0):
        layer = Int8OutlierLinear(linear, threshold)
        errors.append(relative(layer(x) - linear.bias - outliers, exact))
    assert errors[1] > 3 * errors[0]


def test_bitsandbytes_nf4_rounds_to_the_normal_levels():
    pytest.importorskip("bitsandbytes")
    model, effect, weights = transformed("bitsandbytes", scheme="nf4")
    quantiles = torch.distributions.Normal(0.0, 1.0).icdf
    positive = quantiles(torch.linspace(0.9677083, 0.5, 9)[:-1])
    negative = -quantiles(torch.linspace(0.9677083, 0.5, 8)[:-1])
    levels = torch.cat([negative, torch.zeros(1), positive]).sort().values / positive.max()
    for each in effect.effects:
        if not each.changed:
            continue
        layer, weight = model.get_submodule(each.module), weights[each.module]
        blocks = weight.reshape(-1, 64)
        peaks = blocks.abs().amax(1, keepdim=True)
        nearest = levels[((blocks / peaks)[..., None] - levels).abs().argmin(-1)] * peaks
        assert relative(layer.dense_weight(), nearest.view_as(weight)) < 0.02  # scales are rounded too
        # 4 bits, an 8-bit scale for 64 weights, a float for 256 scales and an offset a layer.
        theory = 4 + 8 / 64 + 32 * (-(-weight.numel() // 64 // 256) + 1) / weight.numel()
        assert each.stored_bits_per_weight == pytest.approx(theory, rel=0.002)


# --- llm-compressor -----------------------------------------------------------------------------------


def test_llm_compressors_weights_lie_on_grids_and_are_called_simulated():
    pytest.importorskip("llmcompressor")
    model, effect, _ = transformed("llm-compressor", group_size=32)
    assert effect.simulated
    rounded = [model.get_submodule(each.module) for each in effect.effects if each.simulated]
    assert len(rounded) == 14
    for layer in rounded:
        groups = layer.weight.detach().view(layer.out_features, -1, 32)
        steps = groups / layer.weight_scale.detach()[..., None]
        assert torch.allclose(steps, steps.round(), atol=1e-3)
        assert -8 <= float(steps.min().round()) <= float(steps.max().round()) <= 7
