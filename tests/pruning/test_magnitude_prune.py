"""Magnitude pruning against brute force: exact counts, ties, optimality, zeros that stay zero."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from harness_plugins.pruning.magnitude_prune import (
    METHOD,
    MagnitudeOptions,
    bitmap_bytes,
    keep_masks,
)

from harness.errors import ConfigError
from harness.measure.effect import measure_effect, snapshot
from harness.models.info import info_from_config
from harness.nn.magnitude import (
    count_of,
    global_keep_masks,
    keep_largest,
    keep_largest_of_rows,
)
from harness.nn.surgery import block_linears
from harness.testing import make_context, tiny_model
from harness.training import TrainSettings


def _brute_force(weights: list[torch.Tensor], pruned: int) -> list[torch.Tensor]:
    """Sort all entries by (magnitude, weight, place) and drop the first ones."""
    entries = [
        (abs(value), which, place)
        for which, weight in enumerate(weights)
        for place, value in enumerate(weight.float().flatten().tolist())
    ]
    dropped = {(which, place) for _, which, place in sorted(entries)[:pruned]}
    return [
        torch.tensor([(which, place) not in dropped for place in range(weight.numel())]).view(weight.shape)
        for which, weight in enumerate(weights)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.29, 0.5, 0.9, 0.999])
def test_kept_are_the_largest_in_exact_number(dtype, sparsity):
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(7, 12, generator=generator), 3 * torch.randn(20, 5, generator=generator)]
    weights = [weight.to(dtype) for weight in weights]
    pruned = count_of(sparsity, 184)
    masks = keep_largest(weights, pruned)
    for mask, expected in zip(masks, _brute_force(weights, pruned), strict=True):
        assert torch.equal(mask, expected)
    assert sum(int((~mask).sum()) for mask in masks) == pruned


@pytest.mark.parametrize("value", [0.0, -0.0, 1.5])
def test_ties_go_by_place_and_the_count_stays_exact(value):
    weights = [torch.full((3, 4), value), torch.full((2, 5), -value)]
    for pruned in range(23):
        masks = keep_largest(weights, pruned)
        flat = torch.cat([mask.flatten() for mask in masks])
        assert flat.tolist() == [False] * pruned + [True] * (22 - pruned)
    rows = keep_largest_of_rows(weights[0], 3)
    assert rows.tolist() == [[False, False, False, True]] * 3


def test_rows_compete_only_with_themselves():
    weight = torch.randn(6, 10) * torch.logspace(-3, 3, 6)[:, None]
    mask = keep_largest_of_rows(weight, 4)
    for row, kept in zip(weight, mask, strict=True):
        assert torch.equal(kept, _brute_force([row[None]], 4)[0][0])


def test_shares_lose_nothing_to_rounding():
    for total in (10, 100, 997, 4096):
        for step in range(total):
            assert count_of(step / total, total) == step
    assert count_of(0.5, 7) == 3


def test_survivors_of_normal_weights_hold_the_known_share():
    """Half of N(0, 1): 2 phi(z) of the L1 norm and 1 - 2 (1/4 - z phi(z)) of the energy."""
    weight = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    kept = weight[keep_largest([weight], weight.numel() // 2)[0]]
    z = 0.6744897501960817
    density = math.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    norm = float(kept.abs().sum() / weight.abs().sum())
    energy = float(kept.square().sum() / weight.square().sum())
    assert norm == pytest.approx(0.797, abs=0.003)
    assert norm == pytest.approx(math.exp(-z * z / 2), abs=0.003)
    assert energy == pytest.approx(0.929, abs=0.003)
    assert energy == pytest.approx(0.5 + 2 * z * density, abs=0.003)


def test_no_mask_of_that_size_is_closer():
    """All C(16, 8) = 12,870 masks of a 4x4 matrix."""
    weight = torch.randn(4, 4, generator=torch.Generator().manual_seed(1))
    squares = weight.flatten().square().double()
    kept = torch.tensor(list(itertools.combinations(range(16), 8)))
    assert len(kept) == 12_870
    errors = squares.sum() - squares[kept].sum(1)
    ours = squares[~keep_largest([weight], 8)[0].flatten()].sum()
    assert ours == pytest.approx(float(errors.min()), abs=1e-12)


def test_global_scope_spares_small_layers_and_stays_exact():
    generator = torch.Generator().manual_seed(0)
    small, large = (torch.randn(20, 30, generator=generator) * scale for scale in (1e-4, 1.0))
    masks = global_keep_masks([small, large], 0.5, 0.1)
    kept = [int(mask.sum()) for mask in masks]
    assert sum(kept) == 600
    assert kept[0] == 60  # a tenth of 600: without the floor all of them would go
    assert torch.equal(masks[0], _brute_force([small], 540)[0])
    assert torch.equal(masks[1], _brute_force([large], 60)[0])
    free = global_keep_masks([small, large], 0.5, 0.0)
    assert [int(mask.sum()) for mask in free] == [0, 600]
    even = global_keep_masks([large, -large], 0.5, 0.01)
    assert [int(mask.sum()) for mask in even] == [
        int(mask.sum()) for mask in _brute_force([large, -large], 600)
    ]


@pytest.mark.parametrize("total", [100, 12_000 * 12_000, 12_687_769_600])
def test_counts_of_any_size_are_exact(total):
    for percent in range(100):
        assert count_of(percent / 100, total) == percent * total // 100
        if percent:
            assert count_of(percent / 100 - 1e-8, 100 * total) < percent * total


def test_weights_may_lie_transposed_in_memory():
    weight = torch.tensor([[1.0, 1.0, 3.0], [2.0, 1.0, 1.0]])
    expected = keep_largest([weight], 3)[0]
    assert torch.equal(keep_largest([weight.t().contiguous().t()], 3)[0], expected)
    assert expected.tolist() == [[False, False, True], [True, False, True]]


def test_an_unreachable_global_sparsity_is_an_error():
    with pytest.raises(ConfigError, match="min_layer_density"):
        global_keep_masks([torch.randn(10, 10)], 0.95, 0.1)


@pytest.mark.parametrize(("sparsity", "density"), [(0.99, 0.01), (0.9, 0.1), (0.7, 0.3)])
def test_shares_that_add_up_to_one_can_be_had(sparsity, density):
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(rows, 96, generator=generator) * rows for rows in (96, 97, 256)]
    masks = global_keep_masks(weights, sparsity, density)
    assert sum(int((~mask).sum()) for mask in masks) == count_of(sparsity, 449 * 96)
    assert all(int(mask.sum()) >= count_of(density, mask.numel()) for mask in masks)


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "bert", "encoder"])
@pytest.mark.parametrize("scope", ["layer", "row", "global"])
def test_every_targeted_layer_is_pruned_and_nothing_else(family, scope):
    model, original = tiny_model(family), tiny_model(family)
    METHOD.transform(model, MagnitudeOptions(sparsity=0.3, scope=scope), make_context(model))
    targets = dict(block_linears(original))
    weights = {name: linear.weight for name, linear in targets.items()}
    masks = keep_masks(weights, 0.3, scope)
    zeros = places = 0
    for name, linear in block_linears(model):
        assert torch.equal(linear.weight, weights[name] * masks[name])
        layer_zeros = int((linear.weight == 0).sum())
        assert layer_zeros > 0
        if scope == "layer":
            assert layer_zeros == count_of(0.3, linear.weight.numel())
        if scope == "row":
            assert ((linear.weight == 0).sum(1) == count_of(0.3, linear.weight.shape[1])).all()
        zeros, places = zeros + layer_zeros, places + linear.weight.numel()
    assert scope != "global" or zeros == count_of(0.3, places)
    pruned = {f"{name}.weight" for name in targets}
    for name, parameter in original.named_parameters():
        if name not in pruned:
            assert torch.equal(parameter, model.get_parameter(name))


def test_targets_narrow_the_layers():
    model, original = tiny_model("llama"), tiny_model("llama")
    METHOD.transform(model, MagnitudeOptions(targets=r"mlp\."), make_context(model))
    for (name, linear), (_, before) in zip(block_linears(model), block_linears(original), strict=True):
        assert torch.equal(linear.weight, before.weight) == ("mlp" not in name)
    with pytest.raises(ConfigError, match="nowhere"):
        METHOD.transform(model, MagnitudeOptions(targets="nowhere"), make_context(model))


def test_no_sparsity_changes_no_bit():
    model, original = tiny_model("opt"), tiny_model("opt")
    METHOD.transform(model, MagnitudeOptions(sparsity=0.0), make_context(model))
    for name, parameter in original.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name))


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_zeros_stay_zero_through_retraining(scope):
    """With momentum, weight decay and a high rate; the survivors do move."""
    model = tiny_model("llama")
    settings = TrainSettings(lr=1e-2, batch_size=2, seq_len=16, weight_decay=0.3)
    context = make_context(model, settings=settings)
    masks = keep_masks({n: linear.weight for n, linear in block_linears(model)}, 0.6, scope)
    before = {name: linear.weight.clone() for name, linear in block_linears(model)}
    METHOD.transform(model, MagnitudeOptions(sparsity=0.6, scope=scope, steps=6), context)
    assert context.trained_steps == 6
    for name, linear in block_linears(model):
        assert (linear.weight[~masks[name]] == 0).all()
        assert not torch.equal(linear.weight[masks[name]], before[name][masks[name]])
        assert linear.weight._backward_hooks in (None, {})


def test_retraining_recovers_more_than_it_costs():
    """On its own training tokens, a retrained pruned model beats the pruned one."""
    tokens = torch.randint(256, (40,), generator=torch.Generator().manual_seed(0)).repeat(100)
    losses = {}
    for steps in (0, 30):
        model = tiny_model("opt")
        settings = TrainSettings(lr=3e-3, batch_size=4, seq_len=40)
        context = make_context(model, tokens=tokens, settings=settings)
        METHOD.transform(model, MagnitudeOptions(sparsity=0.8, steps=steps), context)
        with torch.no_grad():
            losses[steps] = float(model(input_ids=tokens[None, :80], labels=tokens[None, :80]).loss)
    assert losses[30] < losses[0] - 0.5


def test_the_bitmap_size_is_recorded_and_nothing_is_claimed_to_shrink():
    model = tiny_model("llama")
    model.to(torch.bfloat16)
    before = snapshot(model)
    context = make_context(model)
    METHOD.transform(model, MagnitudeOptions(sparsity=0.75), context)
    effect = measure_effect(before, model)
    recorded = {record.metric: record for record in context.records}
    places = sum(linear.weight.numel() for _, linear in block_linears(model))
    # 16-bit weights: a quarter survives, and one bit a place.
    assert recorded["bitmap_bytes"].value == pytest.approx(places * 2 * (0.25 + 1 / 16), rel=0.01)
    assert "dense" in recorded["bitmap_bytes"].note
    assert recorded["pruned_share_of_targets"].value == pytest.approx(0.75, abs=1e-3)
    everything = sum(parameter.numel() for parameter in model.parameters())
    assert recorded["pruned_share_of_all_parameters"].value == pytest.approx(
        0.75 * places / everything, abs=1e-3
    )
    measured = {record.metric: record.value for record in effect.records}
    assert measured["weight_bytes"] == measured["weight_bytes_before"]
    assert measured["sparsity"] == pytest.approx(0.75, abs=1e-3)


def test_bitmap_bytes_by_hand():
    weight = torch.tensor([[1.0, 0.0, 3.0], [0.0, 0.0, 2.0], [1.0, 1.0, 1.0]])
    assert bitmap_bytes(weight, weight != 0) == 2 + 6 * 4


@pytest.mark.parametrize(
    ("bad", "name"),
    [
        ({"sparsity": 1.0}, "sparsity"),
        ({"sparsity": -0.1}, "sparsity"),
        ({"scope": "block"}, "scope"),
        ({"steps": -1}, "steps"),
        ({"min_layer_density": 2}, "min_layer_density"),
        ({"sparsity": 0.995, "scope": "global"}, "sparsity=0.995 cannot be reached"),
    ],
)
def test_bad_options_are_named(bad, name):
    with pytest.raises(ConfigError, match=name):
        MagnitudeOptions.parse(bad)


def test_it_needs_training_only_to_retrain():
    assert MagnitudeOptions.parse({"sparsity_ratio": 0.3}).sparsity == 0.3
    assert METHOD.needs_of(MagnitudeOptions()) == frozenset()
    assert METHOD.needs_of(MagnitudeOptions(steps=3)) == {"training"}
    encoder = info_from_config(tiny_model("encoder").config, "encoder")
    assert METHOD.applies(encoder, MagnitudeOptions()) is None
    assert "steps" in METHOD.applies(encoder, MagnitudeOptions(steps=3))
