"""Channel permutation as a method: same outputs, more magnitude, then the pruning of nm-prune."""

from __future__ import annotations

import pytest
import torch
from harness_plugins.attention.mqa import GQA
from harness_plugins.pruning import structured_prune
from harness_plugins.sparsity import nm_prune
from harness_plugins.sparsity.channel_permute import METHOD, PermuteOptions
from torch import nn

from harness.errors import ConfigError, NotApplicable
from harness.measure.effect import measure_effect, snapshot
from harness.models.info import info_from_config
from harness.nn.n_of_m import keep_n_of_m
from harness.nn.semi_structured import SemiStructuredLinear
from harness.nn.surgery import block_linears
from harness.testing import make_context, tiny_model
from tests.nn.test_channel_order import gqa_llama, outputs, rel

FAST = {"bounded_regressions": 1, "max_rows": 32, "strategy": "channel-swap"}


def permuted(model: nn.Module, context=None, **options):
    context = context or make_context(model)
    return METHOD.transform(model, METHOD.options.parse({**FAST, **options}), context), context


def recorded(context) -> dict[str, float]:
    return {record.metric: record.value for record in context.records}


def kept_by(model: nn.Module, name: str) -> float:
    """The magnitude that 2:4 keeps of a layer's weight as it lies."""
    weight = model.get_submodule(name).weight.detach().abs()
    return float(weight[keep_n_of_m(weight, 2, 4)].sum(dtype=torch.float64))


MODELS = {
    **{name: lambda name=name: tiny_model(name) for name in ("llama", "opt", "gpt2", "bert", "encoder")},
    "gqa": gqa_llama,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_the_reordered_model_computes_the_same_and_keeps_more(name, dtype):
    original, model = MODELS[name]().to(dtype), MODELS[name]().to(dtype)
    model, context = permuted(model, prune=False)
    assert rel(outputs(model), outputs(original)) <= (1e-5 if dtype == torch.float32 else 5e-2)
    values = recorded(context)
    assert values["ffn_efficacy"] > 0.05
    assert values["vo_efficacy"] > 0.02  # two heads that share an order, of 32 rows of 256
    assert values["ffn_magnitude_gain"] > 0.001
    changed = [layer for layer, linear in block_linears(model)
               if not torch.equal(linear.weight, original.get_submodule(layer).weight)]  # fmt: skip
    for layer, linear in block_linears(model):
        was = original.get_submodule(layer).weight.detach()
        # The same weights in another place.
        assert torch.equal(linear.weight.detach().flatten().sort().values, was.flatten().sort().values)
        assert kept_by(model, layer) >= kept_by(original, layer) - 1e-3
    assert len(changed) >= 2 * (4 if name == "gpt2" else 5) - 2


def test_the_gain_that_is_recorded_is_that_of_the_pruned_weights():
    original, model = tiny_model("opt"), tiny_model("opt")
    model, context = permuted(model, prune=False, sites=["ffn"])
    names = [f"model.decoder.layers.{index}.fc2" for index in range(2)]
    before, after = (sum(kept_by(each, name) for name in names) for each in (original, model))
    assert recorded(context)["ffn_magnitude_gain"] == pytest.approx(after / before - 1, rel=1e-3)


def test_the_residual_stream_has_one_order():
    original, model = gqa_llama(), gqa_llama()
    model, context = permuted(model, prune=False, sites=["residual"])
    assert rel(outputs(model), outputs(original)) <= 1e-5
    assert recorded(context)["residual_efficacy"] > 0
    readers = [f"model.layers.{i}.{part}" for i in range(2)
               for part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
                            "mlp.gate_proj", "mlp.up_proj")]  # fmt: skip
    assert sum(kept_by(model, name) for name in readers) > sum(kept_by(original, name) for name in readers)


def test_queries_and_keys_gain_exactly_nothing():
    original, model = tiny_model("opt"), tiny_model("opt")
    model, context = permuted(model, prune=False, sites=["qk", "vo"])
    assert recorded(context)["qk_efficacy"] == recorded(context)["qk_magnitude_gain"] == 0
    for part in ("q_proj", "k_proj"):
        name = f"model.decoder.layers.0.self_attn.{part}"
        # Whatever their order of rows: groups run along the inputs.
        weight = original.get_submodule(name).weight.detach()
        rows = torch.randperm(len(weight), generator=torch.Generator().manual_seed(0))
        moved = weight[rows].abs()
        assert torch.equal(keep_n_of_m(moved, 2, 4), keep_n_of_m(weight.abs(), 2, 4)[rows])


def test_alone_it_prunes_like_nm_prune_and_in_a_chain_it_leaves_that_to_what_follows():
    before = snapshot(tiny_model("llama"))
    alone, context = permuted(tiny_model("llama"))
    effect = measure_effect(before, alone)
    assert {entry.nm_pattern for entry in effect.effects if "proj" in entry.module} == {"2:4"}
    assert recorded(context)["pruned_share_of_targets"] == 0.5
    model = tiny_model("llama")
    first = make_context(model)
    first.last_in_chain = False
    model, _ = permuted(model, first)
    assert all(not (linear.weight == 0).any() for _, linear in block_linears(model))
    model = nm_prune.METHOD.transform(model, nm_prune.NmOptions(), make_context(model))
    for name, module in alone.named_modules():
        if isinstance(module, SemiStructuredLinear):
            assert torch.equal(module.dense_weight(), model.get_submodule(name).dense_weight())


def with_fewer_heads(name: str) -> nn.Module:
    """Three heads of 32 channels in every block, where the configuration may still say four."""
    model = tiny_model(name)
    options = structured_prune.METHOD.options.parse(
        {"criterion": "magnitude", "compensate": "none", "ffn_ratio": 0}
    )
    return structured_prune.METHOD.transform(model, options, make_context(model))


def with_shared_heads(name: str) -> nn.Module:
    model = tiny_model(name)
    return GQA.transform(model, GQA.options.parse({"groups": 2, "steps": 0}), make_context(model))


@pytest.mark.parametrize(
    ("make", "name"),
    [
        *((with_fewer_heads, name) for name in ("llama", "opt", "gpt2", "bert")),
        *((with_shared_heads, name) for name in ("llama", "opt", "gpt2")),
    ],
)
def test_value_channels_move_inside_the_heads_that_an_earlier_method_left(make, name):
    expected, model = outputs(make(name)), make(name)
    untouched = make_context(tiny_model(name)).info  # of a chain's model, as it was before the chain
    model, context = permuted(model, make_context(model, untouched), prune=False, sites=["vo"])
    assert rel(outputs(model), expected) <= 1e-5
    assert recorded(context)["vo_efficacy"] > 0


def test_only_sites_whose_columns_are_pruned_move():
    original, model = tiny_model("llama"), tiny_model("llama")
    model, context = permuted(model, prune=False, targets="o_proj")
    assert recorded(context)["ffn_efficacy"] == 0
    for name, linear in block_linears(model):
        same = torch.equal(linear.weight, original.get_submodule(name).weight)
        assert same == (not name.endswith(("v_proj", "o_proj")))


def test_rows_left_out_of_a_search_never_make_it_a_loss():
    _, context = permuted(tiny_model("opt"), prune=False, max_rows=1, bounded_regressions=0)
    assert recorded(context)["ffn_efficacy"] >= 0
    assert recorded(context)["vo_efficacy"] >= 0


def test_something_else_that_reads_the_channels_is_noticed():
    model = tiny_model("opt")

    def keep_first(_module, args, output):
        return output + 100 * args[0][..., : output.shape[-1]]  # the first ones, wherever they are now

    for layer in model.model.decoder.layers:
        layer.fc2.register_forward_hook(keep_first)
    with pytest.raises(NotApplicable, match="something beside the known layers reads them"):
        permuted(model, prune=False, sites=["ffn"])


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"n": 4}, "fewer than m"),
        ({"sites": []}, "name at least one"),
        ({"sites": ["ffn", "ffn"]}, "each once"),
        ({"sites": ["head"]}, "sites"),
        ({"group_cols": 10}, "group_cols must be 8 or 12"),
        ({"group_cols": 8, "strategy": "channel-swap"}, "belongs to strategy=stripe-groups"),
        ({"m": 16, "n": 8}, "use strategy=channel-swap"),
        ({"strategy": "best"}, "strategy"),
        ({"bounded_regressions": -1}, "bounded_regressions"),
        ({"time_limit_s": 0}, "time_limit_s"),
        ({"max_rows": 0}, "max_rows"),
    ],
)
def test_bad_options_are_named(bad, words):
    with pytest.raises(ConfigError, match=words):
        PermuteOptions.parse(bad)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"m": 24, "n": 2}, NotApplicable, "m=24 does not divide a width of 128"),
        ({"m": 64, "n": 2}, NotApplicable, "m=64 does not divide the 32 channels of a head"),
        ({"targets": "nowhere"}, ConfigError, "nowhere"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_moves(options, error, words):
    model, original = tiny_model("llama"), tiny_model("llama")
    with pytest.raises(error, match=words):
        permuted(model, **options)
    for name, parameter in original.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name))


def test_the_grid_knows_where_channels_cannot_move():
    llama, bert, opt = (info_from_config(tiny_model(name).config, name) for name in ("llama", "bert", "opt"))
    assert METHOD.applies(llama, PermuteOptions()) is None
    assert "rotary" in METHOD.applies(llama, PermuteOptions(sites=("qk",)))
    assert "encoder" in METHOD.applies(bert, PermuteOptions(sites=("residual",)))
    assert METHOD.applies(opt, PermuteOptions(sites=("ffn", "vo", "qk", "residual"))) is None
    assert "hidden size" in METHOD.applies(llama, PermuteOptions(m=3, n=1))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_the_search_gains_as_much():
    original, model = gqa_llama().cuda(), gqa_llama().cuda()
    model, context = permuted(model, prune=False, sites=["ffn", "vo", "residual"], max_rows=1024)
    _, on_cpu = permuted(gqa_llama(), prune=False, sites=["ffn", "vo", "residual"], max_rows=1024)
    for name, value in recorded(on_cpu).items():
        assert recorded(context)[name] == pytest.approx(value, rel=0.2)
    tokens = torch.randint(256, (2, 20), device="cuda")
    with torch.no_grad():
        assert rel(model(input_ids=tokens).logits, original(input_ids=tokens).logits) <= 1e-4
