"""Structured pruning: scores against autograd by hand, choices by brute force, refits by least squares."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from harness_plugins.pruning._structures import (
    activation_scores,
    choose_kept,
    magnitude_scores,
    random_scores,
    refit,
    removable,
    taylor_scores,
)
from harness_plugins.pruning.structured_prune import METHOD, StructuredOptions
from torch.nn import functional

from harness.errors import ConfigError, NotApplicable, NumericalFailure
from harness.measure.effect import measure_effect, snapshot
from harness.measure.generation import decode_logits_match
from harness.models.info import info_from_config
from harness.nn.anatomy import anatomy_of, blocks_of
from harness.nn.grouped_query import regroup_key_values
from harness.nn.narrowing import block_shapes
from harness.nn.surgery import block_linears
from harness.testing import make_context, tiny_model

DECODERS = ["llama", "llama-gqa", "opt", "gpt2"]


def _model(family: str):
    model = tiny_model(family.removesuffix("-gqa"))
    if family.endswith("-gqa"):
        regroup_key_values(model, 2, lambda heads, groups: heads.unflatten(0, (groups, -1)).mean(1))
    return model


def _tokens(rows: int = 3) -> torch.Tensor:
    return torch.randint(5, 256, (rows, 17), generator=torch.Generator().manual_seed(3))


def _apply(model, **options):
    context = make_context(model, calibration_samples=6, calibration_len=24)
    result = METHOD.transform(model, StructuredOptions.parse(options), context)
    return result, context


# --- scores -----------------------------------------------------------------------------------------


def _gated_loss(model, tokens, index, gates, kept):
    """The next-token loss with a gate on every head's output in one block; `kept` holds FFN activations."""
    _, block = blocks_of(model)[index]
    anatomy = anatomy_of(model)

    def gate(_module, args):
        heads = args[0].unflatten(-1, (len(gates), -1)) * gates[:, None]
        return (heads.flatten(-2), *args[1:])

    def keep(_module, args):
        args[0].retain_grad()
        kept.append(args[0])

    handles = [
        block.get_submodule(anatomy.out).register_forward_pre_hook(gate),
        block.get_submodule(anatomy.ffn_out).register_forward_pre_hook(keep),
    ]
    logits = model(input_ids=tokens).logits
    for handle in handles:
        handle.remove()
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


@pytest.mark.parametrize("family", DECODERS)
def test_taylor_is_the_gradient_of_gates(family):
    """Each sequence alone, with real gates and through all parameters; head by head, block by block."""
    model, tokens = _model(family), _tokens()
    found = taylor_scores(model, [tokens[:2], tokens[2:]])
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    for index, shape in enumerate(block_shapes(model)):
        heads, channels = torch.zeros(shape.kv_heads), torch.zeros(shape.ffn)
        for row in tokens[:, None]:
            gates = torch.ones(shape.heads, requires_grad=True)
            kept: list[torch.Tensor] = []
            _gated_loss(model, row, index, gates, kept).backward()
            heads += gates.grad.view(shape.kv_heads, -1).sum(1).abs() / len(tokens)
            products = (kept[0] * kept[0].grad).detach().reshape(-1, shape.ffn)
            channels += products.abs().sum(0) / tokens.numel()
        torch.testing.assert_close(found[index].heads, heads, rtol=1e-3, atol=1e-7)
        torch.testing.assert_close(found[index].channels, channels, rtol=1e-3, atol=1e-8)


def test_taylor_is_what_a_smaller_gate_costs():
    """Against finite differences of the loss, in float64."""
    model, row = tiny_model("opt").double(), _tokens(1)
    for index in range(2):
        found = taylor_scores(model, [row])[index].heads
        for head in range(4):
            losses = []
            for step in (1e-4, -1e-4):
                gates = torch.ones(4, dtype=torch.float64)
                gates[head] += step
                losses.append(float(_gated_loss(model, row, index, gates, []).detach()))
            assert float(found[head]) == pytest.approx(abs(losses[0] - losses[1]) / 2e-4, rel=1e-3, abs=1e-8)


@pytest.mark.parametrize("family", [*DECODERS, "bert", "encoder"])
def test_activation_and_magnitude_scores_by_hand(family):
    model, tokens = _model(family), _tokens()
    anatomy = anatomy_of(model)
    activation, magnitude = activation_scores(model, [tokens[:2], tokens[2:]]), magnitude_scores(model)
    for index, ((_, block), shape) in enumerate(zip(blocks_of(model), block_shapes(model), strict=True)):
        seen = {}
        for name in (anatomy.out, anatomy.ffn_out):

            def look(_module, args, name=name, seen=seen):
                seen[name] = args[0].detach().reshape(-1, args[0].shape[-1])

            handle = block.get_submodule(name).register_forward_pre_hook(look)
            with torch.no_grad():
                model(input_ids=tokens)
            handle.remove()
        out, down = (block.get_submodule(name).weight.detach() for name in (anatomy.out, anatomy.ffn_out))
        channel = 7
        expected = down[:, channel].norm() * seen[anatomy.ffn_out][:, channel].abs().mean()
        torch.testing.assert_close(activation[index].channels[channel], expected, rtol=1e-4, atol=0)
        each = out.norm(dim=0) * seen[anatomy.out].abs().mean(0)
        per_head = each.view(shape.kv_heads, -1).sum(1)
        torch.testing.assert_close(activation[index].heads, per_head, rtol=1e-4, atol=0)
        up = block.get_submodule(anatomy.ffn_in[-1]).weight.detach()
        expected = up[channel].norm() * down[:, channel].norm()
        torch.testing.assert_close(magnitude[index].channels[channel], expected, rtol=1e-5, atol=0)
        head = shape.kv_heads - 1
        value = block.get_submodule(anatomy.qkv[-1]).weight.detach()[-shape.head_dim :]
        last = out[:, -(shape.heads // shape.kv_heads) * shape.head_dim :]
        torch.testing.assert_close(
            magnitude[index].heads[head], value.norm() * last.norm(), rtol=1e-5, atol=0
        )


def test_random_scores_follow_the_generator():
    model = tiny_model("llama")
    one, same, other = (
        random_scores(model, torch.Generator().manual_seed(seed))[1].channels for seed in (1, 1, 2)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


# --- choice -----------------------------------------------------------------------------------------


def test_no_more_goes_than_asked():
    assert removable(11008, 0.25, 64) == 2752
    assert removable(8, 0.3) == 2
    assert removable(2, 0.25) == 0
    for width, unit in itertools.product((100, 128, 640, 768), (1, 16, 64)):
        for percent in range(100):
            gone = removable(width, percent / 100, unit)
            left = width - gone
            assert gone <= width * percent / 100 + 1e-9
            assert left > 0
            assert gone == 0 or left % unit == 0
            if gone and left > unit:  # one lot more would be too many
                assert gone + unit > width * percent / 100


def test_the_lowest_of_a_block_go():
    scores = [torch.tensor([3.0, 1, 2, 1, 5, 4]), torch.tensor([0.0, 0, 0, 0, 0, 0])]
    kept = choose_kept(scores, 0.5, name="x")
    assert [each.tolist() for each in kept] == [[0, 4, 5], [3, 4, 5]]
    assert [each.tolist() for each in choose_kept(scores[:1], 0.5, name="x", multiple_of=4)] == [[0, 2, 4, 5]]


def test_blocks_compete_where_asked():
    flat, steep = torch.full((6,), 2.0), torch.tensor([10.0, 0.3, 0.2, 0.1, 0.4, 0.5])
    kept = choose_kept([flat, steep], 0.4, name="x", everywhere=True)
    assert [each.tolist() for each in kept] == [[0, 1, 2, 3, 4, 5], [0, 5]]
    kept = choose_kept([flat, steep], 0.8, name="x", everywhere=True)  # 9 go; each block keeps one
    assert [len(each) for each in kept] == [2, 1]
    assert kept[1].tolist() == [0]
    scaled = choose_kept([flat, 1e-6 * steep], 0.4, name="x", everywhere=True)
    assert [each.tolist() for each in scaled] == [[0, 1, 2, 3, 4, 5], [0, 5]]


def test_lots_of_all_blocks():
    scores = [torch.rand(size, generator=torch.Generator().manual_seed(size)) for size in (100, 128, 96)]
    kept = choose_kept(scores, 0.4, name="x", multiple_of=16, everywhere=True)
    assert all(
        len(each) % 16 == 0 or len(each) == len(score) for each, score in zip(kept, scores, strict=True)
    )
    gone = sum(map(len, scores)) - sum(map(len, kept))
    assert 0.4 * 324 - 16 < gone <= 0.4 * 324
    for each, score in zip(kept, scores, strict=True):  # within a block always the lowest
        outside = torch.ones(len(score), dtype=torch.bool)
        outside[each] = False
        assert not outside.any() or score[outside].max() <= score[each].min()


def test_a_block_is_never_emptied():
    with pytest.raises(ConfigError, match=r"head_ratio=0\.9 .* leave one with nothing"):
        choose_kept([torch.ones(4)] * 3, 0.9, name="head_ratio", everywhere=True)
    with pytest.raises(NumericalFailure, match="head_ratio are NaN"):
        choose_kept([torch.tensor([1.0, float("nan")])], 0.5, name="head_ratio")


# --- compensation -----------------------------------------------------------------------------------


def test_a_refit_is_least_squares():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 24, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(24, 24, generator=generator, dtype=torch.float64)
    weight = torch.randn(8, 24, generator=generator, dtype=torch.float64)
    kept = torch.tensor([i for i in range(24) if i % 3])
    gone = torch.tensor([i for i in range(24) if i % 3 == 0])
    hessian = x.T @ x / len(x)
    pull = (0.03 * hessian[kept][:, kept].diagonal().mean() * len(x)).sqrt()
    # The pull as rows of their own, so that torch's least squares is the whole answer.
    rows = torch.cat([x[:, kept], pull * torch.eye(len(kept), dtype=torch.float64)])
    wanted = torch.cat([x @ weight.T, pull * weight[:, kept].T])
    expected = torch.linalg.lstsq(rows, wanted).solution.T
    torch.testing.assert_close(refit(weight, hessian, kept, damp=0.03), expected, rtol=1e-8, atol=1e-10)

    def error(columns, shift=0.0):
        return float((x @ weight.T - x[:, kept] @ columns.T - shift).square().sum())

    none = error(weight[:, kept])
    errors = [error(refit(weight, hessian, kept, damp=damp)) for damp in (1e-4, 0.1, 10)]
    assert errors == sorted(errors)
    assert errors[0] < 0.7 * none
    assert errors[2] < none
    biased = x + 3
    assert float((biased[:, gone] @ weight[:, gone].T).square().sum()) > none
    assert error(weight[:, kept], x[:, gone].mean(0) @ weight[:, gone].T) <= none


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "bert"])
def test_compensation_lowers_the_error_of_the_layer_it_repairs(family):
    """The first output projection and, heads kept, the first down projection on calibration tokens."""
    for part, ratios in (
        ("out", {"head_ratio": 0.5, "ffn_ratio": 0}),
        ("ffn_out", {"ffn_ratio": 0.5, "head_ratio": 0}),
    ):
        errors = {}
        for compensate in ("none", "bias", "lstsq"):
            model, original = tiny_model(family), tiny_model(family)
            context = make_context(model, calibration_samples=8, calibration_len=24)
            options = {"criterion": "random", "compensate": compensate, "multiple_of": 16, **ratios}
            METHOD.transform(model, StructuredOptions.parse(options), context)
            name = f"{blocks_of(model)[0][0]}.{getattr(anatomy_of(model), part)}"
            outputs = []
            for each in (model, original):
                layer = each.get_submodule(name)
                handle = layer.register_forward_hook(lambda _m, _a, y, seen=outputs: seen.append(y))
                with torch.no_grad():
                    each(input_ids=context.calibration())
                handle.remove()
            errors[compensate] = float((outputs[0] - outputs[1]).square().sum())
        assert errors["lstsq"] < errors["none"]
        assert errors["bias"] <= errors["none"] * (1 + 1e-5)


def test_refitted_columns_follow_from_the_pruned_blocks_before():
    model = tiny_model("llama")
    name = "model.layers.1.mlp.down_proj"
    before = model.get_submodule(name).weight.detach().clone()
    seen = []
    original = copy.deepcopy(model)
    context = make_context(model, calibration_samples=8, calibration_len=24)
    METHOD.transform(model, StructuredOptions(criterion="magnitude", head_ratio=0), context)
    kept = [
        i
        for i in range(256)
        if any(
            torch.equal(original.model.layers[1].mlp.up_proj.weight[i], row)
            for row in model.model.layers[1].mlp.up_proj.weight
        )
    ]
    assert len(kept) == 192
    # The block's own FFN was whole when its input was seen; the first block was narrow.
    model.model.layers[1].mlp = original.model.layers[1].mlp
    layer = model.get_submodule(name)
    layer.register_forward_pre_hook(lambda _m, args: seen.append(args[0].reshape(-1, 256)))
    narrow = METHOD.transform(
        copy.deepcopy(original),
        StructuredOptions(criterion="magnitude", head_ratio=0),
        make_context(original, calibration_samples=8, calibration_len=24),
    )
    with torch.no_grad():
        model(input_ids=context.calibration())
    x = seen[0].double()
    expected = refit(before.double(), x.T @ x / len(x), torch.tensor(kept))
    ours = narrow.get_submodule(name).weight.detach().double()
    assert float((ours - expected).norm() / (before[:, kept].double() - expected).norm()) < 1e-3


# --- whole models -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", [*DECODERS, "bert", "encoder"])
@pytest.mark.parametrize("compensate", ["none", "bias", "lstsq"])
def test_it_shrinks_and_still_runs(family, dtype, compensate):
    model = _model(family).to(dtype)
    encoder = family in ("bert", "encoder")
    options = {
        "criterion": "activation" if encoder else "taylor",
        "compensate": compensate,
        "head_ratio": 0.5,
    }
    before, shapes = snapshot(model), block_shapes(model)
    model, context = _apply(model, **options)
    for shape, old in zip(block_shapes(model), shapes, strict=True):
        assert (shape.heads, shape.kv_heads, shape.ffn) == (old.heads // 2, old.kv_heads // 2, 192)
    assert {linear.weight.dtype for _, linear in block_linears(model)} == {dtype}
    records = {record.metric: record.value for record in measure_effect(before, model).records}
    assert records["weight_bytes"] < 0.85 * records["weight_bytes_before"]
    recorded = {record.metric: record.value for record in context.records}
    assert (recorded["removed_head_share"], recorded["removed_channel_share"]) == (0.5, 0.25)
    assert recorded["fewest_channels"] == 192
    with torch.no_grad():
        output = model(input_ids=_tokens())
    logits = getattr(output, "logits", None)
    assert bool(torch.isfinite(output.last_hidden_state if logits is None else logits).all())
    if not encoder and dtype == torch.float32:
        assert decode_logits_match(model, _tokens(2)[:, :10], 4) <= 1e-4


def test_blocks_of_different_widths():
    model = tiny_model("llama")
    anatomy = anatomy_of(model)
    first = blocks_of(model)[0][1]
    with torch.no_grad():  # a first block of which little is worth keeping
        first.get_submodule(anatomy.ffn_out).weight[:, 40:] *= 1e-3
        first.get_submodule(anatomy.out).weight[:, 32:] *= 1e-3
    options = {"scope": "global", "multiple_of": 16, "head_ratio": 0.3, "ffn_ratio": 0.3}
    model, context = _apply(model, criterion="activation", **options)
    narrow, wide = block_shapes(model)
    assert (narrow.heads, wide.heads) == (2, 4)
    assert narrow.ffn < 128 < wide.ffn
    assert narrow.ffn % 16 == wide.ffn % 16 == 0
    assert [values["ffn"] for values in model.config.block_shapes] == [narrow.ffn, wide.ffn]
    recorded = {record.metric: record for record in context.records}
    assert recorded["removed_head_share"].value == 0.25
    assert "asked 0.3" in recorded["removed_head_share"].note
    assert decode_logits_match(model, _tokens(2)[:, :10], 4) <= 1e-4


def test_training_afterwards():
    tokens = torch.randint(5, 256, (40,), generator=torch.Generator().manual_seed(0)).repeat(60)
    losses = {}
    for steps in (0, 20):
        model = tiny_model("opt")
        context = make_context(model, tokens=tokens, calibration_samples=4, calibration_len=40)
        METHOD.transform(model, StructuredOptions(steps=steps), context)
        assert context.trained_steps == steps
        with torch.no_grad():
            losses[steps] = float(model(input_ids=tokens[None, :80], labels=tokens[None, :80]).loss)
    assert losses[20] < losses[0] - 0.3


def test_nothing_to_take_out_is_no_change():
    model = tiny_model("llama")
    _apply(model, head_ratio=0, ffn_ratio=0)
    for name, parameter in tiny_model("llama").named_parameters():
        assert torch.equal(parameter, model.get_parameter(name))
    assert not hasattr(model.config, "block_shapes")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"head_ratio": 1.0}, "head_ratio"),
        ({"ffn_ratio": 1.0}, "ffn_ratio"),
        ({"ffn_ratio": -0.1}, "ffn_ratio"),
        ({"criterion": "hessian"}, "criterion"),
        ({"multiple_of": 0}, "multiple_of"),
        ({"compensate": "all"}, "compensate"),
        ({"damp": 0}, "damp"),
        ({"steps": -1}, "steps"),
    ],
)
def test_options_that_make_no_sense(values, message):
    with pytest.raises(ConfigError, match=message):
        StructuredOptions.parse(values)


def test_models_that_do_not_fit():
    info = info_from_config(tiny_model("llama").config, "tiny")
    assert METHOD.applies(info, StructuredOptions()) is None
    reason = METHOD.applies(info, StructuredOptions(head_ratio=0.1, ffn_ratio=0.1))
    assert reason == (
        "head_ratio=0.1 of 4 key-value heads and ffn_ratio=0.1 of 256 channels in multiples of 64 "
        "remove nothing"
    )
    assert "head_ratio=0.9" in METHOD.applies(info, StructuredOptions(head_ratio=0.9, scope="global"))
    encoder = info_from_config(tiny_model("encoder").config, "tiny")
    assert "criterion=activation" in METHOD.applies(encoder, StructuredOptions())
    assert METHOD.applies(encoder, StructuredOptions(criterion="activation")) is None
    assert "steps" in METHOD.applies(encoder, StructuredOptions(criterion="activation", steps=1))
    with pytest.raises(NotApplicable, match="remove nothing"):
        _apply(tiny_model("llama"), head_ratio=0.1, ffn_ratio=0.1)
    with pytest.raises(ConfigError, match=r"head_ratio=0\.9"):
        _apply(tiny_model("llama"), head_ratio=0.9, scope="global")


def test_what_it_needs():
    needs = METHOD.needs_of
    assert needs(StructuredOptions()) == {"calibration"}
    assert needs(StructuredOptions(criterion="magnitude")) == {"calibration"}
    assert needs(StructuredOptions(criterion="magnitude", compensate="none")) == frozenset()
    assert needs(StructuredOptions(steps=2)) == {"calibration", "training"}


@pytest.mark.parametrize("criterion", ["taylor", "activation", "magnitude"])
@pytest.mark.parametrize("compensate", ["bias", "lstsq"])
def test_missing_and_broken_calibration(criterion, compensate):
    model = tiny_model("llama")
    context = make_context(model)
    context.calibration_batches = lambda *_args, **_kwargs: []
    options = StructuredOptions(criterion=criterion, compensate=compensate)
    with pytest.raises(ConfigError, match="no calibration tokens"):
        METHOD.transform(model, options, context)
    model = tiny_model("llama")
    model.model.embed_tokens.weight.data[:] = float("nan")
    with pytest.raises(NumericalFailure, match="calibration"):
        _apply(model, criterion=criterion, compensate=compensate)


def test_a_single_key_value_head_stays():
    model = tiny_model("llama")
    regroup_key_values(model, 1, lambda heads, groups: heads[:groups])
    model, context = _apply(model, criterion="magnitude")
    assert [(shape.heads, shape.ffn) for shape in block_shapes(model)] == [(4, 192)] * 2
    recorded = {record.metric: record for record in context.records}
    assert recorded["removed_head_share"].value == 0
    assert "whole groups of 4 query heads" in recorded["removed_head_share"].note
