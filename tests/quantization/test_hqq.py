"""HQQ: its zero points against rounding and against the best there are, storage, errors."""

from __future__ import annotations

import io

import pytest
import torch
from harness_plugins.quantization.hqq import METHOD, hqq_quantize

from harness.errors import ConfigError, NotApplicable, NumericalFailure
from harness.measure.effect import measure_effect, snapshot
from harness.models.info import info_from_config
from harness.nn.quantized import QuantizedLinear
from harness.nn.quantizer import quantize_weight
from harness.nn.surgery import block_linears
from harness.testing.making import make_context
from harness.testing.models import tiny_model


def student(out: int = 256, columns: int = 1024) -> torch.Tensor:
    """Student's t with four degrees of freedom."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(out, columns, generator=generator)
    chi = torch.randn(4, out, columns, generator=generator).square().mean(0)
    return normal / chi.sqrt()


def relative(found: torch.Tensor, original: torch.Tensor) -> float:
    return float((found - original).norm() / original.norm())


def layers(model) -> dict[str, QuantizedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def written_out(group: torch.Tensor, scale: float, bits: int, iters: int) -> float:
    """The zero point of one group, step by step from the definition (p = .7, beta = 10, kappa = 1.01)."""
    top, beta = 2**bits - 1, 10.0

    def codes(z: float) -> torch.Tensor:
        return torch.round(group / scale + z).clamp(0, top)

    def error(z: float) -> float:
        return float((group - scale * (codes(z) - z)).abs().mean())

    def stored(z: float) -> float:
        return float(torch.tensor(z).half())

    candidates = [float(torch.round(-group.min().clamp(max=0) / scale))]  # rounding to nearest
    z = stored(float(-group.min().clamp(max=0) / scale))
    candidates.append(z)
    for _ in range(iters):
        q = codes(z)
        residual = group - scale * (q - z)
        e = residual.sign() * torch.relu(residual.abs() - residual.abs().pow(0.7 - 1) / beta)
        z = stored(float((q - (group - e) / scale).mean()))
        candidates.append(z)
        beta *= 1.01
    return min(candidates, key=error)


@pytest.mark.parametrize("bits", [4, 2])
@pytest.mark.parametrize("size", [1.0, 0.02])
def test_the_zero_points_are_those_of_the_definition(bits, size):
    original = student(4, 128) * size
    weight = hqq_quantize(original, bits=bits, iters=20)
    assert weight.zero.dtype == torch.float16
    for row in range(4):
        for group in range(2):
            values = original[row, 64 * group : 64 * (group + 1)]
            scale, zero = float(weight.scale[row, group]), float(weight.zero[row, group])
            assert zero == pytest.approx(written_out(values, scale, bits, 20), abs=0.01)


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("kind", ["student", "gaussian", "one-sided", "large"])
def test_no_group_is_worse_than_rounding(bits, kind):
    original = student(64, 512)
    if kind == "gaussian":
        original = torch.randn(64, 512, generator=torch.Generator().manual_seed(1)) * 0.02
    elif kind == "one-sided":
        original = original.abs() + 3
    elif kind == "large":
        original = original * 1e3
    found = hqq_quantize(original, bits=bits).dequantize()
    rounded = quantize_weight(original, bits=bits, group_size=64, sym=False).dequantize()
    mean = [(each - original).abs().view(64, 8, 64).mean(-1) for each in (found, rounded)]
    assert bool((mean[0] <= mean[1] * (1 + 1e-5)).all())


@pytest.mark.parametrize(("bits", "most"), [(4, 0.98), (3, 0.97), (2, 0.99)])
def test_heavy_tails_lose_less(bits, most):
    """Measured .937 / .948 / .982 of rounding's error at 4 / 3 / 2 bits.

    With the scale fixed by the range, the best zero points there are (searched below) reach .922, .927
    and .962: at 2 bits a ratio of .92 does not exist.
    """
    original = student()
    rounded = quantize_weight(original, bits=bits, group_size=64, sym=False)
    weight = hqq_quantize(original, bits=bits)
    ratio = relative(weight.dequantize(), original) / relative(rounded.dequantize(), original)
    scale, groups = weight.scale.float()[:, :, None], original.view(256, -1, 64)
    best = torch.full(scale.shape, float("inf"))
    for zero in torch.linspace(-1, 2**bits, 200):
        codes = torch.round(groups / scale + zero).clamp(0, 2**bits - 1)
        best = torch.minimum(best, (groups - scale * (codes - zero)).square().sum(-1, keepdim=True))
    optimum = float(best.sum().sqrt() / (rounded.dequantize() - original).norm())
    assert optimum <= ratio <= most


def test_without_iterations_it_is_rounding():
    original = student(16, 128)
    found = hqq_quantize(original, bits=3, iters=0)
    assert torch.equal(
        found.dequantize(), quantize_weight(original, bits=3, group_size=64, sym=False).dequantize()
    )


def test_zeros_and_constants():
    original = torch.zeros(3, 64)
    original[1], original[2] = 0.7, -5.0
    found = hqq_quantize(original, bits=2).dequantize()
    torch.testing.assert_close(found, original, rtol=2e-3, atol=0)


# --- what is stored ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "group_size"), [(4, 64), (3, 64), (2, 16), (8, 64)])
def test_stored_bits_are_codes_scale_and_zero(bits, group_size):
    model = tiny_model("opt")
    before = snapshot(model)
    options = METHOD.options.parse({"bits": bits, "group_size": group_size})
    effect = measure_effect(before, METHOD.transform(model, options, make_context(model)))
    entries = [entry for entry in effect.effects if entry.kind == "QuantizedLinear"]
    assert len(entries) == 12
    for entry in entries:
        assert entry.stored_bits_per_weight == pytest.approx(bits + 32 / group_size)
        assert entry.kernel == "dequantize+matmul"
        assert not entry.simulated


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "bert", "encoder"])
def test_the_whole_model_computes_with_those_weights(apply, weights, logits, family):
    before = weights(tiny_model(family))
    quantized, dense = apply(METHOD, tiny_model(family), bits=3), tiny_model(family)
    assert layers(quantized).keys() == before.keys()
    for name, linear in block_linears(dense):
        linear.weight.data = hqq_quantize(before[name], bits=3).dequantize()
        assert torch.equal(layers(quantized)[name].dequantize(), linear.weight.data)
    torch.testing.assert_close(logits(quantized), logits(dense), rtol=1e-4, atol=1e-5)


def test_zero_points_survive_saving_and_a_change_of_type():
    layer = QuantizedLinear.from_weight(hqq_quantize(student(40, 192), bits=3))
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    empty = QuantizedLinear(192, 40, bits=3, group_size=64, zero_dtype=torch.float16)
    empty.load_state_dict(torch.load(file))
    x = torch.randn(5, 192)
    assert torch.equal(empty(x), layer(x))
    before = layer.dequantize()
    layer = layer.to(torch.bfloat16)
    assert layer.zeros.dtype == torch.float16
    assert torch.equal(layer.dequantize(), before)
    assert "zeros=float16" in repr(layer)


# --- what it refuses ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bits": 5}, "bits"),
        ({"group_size": 0}, "a group has columns"),
        ({"group_size": -2}, "group_size"),
        ({"p": 0}, "p:"),
        ({"beta": 0}, "beta"),
        ({"kappa": 0.9}, "kappa"),
        ({"iters": -1}, "iters"),
    ],
)
def test_options_that_make_no_sense(values, message):
    with pytest.raises(ConfigError, match=message):
        METHOD.options.parse(values)


def test_what_does_not_fit(apply):
    info = info_from_config(tiny_model("llama").config, "tiny")
    assert METHOD.applies(info, METHOD.options.parse({})) is None
    assert "does not divide" in METHOD.applies(info, METHOD.options.parse({"group_size": 96}))
    with pytest.raises(NotApplicable, match="96 does not divide the 128 columns"):
        apply(METHOD, tiny_model("llama"), group_size=96)
    padded = layers(apply(METHOD, tiny_model("llama"), group_size=96, ragged="pad"))
    original = dict(block_linears(tiny_model("llama")))["model.layers.0.mlp.down_proj"].weight
    expected = hqq_quantize(original, group_size=96).dequantize()
    assert torch.equal(padded["model.layers.0.mlp.down_proj"].dequantize(), expected)
    per_row = layers(apply(METHOD, tiny_model("llama"), group_size=-1))
    assert {layer.scales.shape[0] for layer in per_row.values()} == {1}


def test_nan_weights_name_the_layer(apply):
    model = tiny_model("llama")
    model.model.layers[1].self_attn.o_proj.weight.data[3, 3] = float("nan")
    with pytest.raises(NumericalFailure, match=r"layers\.1\.self_attn\.o_proj: .*NaN"):
        apply(METHOD, model)


def test_a_quantized_model_is_refused(apply):
    with pytest.raises(NotApplicable, match="quantized already"):
        apply(METHOD, apply(METHOD, tiny_model("llama")))
