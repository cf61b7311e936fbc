"""Sparse-refined straight-through training against the paper's equations, one step and many."""

from __future__ import annotations

import math

import pytest
import torch
from harness_plugins.sparsity import nm_prune
from harness_plugins.sparsity.sr_ste import (
    METHOD,
    SparseRefinedLinear,
    SrSteOptions,
    decay_masked,
    lambda_for,
    sparse_refined,
)
from torch import nn
from torch.nn import functional

from harness.errors import ConfigError, NotApplicable, NumericalFailure
from harness.measure.effect import measure_effect, snapshot
from harness.models.info import info_from_config
from harness.nn.n_of_m import keep_n_of_m
from harness.nn.surgery import block_linears
from harness.testing import TinyTokenizer, make_context, tiny_model
from harness.training import TrainSettings, lr_factor

SETTINGS = TrainSettings(steps=4, lr=3e-3, batch_size=2, seq_len=16)


def trained(model: nn.Module, context=None, **options):
    context = context or make_context(model, tokenizer=TinyTokenizer, settings=SETTINGS)
    return METHOD.transform(model, METHOD.options.parse(options), context), context


def recorded(context) -> dict[str, float]:
    return {record.metric: record.value for record in context.records}


def problem(seed: int = 0):
    """A weight [6, 8], its 2:4 mask, and a quadratic loss of the masked weight."""
    generator = torch.Generator().manual_seed(seed)
    weight, target, x = (torch.randn(*shape, generator=generator) for shape in ((6, 8), (5, 6), (5, 8)))
    return (
        weight,
        keep_n_of_m(weight.abs(), 2, 4),
        lambda w: 0.5 * (x @ w.T - target).square().sum(),
        x,
        target,
    )


# --- one step -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 2e-4, 0.7])
def test_one_step_of_sgd_is_the_papers_update(decay):
    """W - gamma (grad + lambda (1 - E) W), the gradient of the masked weight in closed form, the sign too."""
    weight, keep, loss, x, target = problem()
    parameter = nn.Parameter(weight.clone())
    optimizer = torch.optim.SGD([parameter], lr=0.05)
    loss(sparse_refined(parameter, keep, decay)).backward()
    optimizer.step()
    gradient = (x @ (weight * keep).T - target).T @ x  # [6, 8]
    expected = weight - 0.05 * (gradient + decay * (1 - keep.float()) * weight)
    torch.testing.assert_close(parameter.detach(), expected)


def test_without_a_gradient_masked_weights_shrink_and_others_stay():
    weight, keep, *_ = problem()
    parameter = nn.Parameter(weight.clone())
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    (sparse_refined(parameter, keep, 0.5) * 0).sum().backward()
    optimizer.step()
    assert torch.equal(parameter.detach()[keep], weight[keep])
    torch.testing.assert_close(parameter.detach()[~keep], (1 - 0.1 * 0.5) * weight[~keep])


def test_decay_before_a_step_of_sgd_is_the_same_update():
    weight, keep, loss, *_ = problem()
    coupled, decoupled = nn.Parameter(weight.clone()), nn.Parameter(weight.clone())
    loss(sparse_refined(coupled, keep, 0.3)).backward()
    torch.optim.SGD([coupled], lr=0.05).step()
    decay_masked(decoupled, keep, 0.05 * 0.3)
    loss(sparse_refined(decoupled, keep)).backward()
    torch.optim.SGD([decoupled], lr=0.05).step()
    torch.testing.assert_close(decoupled, coupled)


def test_without_decay_it_is_the_straight_through_estimator_bit_for_bit():
    weight, keep, loss, *_ = problem()
    ours, theirs = nn.Parameter(weight.clone()), nn.Parameter(weight.clone())
    for _ in range(5):
        loss(sparse_refined(ours, keep)).backward()
        masked = theirs * keep
        masked.retain_grad()
        loss(masked).backward()
        theirs.grad = masked.grad.clone()  # the gradient of the masked weight, given to all
        assert torch.equal(ours.grad, theirs.grad)
        for parameter in (ours, theirs):
            torch.optim.SGD([parameter], lr=0.01).step()
            parameter.grad = None
        assert torch.equal(ours, theirs)


def test_masked_weights_can_come_back():
    layer = SparseRefinedLinear(nn.Linear(8, 2), n=2, m=4)
    keep = layer.keep.clone()
    assert int(layer.choose()) == 0
    with torch.no_grad():
        layer.weight[~keep] = 10.0  # above whatever the layer began with
    assert int(layer.choose()) == 16  # every place of two rows of eight changes
    assert torch.equal(layer.keep, ~keep)


@pytest.mark.parametrize(("steps", "lr"), [(10, 1e-3), (450, 3e-3)])
def test_auto_shrinks_a_masked_weight_to_exp_of_minus_three(steps, lr):
    settings = TrainSettings(steps=steps, lr=lr)
    decay = lambda_for(settings)
    rates = [lr * lr_factor(step, settings) for step in range(steps)]
    assert decay * sum(rates) == pytest.approx(3)
    if steps > 100:
        left = math.prod(1 - decay * rate for rate in rates)
        assert left == pytest.approx(math.exp(-3), rel=0.02)
    assert lambda_for(TrainSettings(steps=1, lr=0.1)) == 10  # not 30, which would take thrice the weight


# --- in the loop --------------------------------------------------------------------------------------


def reference(model: nn.Module, tokens, settings: TrainSettings, decay: float) -> dict[str, torch.Tensor]:
    """The same training from its description: AdamW on dense weights, masks by hand in every forward pass."""
    from harness.tokens import RandomTokens, training_batches

    linears = dict(block_linears(model))
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95))
    context = make_context(model, settings=settings)
    batches = training_batches(
        RandomTokens(256), settings.batch_size, settings.seq_len, context.generator("training")
    )
    model.train()
    for step in range(settings.steps):
        rate = settings.lr * lr_factor(step, settings)
        dense = {}
        with torch.no_grad():
            for name, linear in linears.items():
                keep = keep_n_of_m(linear.weight.abs(), 2, 4)
                linear.weight.mul_(torch.where(keep, 1.0, 1 - rate * decay))
                dense[name] = linear.weight.clone()
                linear.weight.mul_(keep)
        ids = next(batches)
        logits = model(input_ids=ids).logits
        loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
        with torch.no_grad():
            for name, linear in linears.items():
                linear.weight.copy_(dense[name])
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    return {
        name: linear.weight.detach() * keep_n_of_m(linear.weight.abs(), 2, 4)
        for name, linear in linears.items()
    }


@pytest.mark.parametrize("decay", [0.0, 20.0])
def test_the_whole_run_is_that_of_its_description(decay):
    model, _ = trained(tiny_model("llama"), lambda_w=decay)
    expected = reference(tiny_model("llama"), None, SETTINGS, decay)
    for name, weight in expected.items():
        found = model.get_submodule(name).dense_weight()
        # Adam divides by small numbers: rounding moves single weights, and with them single masks.
        assert ((found == 0) != (weight == 0)).float().mean() <= 0.01
        both = (found != 0) & (weight != 0)
        assert (found - weight)[both].abs().max() <= 0.05 * SETTINGS.lr


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "bert"])
def test_what_comes_out_holds_the_pattern_in_every_layer(family, dtype):
    before = snapshot(tiny_model(family).to(dtype))
    names = [name for name, _ in block_linears(tiny_model(family))]
    model, context = trained(tiny_model(family).to(dtype))
    effects = {effect.module: effect for effect in measure_effect(before, model).effects}
    for name in names:
        assert effects[name].nm_pattern == "2:4"
        assert effects[name].sparsity == pytest.approx(0.5, abs=1e-3)
        assert effects[name].dtype == str(dtype).removeprefix("torch.")
        assert not effects[name].simulated
    assert context.trained_steps == 4
    assert not model.training
    assert 0 < recorded(context)["mask_flips_last_half"] < 0.2


def test_the_stored_layer_computes_what_the_training_layer_computed():
    linear = nn.Linear(32, 16)
    layer = SparseRefinedLinear(linear, n=2, m=4)
    model = tiny_model("llama")
    x = torch.randn(3, 32)
    from harness.nn.semi_structured import SemiStructuredLinear

    stored = SemiStructuredLinear.from_dense((linear.weight * layer.keep).detach(), linear.bias.detach())
    assert torch.equal(stored(x), layer(x))
    # The masks that are stored are those of the final weights.
    model, _ = trained(tiny_model("llama"), steps=3, mask_every=2, backend="dense")
    for _, each in block_linears(model):
        assert ((each.weight != 0).view(len(each.weight), -1, 4).sum(-1) == 2).all()


def test_decay_settles_the_masks():
    """On one model, the same steps: the more masked weights shrink, the fewer masks change."""
    settings = TrainSettings(steps=16, lr=1e-2, batch_size=2, seq_len=16)
    flips = []
    for decay in (0.0, 10.0, 40.0):
        model = tiny_model("llama")
        context = make_context(model, settings=settings)
        trained(model, context, lambda_w=decay)
        flips.append(recorded(context)["mask_flips_last_half"])
    assert flips[0] > flips[1] > flips[2]


def test_masks_are_chosen_every_so_many_steps(monkeypatch):
    calls = []
    choose = SparseRefinedLinear.choose
    monkeypatch.setattr(SparseRefinedLinear, "choose", lambda self: calls.append(self) or choose(self))
    trained(tiny_model("llama"), mask_every=3, steps=7)
    assert len(calls) == 2 * 14


def test_coupled_decay_is_another_training_and_plain_ste_has_none():
    def weights(**options):
        model, context = trained(tiny_model("opt"), **options)
        return torch.cat(
            [m.dense_weight().flatten() for m in model.modules() if hasattr(m, "dense_weight")]
        ), context

    decoupled, _ = weights(lambda_w=5.0)
    coupled, _ = weights(lambda_w=5.0, decay="coupled")
    plain, context = weights(lambda_w=0)
    plain_coupled, _ = weights(lambda_w=0, decay="coupled")
    assert not torch.equal(decoupled, coupled)
    assert not torch.equal(decoupled, plain)
    assert torch.equal(plain, plain_coupled)
    assert recorded(context)["lambda_w"] == 0


def test_without_steps_it_is_pruning_by_magnitude():
    model, context = trained(tiny_model("llama"), steps=0)
    other = nm_prune.METHOD.transform(tiny_model("llama"), nm_prune.NmOptions(), make_context(model))
    for (name, one), (_, two) in zip(model.state_dict().items(), other.state_dict().items(), strict=True):
        assert torch.equal(one, two), name
    assert context.trained_steps == 0
    info = info_from_config(model.config, "shape:tiny", synthetic=True)
    fresh = tiny_model("llama")
    context = make_context(fresh, info)
    trained(fresh, context)
    assert context.trained_steps == 0


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_from_scratch_nothing_of_the_checkpoint_is_left(family):
    model = tiny_model(family)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    model, _ = trained(model, init="scratch", steps=0)
    for name, parameter in model.named_parameters():
        assert not (parameter == 7).any(), name
    again, _ = trained(tiny_model(family), init="scratch", steps=0)
    for (name, one), (_, two) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(one, two), name


# --- bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"lambda_w": -1e-4}, r"lambda_w: .* or equal to 0, not -0.0001; lambda_w: .* 'auto'"),
        ({"lambda_w": "much"}, "lambda_w"),
        ({"lambda_w": float("nan")}, "lambda_w"),
        ({"decay": "l2"}, "decay"),
        ({"mask_every": 0}, "mask_every"),
        ({"n": 6}, "fewer than m"),
        ({"steps": -1}, "steps"),
        ({"init": "random"}, "init"),
    ],
)
def test_bad_options_are_named(bad, words):
    with pytest.raises(ConfigError, match=words):
        SrSteOptions.parse(bad)


def test_options_as_the_command_line_gives_them():
    assert SrSteOptions.parse({"lambda_w": "auto"}) == SrSteOptions()
    assert SrSteOptions.parse({"lambda_w": 2e-4}).lambda_w == 2e-4
    assert SrSteOptions.parse({"lambda_w": 0}).lambda_w == 0


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"m": 24}, NotApplicable, "m=24 does not divide a width of 128"),
        ({"m": 512}, NotApplicable, "narrower than a group"),
        ({"targets": "nowhere"}, ConfigError, "nowhere"),
        ({"lambda_w": 400.0}, ConfigError, "change their sign"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_changes(options, error, words):
    model, original = tiny_model("llama"), tiny_model("llama")
    with pytest.raises(error, match=words):
        trained(model, **options)
    for name, parameter in original.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name))


def test_missing_text_and_weights_that_are_no_numbers_are_said():
    model = tiny_model("llama")
    with pytest.raises(ConfigError, match="has 10 tokens"):
        trained(model, make_context(model, tokens=torch.zeros(10, dtype=torch.int64)))
    with pytest.raises(NotApplicable, match="no head for masked tokens"):
        trained(tiny_model("encoder"))
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("inf")
    with pytest.raises(NumericalFailure, match="up_proj: weights are NaN or infinite"):
        trained(model)
    scratch = info_from_config(tiny_model("llama").config, "llama", scratch=True)
    assert "init=scratch" in METHOD.applies(scratch, SrSteOptions())
    assert METHOD.needs_of(SrSteOptions()) == {"training"}
    assert METHOD.needs_of(SrSteOptions(steps=0)) == frozenset()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("decay", ["coupled", "decoupled"])
def test_on_cuda_it_trains_and_holds_the_pattern(decay):
    model, context = trained(tiny_model("llama").bfloat16().cuda(), decay=decay, init="scratch")
    assert context.trained_steps == 4
    names = [name for name, _ in block_linears(tiny_model("llama"))]
    for name in names:
        weight = model.get_submodule(name).dense_weight()
        assert ((weight != 0).view(len(weight), -1, 4).sum(-1) <= 2).all()
