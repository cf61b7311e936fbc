"""Gradual magnitude pruning: its curve, its counts, and its weights against the paper's form in torch."""

from __future__ import annotations

import itertools

import pytest
import torch
from harness_plugins.pruning.gmp import METHOD, GmpOptions, cubic_sparsity, pruning_schedule

from harness.errors import ConfigError
from harness.models.info import info_from_config
from harness.nn.held_masks import HeldMasks
from harness.nn.magnitude import count_of, keep_largest
from harness.nn.surgery import block_linears
from harness.testing import make_context, tiny_model
from harness.tokens import RandomTokens, training_batches
from harness.training import TrainSettings, lr_factor
from tests.pruning.reference import masked_training

SETTINGS = TrainSettings(steps=12, lr=5e-3, batch_size=2, seq_len=16, weight_decay=0.3)
WHOLE = {"start": 0.1, "end": 0.8, "every": None}


@pytest.mark.parametrize("steps", [3, 10, 100, 450])
def test_the_curve_starts_and_ends_where_it_should(steps):
    schedule = pruning_schedule(steps, **WHOLE, initial=0.0, final=0.8)
    times, shares = list(schedule), list(schedule.values())
    assert times[0] == round(0.1 * steps)
    assert times[-1] <= round(0.8 * steps)
    assert len({b - a for a, b in itertools.pairwise(times)}) == 1
    assert (shares[0], shares[-1]) == (0.0, 0.8)
    assert shares == sorted(shares)


def test_half_way_seven_eighths_are_done():
    assert cubic_sparsity(0.5, 0.0, 0.8) == pytest.approx(0.875 * 0.8)
    assert cubic_sparsity(0.0, 0.2, 0.8) == pytest.approx(0.2)
    assert cubic_sparsity(0.25, 0.2, 0.6) == pytest.approx(0.6 - 0.4 * 0.421875)
    by_hand = {10: 0.0, 15: 0.578125 * 0.8, 20: 0.875 * 0.8, 25: 0.984375 * 0.8, 30: 0.8}
    schedule = pruning_schedule(100, start=0.1, end=0.33, every=5, initial=0.0, final=0.8)
    assert schedule == pytest.approx(by_hand)


def _run(monkeypatch, model, settings=SETTINGS, **options):
    """The masks, stored values and weights after every change of the masks."""
    changes: list[tuple[dict, dict, dict]] = []
    change = HeldMasks.change

    def watched(self, masks):
        change(self, masks)
        if len(masks):
            changes.append(
                (
                    {n: m.clone() for n, m in self.masks.items()},
                    {n: self.full(n).clone() for n in self.weights},
                    {n: w.detach().clone() for n, w in self.weights.items()},
                )
            )

    monkeypatch.setattr(HeldMasks, "change", watched)
    context = make_context(model, settings=settings)
    METHOD.transform(model, GmpOptions(**options), context)
    return changes[1:], context  # the first one keeps all


@pytest.mark.parametrize("revive", [True, False])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_every_pruning_hits_its_count(monkeypatch, scope, revive):
    model = tiny_model("llama")
    changes, _ = _run(monkeypatch, model, scope=scope, revive=revive, sparsity=0.75)
    schedule = pruning_schedule(12, **WHOLE, initial=0.0, final=0.75)
    assert len(changes) == len(schedule)
    for (masks, _, _), share in zip(changes, schedule.values(), strict=True):
        zeros = {name: int((~mask).sum()) for name, mask in masks.items()}
        if scope == "layer":
            assert zeros == {name: count_of(share, mask.numel()) for name, mask in masks.items()}
        else:
            assert sum(zeros.values()) == count_of(share, sum(mask.numel() for mask in masks.values()))
    for name, linear in block_linears(model):
        assert torch.equal(linear.weight != 0, changes[-1][0][name])


def test_pruned_values_are_kept_to_the_bit_and_may_return(monkeypatch):
    """With momentum, a high rate and decay, which would move them."""
    changes, _ = _run(monkeypatch, tiny_model("llama"), sparsity=0.5)
    returned = 0
    for (masks, stored, _), (next_masks, next_stored, next_weights) in itertools.pairwise(changes):
        for name, keep in masks.items():
            assert torch.equal(next_stored[name][~keep], stored[name][~keep])
            back = next_masks[name] & ~keep
            returned += int(back.sum())
            assert torch.equal(next_weights[name][back], stored[name][back])
    assert returned > 0


def test_without_revival_masks_are_nested(monkeypatch):
    changes, _ = _run(monkeypatch, tiny_model("llama"), sparsity=0.5, revive=False)
    for (masks, _, _), (next_masks, _, _) in itertools.pairwise(changes):
        for name, keep in masks.items():
            assert not (next_masks[name] & ~keep).any()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_weight_equals_the_papers_form(family):
    """Dense values kept aside, a masked copy computed with; OPT drops out, so it cannot be compared."""
    model, original = tiny_model(family), tiny_model(family)
    for each in (model, original):
        for module in each.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            if hasattr(module, "attn_dropout") and isinstance(module.attn_dropout, float):
                module.attn_dropout = 0.0
    context = make_context(model, settings=SETTINGS)
    METHOD.transform(model, GmpOptions(sparsity=0.6), context)
    schedule = pruning_schedule(12, **WHOLE, initial=0.0, final=0.6)
    names = [f"{name}.weight" for name, _ in block_linears(original)]
    masks = {name: torch.ones_like(original.get_parameter(name), dtype=torch.bool) for name in names}

    def choose(step, values):
        if step in schedule:
            for name in names:
                dropped = count_of(schedule[step], values[name].numel())
                order = values[name].abs().flatten().sort(stable=True).indices
                masks[name] = torch.ones(values[name].numel(), dtype=torch.bool)
                masks[name][order[:dropped]] = False
                masks[name] = masks[name].view(values[name].shape)
        return dict(masks), dict(masks)

    stream = training_batches(RandomTokens(256), 2, 16, make_context(original).generator("training"))
    batches = [next(stream) for _ in range(12)]
    rates = [SETTINGS.lr * lr_factor(step, SETTINGS) for step in range(12)]
    *_, last = masked_training(original.train(), batches, rates, SETTINGS, choose)
    for name, parameter in model.named_parameters():
        expected = last[name] * masks[name] if name in masks else last[name]
        # Rounding may swap two weights at the threshold, and Adam enlarges it where gradients vanish.
        off = (parameter.detach() - expected).abs()
        moved = (original.get_parameter(name) - expected).abs().mean()
        assert off.mean() < 2e-3 * moved, name
        assert (off > 0.01 * moved).float().mean() < 0.02, name


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_half_precision_models_end_sparse_in_their_type(family):
    model = tiny_model(family).to(torch.bfloat16)
    context = make_context(model, settings=SETTINGS)
    METHOD.transform(model, GmpOptions(sparsity=0.6), context)
    for _, linear in block_linears(model):
        assert linear.weight.dtype == torch.bfloat16
        assert int((linear.weight == 0).sum()) >= count_of(0.6, linear.weight.numel())


def test_targets_and_records():
    model, original = tiny_model("llama"), tiny_model("llama")
    context = make_context(model, settings=SETTINGS)
    METHOD.transform(model, GmpOptions(targets=r"mlp\.", sparsity=0.9), context)
    for name, linear in block_linears(model):
        assert bool((linear.weight == 0).any()) == ("mlp" in name)
    recorded = {record.metric: record.value for record in context.records}
    assert recorded["pruned_share_of_targets"] == pytest.approx(0.9, abs=1e-3)
    assert recorded["training_loss"] > 0
    assert not torch.equal(model.get_input_embeddings().weight, original.get_input_embeddings().weight)


def test_random_weights_are_only_pruned():
    model, original = tiny_model("opt"), tiny_model("opt")
    info = info_from_config(model.config, "shape:x", synthetic=True)
    METHOD.transform(model, GmpOptions(sparsity=0.8), make_context(model, info))
    for (_, linear), (_, before) in zip(block_linears(model), block_linears(original), strict=True):
        keep = keep_largest([before.weight], count_of(0.8, before.weight.numel()))[0]
        assert torch.equal(linear.weight, before.weight * keep)


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        ({"sparsity": 1.0}, "sparsity"),
        ({"sparsity": 0.1, "initial": 0.2}, "initial=0.2 is above"),
        ({"start": 0.5, "end": 0.5}, "end=0.5 must be after start"),
        ({"every": 0}, "every"),
        ({"sparsity": 0.995, "scope": "global"}, "sparsity=0.995 cannot be reached"),
        ({"steps": 0}, "steps"),
        ({"lr": 0}, "lr"),
    ],
)
def test_bad_options_are_named(bad, text):
    with pytest.raises(ConfigError, match=text) as caught:
        GmpOptions.parse(bad)
    assert "\n" not in str(caught.value)


def test_the_papers_names_are_accepted():
    assert GmpOptions.parse({"s_f": 0.7, "s_i": 0.1, "dt": 5}) == GmpOptions(
        sparsity=0.7, initial=0.1, every=5
    )


def test_what_cannot_be_trained_is_refused_before_anything_changes():
    model, original = tiny_model("llama"), tiny_model("llama")
    with pytest.raises(ConfigError, match="needs at least 1 step"):
        METHOD.transform(model, GmpOptions(), make_context(model, settings=TrainSettings(steps=0)))
    with pytest.raises(ConfigError, match="no room for prunings 10 steps apart"):
        METHOD.transform(model, GmpOptions(every=10), make_context(model, settings=SETTINGS))
    with pytest.raises(ConfigError, match="the text has 5 tokens"):
        METHOD.transform(model, GmpOptions(), make_context(model, tokens=torch.arange(5), settings=SETTINGS))
    assert all(torch.equal(p, original.get_parameter(name)) for name, p in model.named_parameters())
    encoder = info_from_config(tiny_model("bert").config, "bert")
    assert "encoders" in METHOD.applies(encoder, GmpOptions())
