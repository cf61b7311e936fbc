"""Round-to-nearest: options, layers, storage, errors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from harness_plugins.quantization import gobo, gptq, smoothquant
from harness_plugins.quantization.rtn import METHOD, RtnOptions
from harness_plugins.sparsity import nm_prune

from harness.chain import parse_chain
from harness.errors import ConfigError, NotApplicable, NumericalFailure
from harness.measure.effect import measure_effect, snapshot
from harness.models.info import info_from_config
from harness.nn.codebook_embedding import CodebookEmbedding
from harness.nn.quantized import Int8Linear, QuantizedLinear
from harness.nn.quantizer import quantize_activation, quantize_weight
from harness.nn.rounded_input import RoundedInputLinear
from harness.nn.sparse_8_bit import SparseInt8Linear
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
        "rtn:bits=16:a_bits=8",
        "rtn:bits=16:a_bits=8:a_gran=per-tensor-dynamic",
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
        ({"bits": 16}, "bits=16 and a_bits=16 change nothing"),
        ({"bits": 16, "a_bits": 16}, "bits=16 and a_bits=16 change nothing"),
        (
            {"bits": 16, "a_bits": 8, "group_size": 64},
            "bits=16 leaves the weights as they are, so group_size",
        ),
        ({"bits": 16, "a_bits": 8, "sym": False}, "bits=16 leaves the weights as they are, so sym"),
        ({"bits": 8, "a_bits": 8, "group_size": 64}, "cannot leave an integer product"),
        ({"bits": 8, "a_bits": 8, "sym": False}, "a_bits=8 needs bits=8, sym=true"),
        ({"bits": 8, "a_gran": "per-tensor-static"}, "needs a_bits=8"),
        ({"bits": 8, "a_bits": 8, "calib_method": "mse"}, "needs a_gran=per-tensor-static"),
        ({"bitz": 4}, "unknown option 'bitz'; did you mean 'bits'"),
        ({"targets": "mlp("}, "targets: is no regular expression .*, not 'mlp\\('"),
    ],
)
def test_options_that_make_no_sense(values, message):
    with pytest.raises(ConfigError, match=message):
        options(**values)


@pytest.mark.parametrize("values", [{"bits": 8}, {"bits": 16, "a_bits": 8}, {"group_size": -1}, {"bits": 3}])
@pytest.mark.parametrize("spelling", [float, str], ids=["8.0", "'8'"])
def test_what_is_implied_does_not_depend_on_the_spelling_of_a_number(values, spelling):
    assert options(**{name: spelling(value) for name, value in values.items()}) == options(**values)


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
    wide = replace(info, head_size=24)  # 4 heads of 24, as Qwen3 and Gemma give them a size of their own
    assert "does not divide the attention width 96" in METHOD.applies(wide, options(group_size=64))
    assert METHOD.applies(wide, options(group_size=32)) is None


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


def test_a_head_beside_a_packed_embedding(apply, logits):
    model = tiny_model("llama")
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())  # untied
    packed = apply(gobo.METHOD, model, last_in_chain=False, embeddings=True, targets=r"\.0\.")
    model = apply(METHOD, packed, include_lm_head=True, bits=8)
    assert isinstance(model.lm_head, QuantizedLinear)
    assert isinstance(model.get_input_embeddings(), CodebookEmbedding)
    assert bool(torch.isfinite(logits(model)).all())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("a_gran", ["per-token", "per-tensor-dynamic", "per-tensor-static"])
def test_activations_only(apply, logits, weights, family, a_gran):
    model = tiny_model(family)
    original, before = logits(model), weights(model)
    model = apply(METHOD, model, bits=16, a_bits=8, a_gran=a_gran)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, RoundedInputLinear)}
    assert layers.keys() == before.keys()
    assert all(torch.equal(layer.weight, before[name]) for name, layer in layers.items())
    assert 0 < float((logits(model) - original).norm() / original.norm()) < 0.1


@pytest.mark.parametrize("a_gran", ["per-token", "per-tensor-dynamic", "per-tensor-static"])
@pytest.mark.parametrize("shape", [(48,), (5, 48), (2, 3, 48), (0, 48)])
def test_activations_only_is_the_product_of_the_rounded_input(a_gran, shape):
    linear = torch.nn.Linear(48, 20)
    given = torch.tensor([0.05]) if a_gran == "per-tensor-static" else None
    layer = RoundedInputLinear.from_linear(linear, a_gran=a_gran, input_scale=given)
    x = torch.randn(shape) * 3
    scale = given
    if scale is None and x.numel():
        scale = (x.abs().amax(-1, keepdim=True) if a_gran == "per-token" else x.abs().amax()) / 127
    rounded = x if scale is None or not x.numel() else torch.round(x / scale).clamp(-127, 127) * scale
    expected = torch.nn.functional.linear(rounded.double(), linear.weight.double(), linear.bias.double())
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)
    empty = RoundedInputLinear(48, 20, a_gran=a_gran, bias=True)
    empty.load_state_dict(layer.state_dict())
    assert torch.equal(empty(x), layer(x))
    assert f"activations={a_gran}" in repr(layer)
    if given is not None:  # it was found in float32, and casting a model does not change the grid
        assert torch.equal(layer.to(torch.bfloat16).input_scale, given)
        assert layer(x.bfloat16()).dtype == torch.bfloat16


def test_the_simulated_form_says_so():
    model = tiny_model("llama")
    before = snapshot(model)
    model = METHOD.transform(model, options(bits=16, a_bits=8), make_context(model))
    effect = measure_effect(before, model)
    changed = [each for each in effect.effects if each.changed]
    assert effect.simulated
    assert {(each.dtype, each.stored_bits_per_weight) for each in changed} == {("float32", 32.0)}
    assert {each.kernel for each in changed} == {"quantize+dequantize+matmul"}
    assert all(each.bytes_after == each.bytes_before for each in changed)
    with pytest.raises(ConfigError, match="per-tensor-static alone"):
        RoundedInputLinear.from_linear(torch.nn.Linear(4, 4), a_gran="per-tensor-static")


def test_a_tied_head_may_have_its_input_rounded(apply, logits):
    model = apply(METHOD, tiny_model("llama"), include_lm_head=True, bits=16, a_bits=8)
    assert isinstance(model.lm_head, RoundedInputLinear)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert bool(torch.isfinite(logits(model)).all())


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_finer_granularities_are_closer(apply, weights, bits, sym):
    """Every granularity of the weights at every width, on weights with heavy tails."""

    def model() -> torch.nn.Module:
        made = tiny_model("llama")
        generator = torch.Generator().manual_seed(0)
        for _, linear in block_linears(made):
            linear.weight.data *= torch.randn(linear.weight.shape[0], 1, generator=generator).exp()
            linear.weight.data *= torch.randn(linear.weight.shape, generator=generator).exp()
        return made

    before, errors = weights(model()), []
    for form in ({"w_gran": "per-tensor"}, {"w_gran": "per-channel"}, {"group_size": 64}, {"group_size": 32}):
        layers = quantized_layers(apply(METHOD, model(), bits=bits, sym=sym, **form))
        squares = [float((layers[name].dequantize() - weight).norm()) ** 2 for name, weight in before.items()]
        errors.append(sum(squares))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0]


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

    model, head = tiny_model("llama"), {"include_lm_head": True, "untie": True}
    context = make_context(model)
    skipped = METHOD.transform(model, options(group_size=256, ragged="skip", **head), context)
    assert isinstance(skipped.lm_head, torch.nn.Linear)  # 128 columns
    (record,) = context.records
    assert (record.value, record.note.split(", ")[-1]) == (13, "lm_head")
    padded = apply(METHOD, tiny_model("llama"), group_size=256, ragged="pad", **head)
    assert isinstance(padded.lm_head, QuantizedLinear)
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


# --- after 2:4 -----------------------------------------------------------------------------------


def pruned_then(family: str, **values):
    """A tiny model, 2:4 and then rounded."""
    model = tiny_model(family)
    context = make_context(model)
    context.last_in_chain = False
    model = nm_prune.METHOD.transform(model, nm_prune.METHOD.options.parse({}, method="nm-prune"), context)
    return METHOD.transform(model, options(bits=8, a_bits=8, **values), make_context(model)).eval()


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_2_of_4_weights_are_stored_as_such_and_compute_the_same(family):
    sparse, dense = pruned_then(family, sparse=True), pruned_then(family)
    kinds = {type(module) for name, module in sparse.named_modules() if name in quantized_layers(dense)}
    assert kinds == {SparseInt8Linear}
    tokens = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(0))
    assert torch.equal(sparse(tokens).logits, dense(tokens).logits)
    for name, layer in quantized_layers(dense).items():
        other = sparse.get_submodule(name)
        assert other.values.numel() * 2 == layer.codes.numel()
        assert not other.simulated


def test_weights_that_are_not_2_of_4_are_refused():
    model = tiny_model("llama")
    with pytest.raises(NotApplicable, match=r"q_proj: its weights are not 2:4\); put nm-prune"):
        METHOD.transform(model, options(bits=8, a_bits=8, sparse=True), make_context(model))


@pytest.mark.parametrize(
    "bad", [{}, {"bits": 8}, {"bits": 8, "a_bits": 8, "a_gran": "per-tensor-dynamic"}], ids=str
)
def test_only_int8_is_stored_2_of_4(bad):
    with pytest.raises(ConfigError, match="sparse=true needs bits=8, a_bits=8"):
        options(sparse=True, **bad)
