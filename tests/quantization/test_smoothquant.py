"""SmoothQuant: the fold, its invariances, the levels, chains, refusals."""

from __future__ import annotations

import pytest
import torch
from harness_plugins.quantization import gptq, rtn
from harness_plugins.quantization.smoothquant import METHOD, SmoothQuantOptions, smoothing_scale
from torch import nn

from harness.errors import ConfigError, NotApplicable
from harness.models.info import info_from_config
from harness.nn.anatomy import blocks_of, norm_sites
from harness.nn.outliers import inject_outliers
from harness.nn.quantized import Int8Linear, QuantizedLinear
from harness.testing.making import make_context
from harness.testing.models import tiny_model

FAMILIES = ["llama", "opt", "gpt2"]


def rel_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    return float((value - reference).norm() / reference.norm())


def site_inputs(model: nn.Module, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """The inputs [tokens, d] of the first consumer of every norm site, by full name."""
    seen: dict[str, torch.Tensor] = {}
    handles = []
    for name, block in blocks_of(model):
        for site in norm_sites(model):

            def hook(_module, args, full=f"{name}.{site.consumers[0]}"):
                seen[full] = args[0].detach().reshape(-1, args[0].shape[-1])

            handles.append(block.get_submodule(site.consumers[0]).register_forward_pre_hook(hook))
    with torch.no_grad():
        model(input_ids=tokens)
    for handle in handles:
        handle.remove()
    return seen


# --- the fold -------------------------------------------------------------------------------------


def test_the_scale_is_equation_4():
    a, w = torch.tensor([4.0, 1.0, 0.0, 9.0]), torch.tensor([1.0, 4.0, 1.0, 0.0])
    scale = smoothing_scale(a, w, 0.5)
    assert scale[:2].tolist() == pytest.approx([2.0, 0.5])
    assert bool(torch.isfinite(scale).all())
    assert float(scale.min()) >= 1e-5
    assert smoothing_scale(a, w, 1.0)[0] == 4
    assert smoothing_scale(a, w, 0.0)[1] == 0.25


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("alpha", [0.25, 0.5, 0.8])
def test_smoothing_alone_leaves_the_function(apply, logits, weights, family, alpha):
    original, before = logits(tiny_model(family)), weights(tiny_model(family))
    model = apply(METHOD, tiny_model(family), alpha=alpha, quantize=False)
    assert rel_error(logits(model), original) <= 1e-5
    changed = [name for name, weight in weights(model).items() if not torch.equal(weight, before[name])]
    consumers = {consumer for site in norm_sites(model) for consumer in site.consumers}
    assert len(changed) == 2 * len(consumers)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_all_sites_leave_the_function(apply, logits, family):
    original = logits(tiny_model(family))
    model = apply(METHOD, tiny_model(family), vo=True, up_down=True, quantize=False)
    assert rel_error(logits(model), original) <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("alpha", [0.25, 0.5, 0.8])
def test_planted_outliers_are_undone_exactly(apply, weights, family, alpha):
    """An identity test: smoothing is the inverse of planting at norm sites, whatever alpha."""
    clean = weights(apply(METHOD, tiny_model(family), alpha=alpha, quantize=False))
    planted = inject_outliers(tiny_model(family), k=64.0, channels=4)
    undone = weights(apply(METHOD, planted, alpha=alpha, quantize=False))
    for name, weight in clean.items():
        assert rel_error(undone[name], weight) <= 1e-5, name


@pytest.mark.parametrize("family", FAMILIES)
def test_alpha_one_levels_the_activations(apply, family):
    model = tiny_model(family)
    context = make_context(model, calibration_samples=4, calibration_len=32)
    model = METHOD.transform(model, METHOD.options.parse({"alpha": 1.0, "quantize": False}), context)
    for name, x in site_inputs(model, context.calibration()).items():
        torch.testing.assert_close(x.abs().amax(0), torch.ones(x.shape[1]), rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_alpha_zero_levels_the_weights_of_all_consumers_together(apply, family):
    model = apply(METHOD, tiny_model(family), alpha=0.0, quantize=False)
    for name, block in blocks_of(model):
        for site in norm_sites(model):
            stacked = torch.cat([block.get_submodule(consumer).weight for consumer in site.consumers])
            peaks = stacked.detach().abs().amax(0)
            torch.testing.assert_close(peaks, torch.ones_like(peaks), rtol=1e-5, atol=1e-5, msg=name)


def test_a_channel_that_is_never_active_does_no_harm(apply, logits):
    model = tiny_model("opt")
    for _, block in blocks_of(model):
        block.self_attn_layer_norm.weight.data[3] = 0
        block.self_attn_layer_norm.bias.data[3] = 0
        block.fc1.weight.data[7] = 0
        block.fc1.bias.data[7] = -1  # never above zero
    before = logits(model)
    model = apply(METHOD, model, vo=True, up_down=True, w_gran="per-tensor", level="O3")
    assert rel_error(logits(model), before) < 0.1


# --- quantization -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("level", "a_gran"),
    [("O1", "per-token"), ("O2", "per-tensor-dynamic"), ("O3", "per-tensor-static")],
)
@pytest.mark.parametrize("w_gran", ["per-channel", "per-tensor"])
def test_levels(apply, logits, family, level, a_gran, w_gran):
    original = logits(tiny_model(family))
    model = apply(METHOD, tiny_model(family), level=level, w_gran=w_gran)
    layers = [module for module in model.modules() if isinstance(module, Int8Linear)]
    assert len(layers) == 2 * len({"llama": range(7), "opt": range(6), "gpt2": range(4)}[family])
    assert {layer.a_gran for layer in layers} == {a_gran}
    assert {layer.scales.numel() == 1 for layer in layers} == {w_gran == "per-tensor"}
    assert rel_error(logits(model), original) < 0.1


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("level", ["O2", "O3"])
def test_it_repairs_what_outliers_break(apply, logits, family, level):
    original = logits(tiny_model(family))
    a_gran = {"O2": "per-tensor-dynamic", "O3": "per-tensor-static"}[level]

    def planted() -> nn.Module:
        return inject_outliers(tiny_model(family), k=64.0, channels=4)

    naive = logits(apply(rtn.METHOD, planted(), bits=8, a_bits=8, a_gran=a_gran))
    smooth = logits(apply(METHOD, planted(), level=level))
    assert rel_error(smooth, original) <= 0.2 * rel_error(naive, original)


# --- chains -----------------------------------------------------------------------------------------


def test_before_another_method_it_only_smooths(apply, logits):
    original = logits(tiny_model("llama"))
    model = apply(METHOD, tiny_model("llama"), last_in_chain=False)
    assert not any(isinstance(module, Int8Linear) for module in model.modules())
    assert rel_error(logits(model), original) <= 1e-5
    model = apply(gptq.METHOD, model, bits=4)
    assert sum(isinstance(module, QuantizedLinear) for module in model.modules()) == 14
    assert rel_error(logits(model), original) < 0.2


def test_quantize_overrides_the_place_in_the_chain(apply):
    model = apply(METHOD, tiny_model("llama"), last_in_chain=False, quantize=True)
    assert sum(isinstance(module, Int8Linear) for module in model.modules()) == 14
    model = apply(METHOD, tiny_model("llama"), last_in_chain=True, quantize=False)
    assert not any(isinstance(module, Int8Linear) for module in model.modules())


def test_smoothing_and_rounding_in_two_steps_is_the_same(apply, logits):
    smoothed = apply(METHOD, tiny_model("opt"), last_in_chain=False)
    two_steps = apply(rtn.METHOD, smoothed, bits=8, a_bits=8)
    assert torch.equal(logits(two_steps), logits(apply(METHOD, tiny_model("opt"))))


# --- refusals ---------------------------------------------------------------------------------------


def test_what_does_not_fit_is_known_before_loading():
    def reason(family: str, **values) -> str | None:
        info = info_from_config(tiny_model(family).config, family)
        return METHOD.applies(info, SmoothQuantOptions(**values))

    assert "post-norm" in reason("bert")
    assert "post-norm" in reason("encoder")
    assert reason("llama", vo=True, up_down=True) is None
    assert reason("gpt2") is None
    assert "GPT-2 has neither" in reason("gpt2", vo=True)


def test_post_norm_opt_is_refused(apply):
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=64, hidden_size=32, ffn_dim=64, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, word_embed_proj_dim=32, do_layer_norm_before=False,
    )  # fmt: skip
    with pytest.raises(NotApplicable, match="post-norm"):
        apply(METHOD, OPTForCausalLM(config).eval())


def test_an_activation_that_no_scale_passes_is_refused(apply):
    model = tiny_model("opt")
    model.config.activation_function = "gelu"
    with pytest.raises(NotApplicable, match="no scale passes"):
        apply(METHOD, model, up_down=True)


def test_a_norm_with_another_reader_is_refused(apply):
    model = tiny_model("llama")
    block = model.model.layers[0]
    norm, mlp = block.post_attention_layernorm, block.mlp
    side = nn.Linear(128, 128)

    class TwoReaders(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
            self.side = side

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down_proj(self.gate_proj(x) * self.up_proj(x)) + self.side(x)

    block.mlp = TwoReaders()
    norm.weight.data *= torch.exp(torch.randn(128, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(NotApplicable, match="something beside the known layers reads its norms"):
        apply(METHOD, model)


def test_a_quantized_model_is_refused(apply):
    with pytest.raises(NotApplicable, match="quantized already"):
        apply(METHOD, apply(METHOD, tiny_model("llama")))


@pytest.mark.parametrize(
    "values", [{"alpha": -0.1}, {"alpha": 1.1}, {"level": "O4"}, {"w_gran": "per-group"}]
)
def test_options_that_make_no_sense(values):
    with pytest.raises(ConfigError, match=next(iter(values))):
        METHOD.options.parse(values)


def test_no_calibration_tokens_is_an_error():
    model = tiny_model("llama")
    context = make_context(model)
    context.calibration_batches = lambda *_args, **_kwargs: []
    with pytest.raises(ConfigError, match="no calibration tokens"):
        METHOD.transform(model, METHOD.options.parse({}), context)
