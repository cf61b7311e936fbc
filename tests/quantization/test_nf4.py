"""NF4: its levels, what it loses on Gaussian weights, double quantization, adapters, errors."""

from __future__ import annotations

import pytest
import torch
from harness_plugins.quantization.nf4 import METHOD, nf4_levels, nf4_quantize

from harness.errors import ConfigError, NotApplicable, NumericalFailure
from harness.measure.effect import measure_effect, snapshot
from harness.models.info import info_from_config
from harness.nn.codebook import CodebookLinear
from harness.nn.codebook_weight import nearest_codes
from harness.nn.lora import LoraLinear
from harness.nn.quantizer import quantize_weight
from harness.nn.surgery import block_linears
from harness.testing.making import make_context
from harness.testing.models import tiny_model

LEVELS = [
    -1, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0,
    0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1,
]  # fmt: skip
FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def gaussian(out: int = 512, columns: int = 1024) -> torch.Tensor:
    return torch.randn(out, columns, generator=torch.Generator().manual_seed(0))


def relative(found: torch.Tensor, original: torch.Tensor) -> float:
    return float((found - original).norm() / original.norm())


def layers(model, kind=CodebookLinear):
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


def test_the_levels_are_those_of_the_paper():
    levels = nf4_levels()
    assert levels.dtype == torch.float32
    torch.testing.assert_close(levels, torch.tensor(LEVELS), rtol=0, atol=1e-4)
    assert levels[7] == 0
    assert levels[0] == -1
    assert levels[15] == 1


def test_every_weight_takes_the_nearest_level():
    original = gaussian(16, 128)
    weight = nf4_quantize(original, double_quant=False)
    groups = original.view(16, 2, 64)
    peaks = groups.abs().amax(-1, keepdim=True)
    brute_force = (groups[..., None] / peaks[..., None] - torch.tensor(LEVELS)).abs().argmin(-1)
    assert float((brute_force.flatten(1) == weight.codes).float().mean()) > 0.999  # LEVELS have 4 digits
    expected = nf4_levels()[weight.codes.int()].view(16, 2, 64) * peaks
    torch.testing.assert_close(weight.dequantize(), expected.flatten(1), rtol=1e-6, atol=0)


def test_what_gaussian_weights_lose():
    """Measured .0920; symmetric int4 .1077, FP4 .1057, asymmetric int4 .0911: a tie, no gain over that."""
    original = gaussian()
    normal_float = relative(nf4_quantize(original, double_quant=False).dequantize(), original)
    integer = {
        sym: relative(quantize_weight(original, bits=4, group_size=64, sym=sym).dequantize(), original)
        for sym in (True, False)
    }
    fp4 = torch.tensor(sorted({-v for v in FP4} | set(FP4))) / 6
    grouped = original.view(512, -1, 64)
    peaks = grouped.abs().amax(-1, keepdim=True)
    rounded = fp4[nearest_codes(grouped / peaks, fp4).int()] * peaks
    assert normal_float == pytest.approx(0.0919, abs=1e-3)
    assert integer[True] == pytest.approx(0.1077, abs=1e-3)
    assert relative(rounded.view_as(original), original) == pytest.approx(0.1057, abs=1e-3)
    assert normal_float < 0.9 * integer[True]
    assert normal_float == pytest.approx(integer[False], rel=0.02)


@pytest.mark.parametrize("kind", ["gaussian", "student"])
def test_scales_in_8_bits_cost_next_to_nothing(kind):
    """Measured -3e-6 on Gaussian weights, 7e-5 on Student's t with four degrees of freedom."""
    original = gaussian()
    if kind == "student":
        chi = sum(gaussian().roll(shift, 1).square() for shift in (7, 99, 311, 500)) / 4
        original = original / chi.sqrt()
    plain, packed = (
        relative(nf4_quantize(original, double_quant=double).dequantize(), original)
        for double in (False, True)
    )
    assert packed - plain <= 1e-4


@pytest.mark.parametrize("double_quant", [True, False])
def test_zeros_and_constants(double_quant):
    original = torch.zeros(4, 128)
    original[1, :64] = 0.25
    original[2] = torch.linspace(-1, 1, 128)
    found = nf4_quantize(original, double_quant=double_quant).dequantize()
    assert bool(torch.isfinite(found).all())
    assert torch.equal(found[[0, 3]], original[[0, 3]])
    torch.testing.assert_close(found[1], original[1], rtol=0, atol=0.005)


@pytest.mark.parametrize(("double_quant", "expected"), [(True, 4 + 8 / 64 + 32 / (64 * 256)), (False, 4.5)])
def test_bits_per_weight_as_measured(double_quant, expected):
    model = tiny_model("llama")
    before = snapshot(model)
    options = METHOD.options.parse({"double_quant": double_quant})
    effect = measure_effect(before, METHOD.transform(model, options, make_context(model)))
    entries = [entry for entry in effect.effects if entry.kind == "CodebookLinear"]
    assert len(entries) == 14
    for entry in entries:
        small = 32 * (16 + double_quant) / entry.parameters  # the table and the mean, once a layer
        assert entry.stored_bits_per_weight == pytest.approx(expected + small, rel=1e-3)
        assert not entry.simulated


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "bert", "encoder"])
def test_the_whole_model_computes_with_the_levels(apply, weights, logits, family):
    before = weights(tiny_model(family))
    quantized, dense = apply(METHOD, tiny_model(family)), tiny_model(family)
    assert layers(quantized).keys() == before.keys()
    for name, linear in block_linears(dense):
        linear.weight.data = nf4_quantize(before[name]).dequantize()
    torch.testing.assert_close(logits(quantized), logits(dense), rtol=1e-4, atol=1e-5)


# --- adapters ----------------------------------------------------------------------------------------


def test_adapters_change_nothing_before_they_are_trained(apply, logits):
    plain = apply(METHOD, tiny_model("llama"))
    adapted = apply(METHOD, tiny_model("llama"), lora_r=8, steps=0)
    assert len(layers(adapted, LoraLinear)) == 14
    assert torch.equal(logits(adapted), logits(plain))


def test_training_moves_the_adapters_alone():
    tokens = torch.arange(4000) % 7  # easy to learn
    model = tiny_model("llama")
    context = make_context(model, tokens=tokens)
    frozen = {name: value.clone() for name, value in model.state_dict().items() if "proj" not in name}
    options = METHOD.options.parse({"lora_r": 4, "steps": 20, "lr": 1e-2})
    model = METHOD.transform(model, options, context)
    untrained = METHOD.transform(
        tiny_model("llama"),
        METHOD.options.parse({"lora_r": 4, "steps": 0}),
        make_context(tiny_model("llama")),
    )
    found, start = model.state_dict(), untrained.state_dict()
    for name, value in found.items():
        moved = not torch.equal(value, start[name])
        assert moved == name.endswith(("lora_a", "lora_b")), name
    assert all(torch.equal(found[name], value) for name, value in frozen.items())
    assert context.trained_steps == 20

    @torch.no_grad()
    def loss(each) -> float:
        return float(each(input_ids=tokens[None, :64], labels=tokens[None, :64]).loss)

    assert loss(model) < loss(untrained) - 0.5


def test_the_effect_counts_the_adapters():
    model = tiny_model("llama")
    before = snapshot(model)
    options = METHOD.options.parse({"lora_r": 2, "steps": 0})
    effect = measure_effect(before, METHOD.transform(model, options, make_context(model)))
    (entry,) = [entry for entry in effect.effects if entry.module == "model.layers.0.self_attn.q_proj"]
    assert entry.kernel == "gather+matmul+lora"
    expected = 4 + 8 / 64 + 32 / (64 * 256) + 32 * (16 + 1 + 2 * 256) / 128**2
    assert entry.stored_bits_per_weight == pytest.approx(expected, rel=1e-6)


def test_training_is_needed_for_adapters_only():
    parse = METHOD.options.parse
    assert METHOD.needs_of(parse({})) == frozenset()
    assert METHOD.needs_of(parse({"lora_r": 8})) == {"training"}
    assert METHOD.needs_of(parse({"lora_r": 8, "steps": 0})) == frozenset()


# --- what it refuses ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [({"group_size": 0}, "group_size"), ({"lora_r": -1}, "lora_r"), ({"steps": 5}, "give lora_r")],
)
def test_options_that_make_no_sense(values, message):
    with pytest.raises(ConfigError, match=message):
        METHOD.options.parse(values)
    assert METHOD.options.parse({"blocksize": 32}).group_size == 32


def test_what_does_not_fit_is_said_before_loading():
    info = info_from_config(tiny_model("encoder").config, "tiny")
    parse = METHOD.options.parse
    assert METHOD.applies(info, parse({})) is None
    assert "no training objective" in METHOD.applies(info, parse({"lora_r": 4}))
    assert "does not divide the hidden size 128" in METHOD.applies(info, parse({"group_size": 96}))
    assert METHOD.applies(info, parse({"group_size": 96, "ragged": "pad"})) is None


def test_layers_that_do_not_divide(apply):
    with pytest.raises(NotApplicable, match="96 does not divide the 128 columns"):
        apply(METHOD, tiny_model("llama"), group_size=96)
    padded = layers(apply(METHOD, tiny_model("llama"), group_size=96, ragged="pad"))
    original = dict(block_linears(tiny_model("llama")))["model.layers.0.mlp.down_proj"].weight
    expected = nf4_quantize(original, group_size=96).dequantize()
    assert torch.equal(padded["model.layers.0.mlp.down_proj"].dense_weight(), expected)
    assert len(layers(apply(METHOD, tiny_model("llama"), group_size=256, ragged="skip"))) == 2


def test_nan_weights_name_the_layer(apply):
    model = tiny_model("llama")
    model.model.layers[1].self_attn.o_proj.weight.data[3, 3] = float("inf")
    with pytest.raises(NumericalFailure, match=r"layers\.1\.self_attn\.o_proj: .*infinite"):
        apply(METHOD, model)


def test_a_quantized_model_is_refused(apply):
    with pytest.raises(NotApplicable, match="quantized already"):
        apply(METHOD, apply(METHOD, tiny_model("llama")))
