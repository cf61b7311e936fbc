"""AWQ: both searches against brute force, folds that change nothing, chains, refusals."""

from __future__ import annotations

import copy

import pytest
import torch
from harness_plugins.quantization import gptq, rtn
from harness_plugins.quantization._awq import SiteInputs, activity_scale, clip_weight, search_scale
from harness_plugins.quantization.awq import METHOD, AwqOptions
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from harness.errors import ConfigError, NotApplicable
from harness.models.info import info_from_config
from harness.nn.anatomy import blocks_of
from harness.nn.outliers import inject_outliers
from harness.nn.quantized import QuantizedLinear
from harness.nn.quantizer import quantize_weight
from harness.testing import make_context, tiny_model

FAMILIES = ["llama", "opt", "gpt2"]


def rel_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    return float((value - reference).norm() / reference.norm())


def _inputs(tokens: int = 50, columns: int = 32, *, seed: int = 0) -> torch.Tensor:
    """Activations [tokens, columns] of which a few columns are much larger."""
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed))
    x[:, [3, 17]] *= 20
    return x


def _weight(out: int = 24, columns: int = 32, *, seed: int = 1) -> torch.Tensor:
    return torch.randn(out, columns, generator=torch.Generator().manual_seed(seed))


def _site(x: torch.Tensor) -> SiteInputs:
    return SiteInputs(x.abs().mean(0), x.t() @ x / len(x))


def _grouped_query_llama() -> nn.Module:
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


# --- the scale --------------------------------------------------------------------------------------


def test_the_scale_is_the_papers():
    activity = torch.tensor([4.0, 1.0, 0.25, 0.0])
    assert torch.equal(activity_scale(activity, 0.0), torch.ones(4))
    raw = torch.tensor([2.0, 1.0, 0.5, 1e-2])  # a channel that is never active counts as 1e-4
    torch.testing.assert_close(activity_scale(activity, 0.5), raw / (2.0 * 1e-2) ** 0.5)


@pytest.mark.parametrize("group_size", [-1, 8])
@pytest.mark.parametrize("bits", [2, 4])
def test_the_search_finds_what_brute_force_on_the_tokens_finds(bits, group_size):
    x, weights = _inputs(), {"q": _weight(), "k": _weight(12, seed=2)}

    def error(scale: torch.Tensor) -> float:
        total = 0.0
        for weight in weights.values():
            rounded = quantize_weight(weight * scale, bits=bits, group_size=group_size, sym=False)
            total += float(((x / scale) @ rounded.dequantize().t() - x @ weight.t()).square().sum()) / len(x)
        return total

    found = search_scale(weights, _site(x), bits=bits, group_size=group_size, n_grid=20)
    errors = {step / 20: error(activity_scale(x.abs().mean(0), step / 20)) for step in range(21)}
    best = min(errors, key=errors.get)
    assert found.alpha == best
    assert found.error == pytest.approx(errors[best], rel=1e-4)
    assert found.plain_error == pytest.approx(errors[0.0], rel=1e-4)
    assert found.error < 0.9 * found.plain_error
    torch.testing.assert_close(found.scale, activity_scale(x.abs().mean(0), best))


@pytest.mark.parametrize("seed", range(6))
def test_it_is_never_worse_than_rounding(seed):
    """Exponent 0 is among the candidates, whatever the activations say."""
    x = torch.randn(40, 32, generator=torch.Generator().manual_seed(seed)) * 10.0 ** (seed - 3)
    x[:, seed] = 0
    found = search_scale({"a": _weight(seed=seed)}, _site(x), bits=3, group_size=16, n_grid=20)
    assert found.error <= found.plain_error
    assert found.alpha or torch.equal(found.scale, torch.ones(32))


def test_channels_can_share_a_scale():
    x = _inputs()
    found = search_scale(
        {"o": _weight()},
        _site(x),
        bits=3,
        group_size=8,
        n_grid=20,
        shared=lambda channels: channels.view(2, 16).mean(0),
        spread=lambda channels: channels.repeat(2),
    )
    assert found.scale.shape == (16,)
    activity = x.abs().mean(0).view(2, 16).mean(0)
    torch.testing.assert_close(found.scale, activity_scale(activity, found.alpha))
    assert found.error < found.plain_error


# --- clipping ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("group_size", [8, -1])
def test_clipping_limits_are_the_best_of_each_group(group_size):
    x, weight = _inputs(), _weight()
    clipped = clip_weight(weight, x.t() @ x, bits=3, group_size=group_size)
    width = 32 if group_size == -1 else group_size
    changed = 0
    for row in range(24):
        for start in range(0, 32, width):
            group, inputs = weight[row, start : start + width], x[:, start : start + width]
            losses = []
            for step in range(21):
                limit = group.abs().max() * (1 - 0.5 * step / 20)
                candidate = group.clamp(-limit, limit)
                rounded = quantize_weight(candidate[None], bits=3, sym=False).dequantize()[0]
                losses.append((float((inputs @ (rounded - group)).square().sum()), candidate))
            found = clipped[row, start : start + width]
            rounded = quantize_weight(found[None], bits=3, sym=False).dequantize()[0]
            loss = float((inputs @ (rounded - group)).square().sum())
            assert loss <= min(each for each, _ in losses) * (1 + 1e-3) + 1e-6
            changed += not torch.equal(found, group)
    assert changed > 10


def test_clipping_pads_a_ragged_group():
    weight, x = _weight(columns=20), _inputs(columns=20)
    hessian = x.t() @ x
    clipped = clip_weight(weight, hessian, bits=3, group_size=8)
    assert clipped.shape == weight.shape
    first = clip_weight(weight[:, :16], hessian[:16, :16], bits=3, group_size=8)
    torch.testing.assert_close(clipped[:, :16], first)


def test_queries_and_keys_are_never_clipped(apply):
    kinds = {}
    for clip in (True, False):
        model = apply(METHOD, tiny_model("llama", layers=1), bits=2, clip=clip, n_grid=2)
        for name, module in model.named_modules():
            if isinstance(module, QuantizedLinear):
                kinds.setdefault(name.rpartition(".")[2], []).append(module.dequantize())
    same = {name for name, (clipped, plain) in kinds.items() if torch.equal(clipped, plain)}
    assert same == {"q_proj", "k_proj"}


# --- the fold ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*FAMILIES, "gqa"])
def test_scaling_alone_leaves_the_function(apply, logits, weights, family):
    def fresh() -> nn.Module:
        model = _grouped_query_llama() if family == "gqa" else tiny_model(family)
        sites = ("norm",) if family == "gpt2" else ("norm", "ffn", "vo")
        return inject_outliers(model, k=16.0, channels=4, sites=sites)

    original, before = logits(fresh()), weights(fresh())
    model = apply(METHOD, fresh(), bits=2, group_size=32, quantize=False)
    assert rel_error(logits(model), original) <= 1e-5
    after = weights(model)
    changed = {name.rpartition(".")[2] for name in before if not torch.equal(before[name], after[name])}
    expected = {
        "llama": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
        "opt": {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"},
        "gpt2": {"c_attn", "c_fc"},
    }
    assert changed == expected.get(family, expected["llama"])


def test_an_activation_that_no_scale_passes_keeps_the_down_projection(apply, logits, weights):
    def fresh() -> nn.Module:
        model = tiny_model("opt")
        model.config.activation_function = "gelu"
        for _, block in blocks_of(model):
            block.activation_fn = nn.GELU()
        return inject_outliers(model, k=16.0, channels=4)

    before = weights(fresh())
    model = apply(METHOD, fresh(), bits=2, group_size=32, quantize=False)
    assert rel_error(logits(model), logits(fresh())) <= 1e-5
    after = weights(model)
    assert all(torch.equal(after[name], weight) for name, weight in before.items() if "fc2" in name)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_it_protects_active_channels(apply, logits, family):
    """Measured, relative distance of the logits: llama .104 (rounding .280), opt .121 (.239)."""
    original = logits(tiny_model(family))

    def planted() -> nn.Module:
        return inject_outliers(tiny_model(family), k=64.0, channels=4)

    rounded = rel_error(logits(apply(rtn.METHOD, planted(), group_size=16)), original)
    scaled = rel_error(logits(apply(METHOD, planted(), group_size=16)), original)
    assert scaled <= 0.6 * rounded


def test_a_channel_that_is_never_active_does_no_harm(apply, logits):
    model = tiny_model("opt")
    for _, block in blocks_of(model):
        block.self_attn_layer_norm.weight.data[3] = 0
        block.self_attn_layer_norm.bias.data[3] = 0
        block.fc1.weight.data[7] = 0
        block.fc1.bias.data[7] = -1  # never above zero
    before = logits(model)
    assert rel_error(logits(apply(METHOD, copy.deepcopy(model), bits=8)), before) < 0.03


# --- chains -----------------------------------------------------------------------------------------


def test_before_another_method_it_only_scales(apply, logits):
    original = logits(tiny_model("llama"))
    model = apply(METHOD, tiny_model("llama"), last_in_chain=False)
    assert not any(isinstance(module, QuantizedLinear) for module in model.modules())
    assert rel_error(logits(model), original) <= 1e-5
    model = apply(gptq.METHOD, model, bits=4)
    assert sum(isinstance(module, QuantizedLinear) for module in model.modules()) == 14
    assert rel_error(logits(model), original) < 0.2


def test_quantize_overrides_the_place_in_the_chain(apply):
    model = apply(METHOD, tiny_model("llama"), last_in_chain=False, quantize=True, n_grid=2)
    assert sum(isinstance(module, QuantizedLinear) for module in model.modules()) == 14
    model = apply(METHOD, tiny_model("llama"), last_in_chain=True, quantize=False, n_grid=2)
    assert not any(isinstance(module, QuantizedLinear) for module in model.modules())


# --- ragged groups, records, refusals ---------------------------------------------------------------


def test_groups_that_do_not_divide():
    with pytest.raises(NotApplicable, match="does not divide"):
        METHOD.transform(tiny_model("llama"), AwqOptions(group_size=96), make_context(tiny_model("llama")))
    for ragged, layers in (("pad", 14), ("skip", 2)):
        model = tiny_model("llama")
        context = make_context(model)
        options = AwqOptions(group_size=256 if ragged == "skip" else 96, ragged=ragged, n_grid=2)
        model = METHOD.transform(model, options, context)
        assert sum(isinstance(module, QuantizedLinear) for module in model.modules()) == layers
        skipped = [record.value for record in context.records if record.metric == "skipped_layers"]
        assert skipped == ([12] if ragged == "skip" else [])


def test_what_the_search_gained_is_recorded():
    model = inject_outliers(tiny_model("llama"), k=64.0, channels=4)
    context = make_context(model)
    METHOD.transform(model, AwqOptions(group_size=16), context)
    records = {record.metric: record.value for record in context.records}
    assert 0 < records["awq_relative_error"] < 0.8
    assert 0 < records["awq_alpha"] <= 1


def test_what_does_not_fit_is_known_before_loading():
    def reason(family: str, **values) -> str | None:
        info = info_from_config(tiny_model(family).config, family)
        return METHOD.applies(info, AwqOptions(**values))

    assert "post-norm" in reason("bert")
    assert reason("gpt2") is None
    assert "does not divide" in reason("llama", group_size=96)
    assert reason("llama", group_size=96, ragged="pad") is None


def test_post_norm_opt_is_refused(apply):
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=64, hidden_size=32, ffn_dim=64, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, word_embed_proj_dim=32, do_layer_norm_before=False,
    )  # fmt: skip
    with pytest.raises(NotApplicable, match="post-norm"):
        apply(METHOD, OPTForCausalLM(config).eval(), group_size=16)


def test_a_quantized_model_is_refused(apply):
    with pytest.raises(NotApplicable, match="quantized already"):
        apply(METHOD, apply(METHOD, tiny_model("gpt2"), n_grid=2))


@pytest.mark.parametrize(
    "values", [{"bits": 5}, {"group_size": 0}, {"n_grid": 0}, {"clip": "yes please"}, {"ragged": "cut"}]
)
def test_options_that_make_no_sense(values):
    with pytest.raises(ConfigError, match=next(iter(values))):
        METHOD.options.parse(values)


def test_no_calibration_tokens_is_an_error():
    model = tiny_model("llama")
    context = make_context(model)
    context.calibration_batches = lambda *_args, **_kwargs: []
    with pytest.raises(ConfigError, match="no calibration tokens"):
        METHOD.transform(model, AwqOptions(), context)
