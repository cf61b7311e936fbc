"""Prune, retrain, repeat: counts of every cycle, nested masks, and one cycle equal to one-shot pruning."""

from __future__ import annotations

import itertools

import pytest
import torch
from harness_plugins.pruning import magnitude_prune
from harness_plugins.pruning.iterative_prune import METHOD, IterativeOptions, cycle_sparsities

from harness.errors import ConfigError
from harness.models.info import info_from_config
from harness.nn.held_masks import HeldMasks
from harness.nn.magnitude import keep_largest
from harness.nn.surgery import block_linears
from harness.testing import make_context, tiny_model
from harness.training import TrainSettings

SETTINGS = TrainSettings(steps=3, lr=1e-2, batch_size=2, seq_len=16, weight_decay=0.3)


def _state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def _equal(first, second) -> bool:
    return all(torch.equal(value, second[name]) for name, value in first.items())


def test_the_cycles_of_the_paper():
    assert cycle_sparsities(1 - 0.8**10, 0.2) == pytest.approx([1 - 0.8**c for c in range(1, 11)])
    assert len(cycle_sparsities(0.8, 0.2)) == 8
    assert cycle_sparsities(0.8, 0.8) == [0.8]
    assert cycle_sparsities(0.5, 0.9) == [0.5]
    assert cycle_sparsities(0.0, 0.2) == []


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_every_cycle_prunes_its_share_and_nothing_comes_back(monkeypatch, scope):
    seen, change = [], HeldMasks.change

    def watched(self, masks):
        change(self, masks)
        seen.append({name: mask.clone() for name, mask in self.masks.items()})

    monkeypatch.setattr(HeldMasks, "change", watched)
    model = tiny_model("llama")
    context = make_context(model, settings=SETTINGS)
    METHOD.transform(model, IterativeOptions(sparsity=0.6, scope=scope), context)
    cycles = seen[1:]
    shares = cycle_sparsities(0.6, 0.2)
    assert len(cycles) == len(shares) == 5
    places = sum(mask.numel() for mask in cycles[0].values())
    slack = 1 if scope == "global" else len(cycles[0])
    for masks, share in zip(cycles, shares, strict=True):
        zeros = sum(int((~mask).sum()) for mask in masks.values())
        assert abs(zeros - share * places) <= slack
    for masks, following in itertools.pairwise(cycles):
        assert not any((following[name] & ~keep).any() for name, keep in masks.items())
    assert context.trained_steps == 5 * 3
    for name, linear in block_linears(model):
        assert torch.equal(linear.weight != 0, cycles[-1][name])


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_cycle_is_one_shot_pruning_with_retraining(family, dtype):
    one_shot, iterative = tiny_model(family).to(dtype), tiny_model(family).to(dtype)
    options = {"sparsity": 0.7, "scope": "global"}
    magnitude_prune.METHOD.transform(
        one_shot,
        magnitude_prune.MagnitudeOptions(steps=3, **options),
        make_context(one_shot, settings=SETTINGS),
    )
    METHOD.transform(
        iterative, IterativeOptions(p=0.7, **options), make_context(iterative, settings=SETTINGS)
    )
    assert _equal(one_shot.state_dict(), iterative.state_dict())


def test_without_steps_many_cycles_are_one():
    model, original = tiny_model("opt"), tiny_model("opt")
    METHOD.transform(model, IterativeOptions(sparsity=0.8, steps_per_cycle=0), make_context(model))
    before = {name: linear.weight for name, linear in block_linears(original)}
    pruned = int(0.8 * sum(weight.numel() for weight in before.values()))
    masks = keep_largest(list(before.values()), pruned)
    for (name, linear), keep in zip(block_linears(model), masks, strict=True):
        assert torch.equal(linear.weight, before[name] * keep)
    assert METHOD.needs_of(IterativeOptions(steps_per_cycle=0)) == frozenset()
    assert METHOD.needs_of(IterativeOptions()) == {"training"}


def test_cycles_see_other_text_and_their_own_schedule():
    model = tiny_model("llama")
    context = make_context(model, settings=SETTINGS)
    calls, train = [], context.train
    context.train = lambda model, **how: calls.append(how) or train(model, **how)
    METHOD.transform(model, IterativeOptions(sparsity=0.36), context)
    assert len({call["stream"] for call in calls}) == 2
    assert [call["lr"] for call in calls] == [1e-2, 1e-2]
    assert {call["final_share"] for call in calls} == {None}
    calls.clear()
    context.records.clear()
    METHOD.transform(model, IterativeOptions(sparsity=0.9, p=0.9, retrain="fine-tune"), context)
    (call,) = calls
    assert (call["lr"], call["warmup_share"], call["final_share"]) == (1e-2 * 0.05, 0.0, 1.0)


def test_a_scratch_model_is_trained_first():
    model, dense = tiny_model("llama"), tiny_model("llama")
    info = info_from_config(model.config, "scratch:x", scratch=True)
    context = make_context(model, info, settings=SETTINGS)
    METHOD.transform(model, IterativeOptions(sparsity=0.5, steps_per_cycle=0), context)
    make_context(dense, info, settings=SETTINGS).train(dense)
    for (_, linear), (_, trained) in zip(block_linears(model), block_linears(dense), strict=True):
        kept = linear.weight != 0
        assert torch.equal(linear.weight[kept], trained.weight[kept])
    with pytest.raises(ConfigError, match="needs at least 1 step"):
        METHOD.transform(
            model, IterativeOptions(), make_context(model, info, settings=TrainSettings(steps=0))
        )


def test_no_sparsity_changes_no_bit():
    model = tiny_model("opt")
    before = _state(model)
    METHOD.transform(model, IterativeOptions(sparsity=0.0), make_context(model))
    assert _equal(before, model.state_dict())


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        ({"sparsity": 1.0}, "sparsity"),
        ({"p": 1.0}, "p"),
        ({"p": 0.0}, "p"),
        ({"sparsity": 0.9, "p": 0.01}, "takes 230 cycles"),
        ({"p": 1e-12}, r"takes 16\d+ cycles"),
        ({"sparsity": 0.995, "p": 0.5}, "sparsity=0.995 cannot be reached"),
        ({"steps": -1}, "steps_per_cycle"),
        ({"retrain": "rewind"}, "retrain"),
        ({"lr": -1}, "lr"),
    ],
)
def test_bad_options_are_named(bad, text):
    with pytest.raises(ConfigError, match=text) as caught:
        IterativeOptions.parse(bad)
    assert "\n" not in str(caught.value)


def test_no_training_text_and_no_objective_are_refused():
    model = tiny_model("llama")
    with pytest.raises(ConfigError, match="the text has 5 tokens"):
        METHOD.transform(
            model, IterativeOptions(), make_context(model, tokens=torch.arange(5), settings=SETTINGS)
        )
    encoder = info_from_config(tiny_model("encoder").config, "encoder")
    assert "encoders" in METHOD.applies(encoder, IterativeOptions())
    assert METHOD.applies(encoder, IterativeOptions(steps_per_cycle=0)) is None
