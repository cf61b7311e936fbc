"""Top-KAST: both masks at every step, what moves and what never does, and plain torch beside it."""

from __future__ import annotations

import pytest
import torch
from harness_plugins.sparsity._exploration import Exploration, largest_shares, penalty_gradient
from harness_plugins.sparsity.top_kast import METHOD, TopKastOptions

from harness.errors import ConfigError
from harness.models.info import info_from_config
from harness.nn.surgery import block_linears
from harness.testing import make_context, tiny_model
from harness.tokens import RandomTokens, training_batches
from harness.training import TrainSettings, lr_factor
from tests.pruning.reference import masked_training

STEPS = 8
SETTINGS = TrainSettings(steps=STEPS, lr=5e-3, batch_size=2, seq_len=16, weight_decay=0.3)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_the_largest_shares_by_a_plain_sort_are_nested(scope):
    generator = torch.Generator().manual_seed(0)
    weights = {"a": torch.randn(7, 9, generator=generator), "b": 3 * torch.randn(11, 5, generator=generator)}
    masks = {share: largest_shares(weights, share, scope=scope) for share in (0.2, 0.5, 1.0)}
    for share, chosen in masks.items():
        groups = [["a"], ["b"]] if scope == "layer" else [["a", "b"]]
        for group in groups:
            values = torch.cat([weights[name].abs().flatten() for name in group])
            mask = torch.cat([chosen[name].flatten() for name in group])
            count = round(share * len(values))
            assert int(mask.sum()) == count
            assert values[mask].sum() == pytest.approx(
                values.sort().values[len(values) - count :].sum().item()
            )
    for name in weights:
        assert not (masks[0.2][name] & ~masks[0.5][name]).any()
        assert masks[1.0][name].all()


@pytest.mark.parametrize("reg", ["l2", "l1"])
def test_the_penalty_is_one_over_the_density_times_stronger_where_it_only_explores(reg):
    weight = torch.full((3,), -0.7, dtype=torch.float64, requires_grad=True)
    active, updated = torch.tensor([True, False, False]), torch.tensor([True, True, False])
    gradient = penalty_gradient(weight.detach(), active, updated, density=0.2, lam=0.3, reg=reg)
    size = weight.square() if reg == "l2" else weight.abs()
    loss = 0.3 * (size[0] + size[1] / 0.2)
    (expected,) = torch.autograd.grad(loss, weight)
    torch.testing.assert_close(gradient, expected)
    assert float(gradient[1] / gradient[0]) == 1 / 0.2


def _watch(monkeypatch, model, settings=SETTINGS, **options):
    """(active, updated, dense before, dense after, forward weights) of every step."""
    steps = []
    after = Exploration._after_step

    def watched(self, *arguments):
        before = {name: value.clone() for name, value in self.dense.items()}
        after(self, *arguments)
        steps.append(
            (
                {name: mask.clone() for name, mask in self.active.items()},
                {name: mask.clone() for name, mask in self.updated.items()},
                before,
                {name: value.clone() for name, value in self.dense.items()},
                {name: weight.detach().clone() for name, weight in self.weights.items()},
            )
        )

    monkeypatch.setattr(Exploration, "_after_step", watched)
    context = make_context(model, settings=settings)
    METHOD.transform(model, TopKastOptions(**options), context)
    return steps, context


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_every_step_moves_the_wider_mask_and_nothing_else(monkeypatch, family):
    """With momentum, a high rate and decay, which would move the rest."""
    model = tiny_model(family)
    steps, _ = _watch(monkeypatch, model, density=0.2, extra=0.3, switch=0.75)
    assert len(steps) == STEPS
    for number, (active, updated, before, after, forward) in enumerate(steps):
        exploring = number < 6
        for name, keep in active.items():
            places = keep.numel()
            assert int(keep.sum()) == round(0.2 * places)
            assert int(updated[name].sum()) == round((0.5 if exploring else 0.2) * places)
            assert not (keep & ~updated[name]).any()
            moved = before[name] != after[name]
            assert not (moved & ~updated[name]).any()
            assert torch.equal(forward[name], after[name] * keep)
            assert bool((moved & ~keep).any()) == exploring
            assert (moved & keep).float().sum() > 0.9 * keep.sum()
    for name, linear in block_linears(model):
        assert torch.equal(linear.weight != 0, steps[-1][0][name])


def test_masks_follow_the_weights_then_stand_still(monkeypatch):
    model = tiny_model("llama")
    settings = TrainSettings(steps=12, lr=5e-3, batch_size=2, seq_len=16)
    steps, context = _watch(monkeypatch, model, settings, refresh=2, switch=0.5)
    names = list(steps[0][0])
    changed = [
        any(not torch.equal(steps[i][0][name], steps[i + 1][0][name]) for name in names) for i in range(11)
    ]
    assert changed == [False, True, False, True, False, True] + 5 * [False]
    for active, _, before, *_ in steps[2:4:2]:
        chosen = largest_shares(before, 0.2, scope="layer")
        assert all(torch.equal(mask, chosen[name]) for name, mask in active.items())
    recorded = {record.metric: record.value for record in context.records}
    replaced = sum(
        int((steps[i + 1][0][name] & ~steps[i][0][name]).sum()) for i in range(11) for name in names
    )
    places = sum(mask.numel() for mask in steps[0][0].values())
    assert recorded["activated_share"] == pytest.approx(replaced / places)
    assert replaced > 0
    assert recorded["pruned_share_of_targets"] == pytest.approx(0.8, abs=1e-3)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_all_weights_active_without_penalty_is_plain_training_to_the_bit(family):
    model, plain = tiny_model(family), tiny_model(family)
    options = TopKastOptions(density=1.0, extra=0.0, lam=0.0)
    METHOD.transform(model, options, make_context(model, settings=SETTINGS))
    make_context(plain, settings=SETTINGS).train(plain)
    assert all(torch.equal(p, plain.get_parameter(name)) for name, p in model.named_parameters())


@pytest.mark.parametrize("reg", ["l2", "l1"])
def test_every_weight_equals_the_papers_form(reg):
    """Dense weights kept aside, a sparse copy computed with, the penalty by its formula."""
    model, original = tiny_model("llama"), tiny_model("llama")
    options = TopKastOptions(density=0.2, extra=0.3, lam=0.01, reg=reg, refresh=2, switch=0.75)
    METHOD.transform(model, options, make_context(model, settings=SETTINGS))
    names = [f"{name}.weight" for name, _ in block_linears(original)]
    masks: tuple[dict, dict] = ({}, {})

    def choose(step, values):
        if step <= 6 and step % 2 == 0:
            for name in names:
                order = values[name].abs().flatten().argsort(descending=True)
                for mask, share in zip(masks, (0.2, 0.5 if step < 6 else 0.2), strict=True):
                    flat = torch.zeros(len(order), dtype=torch.bool)
                    flat[order[: round(share * len(order))]] = True
                    mask[name] = flat.view(values[name].shape)
        return masks

    def penalty(_name, value, active, updated):
        strength = torch.where(active, 1.0, 5.0) * updated
        return 0.01 * strength * (2 * value if reg == "l2" else torch.sign(value))

    stream = training_batches(RandomTokens(256), 2, 16, make_context(original).generator("training"))
    batches = [next(stream) for _ in range(STEPS)]
    rates = [SETTINGS.lr * lr_factor(step, SETTINGS) for step in range(STEPS)]
    *_, last = masked_training(original.train(), batches, rates, SETTINGS, choose, penalty)
    for name, parameter in model.named_parameters():
        expected = last[name] * masks[0][name] if name in names else last[name]
        # Rounding may swap two weights at a threshold, and Adam enlarges it where gradients vanish.
        off = (parameter.detach() - expected).abs()
        moved = (original.get_parameter(name) - expected).abs().mean()
        assert off.mean() < 2e-3 * moved, name
        assert (off > 0.01 * moved).float().mean() < 0.02, name


def test_moments_survive_only_where_weights_are_updated(monkeypatch):
    model = tiny_model("llama")
    optimizers, start = [], Exploration.start

    def watched(self, optimizer):
        optimizers.append((self, optimizer))
        start(self, optimizer)

    monkeypatch.setattr(Exploration, "start", watched)
    context = make_context(model, settings=SETTINGS)
    METHOD.transform(model, TopKastOptions(), context)
    ((exploration, optimizer),) = optimizers
    for name, weight in exploration.weights.items():
        moments = optimizer.state[weight]["exp_avg"]
        assert (moments[~exploration.updated[name]] == 0).all()
        assert (moments[exploration.updated[name]] != 0).float().mean() > 0.9


def test_the_model_trains_freely_afterwards():
    model = tiny_model("llama")
    context = make_context(model, settings=SETTINGS)
    METHOD.transform(model, TopKastOptions(), context)
    context.train(model)
    assert all((linear.weight != 0).float().mean() > 0.99 for _, linear in block_linears(model))


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_half_precision_models_end_sparse_in_their_type(family):
    model = tiny_model(family).to(torch.bfloat16)
    METHOD.transform(model, TopKastOptions(scope="global"), make_context(model, settings=SETTINGS))
    zeros = places = 0
    for _, linear in block_linears(model):
        assert linear.weight.dtype == torch.bfloat16
        zeros, places = zeros + int((linear.weight == 0).sum()), places + linear.weight.numel()
    assert zeros / places == pytest.approx(0.8, abs=1e-3)


def test_random_weights_are_only_cut():
    model, original = tiny_model("opt"), tiny_model("opt")
    info = info_from_config(model.config, "shape:x", synthetic=True)
    context = make_context(model, info, settings=TrainSettings(steps=0))
    METHOD.transform(model, TopKastOptions(density=0.25), context)
    for (_, linear), (_, before) in zip(block_linears(model), block_linears(original), strict=True):
        kept = linear.weight != 0
        assert int(kept.sum()) == round(0.25 * kept.numel())
        assert torch.equal(linear.weight, before.weight * kept)


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        ({"density": 0.0}, "density"),
        ({"density": 1.1}, "density"),
        ({"density": 0.8, "extra": 0.3}, "together more than all weights"),
        ({"refresh": 0}, "refresh"),
        ({"switch": 1.5}, "switch"),
        ({"lam": -1}, "lam"),
        ({"reg": "l3"}, "reg"),
        ({"steps": 0}, "steps"),
        ({"scope": "row"}, "scope"),
    ],
)
def test_bad_options_are_named(bad, text):
    with pytest.raises(ConfigError, match=text) as caught:
        TopKastOptions.parse(bad)
    assert "\n" not in str(caught.value)


def test_the_papers_letters_are_accepted_and_all_weights_are_no_more_than_all():
    assert TopKastOptions.parse({"D": 0.1, "M": 0.2}) == TopKastOptions(density=0.1, extra=0.2)
    TopKastOptions(density=0.7, extra=0.3)


def test_what_cannot_be_trained_is_refused_before_anything_changes():
    model, original = tiny_model("llama"), tiny_model("llama")
    with pytest.raises(ConfigError, match="needs at least 1 step"):
        METHOD.transform(model, TopKastOptions(), make_context(model, settings=TrainSettings(steps=0)))
    assert all(torch.equal(p, original.get_parameter(name)) for name, p in model.named_parameters())
    with pytest.raises(ConfigError, match="the text has 5 tokens"):
        METHOD.transform(
            model, TopKastOptions(), make_context(model, tokens=torch.arange(5), settings=SETTINGS)
        )
    encoder = info_from_config(tiny_model("bert").config, "bert")
    assert "encoders" in METHOD.applies(encoder, TopKastOptions())
