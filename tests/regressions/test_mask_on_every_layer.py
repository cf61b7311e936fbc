"""A pruning mask applied only to the last layer of a group: here every layer is pruned, measurably."""

from __future__ import annotations

import copy

import pytest
import torch

from harness.measure.effect import measure_effect, snapshot
from harness.nn.surgery import block_linears
from harness.plugins import load_plugins
from harness.testing import make_context

SPARSITY = 0.5


def pruned_by(model, transform):
    before = snapshot(model)
    return measure_effect(before, transform(copy.deepcopy(model)))


def sparsities(effect, names):
    found = {each.module: each.sparsity for each in effect.effects}
    return [found[name] for name in names]


def mask_of_the_last(model):
    """What others ship: the loop over a group's layers keeps the mask of its last turn only."""
    groups: dict[str, list[torch.nn.Module]] = {}
    for name, linear in block_linears(model):
        groups.setdefault(name.rpartition(".")[0], []).append(linear)
    with torch.no_grad():
        for linears in groups.values():
            for linear in linears:
                weight = linear.weight
                mask = weight.abs() > weight.abs().median()
            weight.mul_(mask)
    return model


@pytest.mark.parametrize("scope", ["layer", "row", "global"])
def test_every_layer_of_every_group_is_pruned(tiny_llama, scope):
    method = load_plugins().methods["magnitude-prune"]
    options = method.options(sparsity=SPARSITY, scope=scope)
    names = [name for name, _ in block_linears(tiny_llama)]
    effect = pruned_by(tiny_llama, lambda model: method.transform(model, options, make_context(model)))
    found = sparsities(effect, names)
    assert len(found) == 2 * 7
    assert found == pytest.approx([SPARSITY] * len(names), abs=0.15 if scope == "global" else 0.005)


def test_a_method_that_prunes_one_layer_of_each_group_cannot_hide_it(tiny_llama):
    names = [name for name, _ in block_linears(tiny_llama)]
    effect = pruned_by(tiny_llama, mask_of_the_last)
    found = sparsities(effect, names)
    assert sum(value > 0.4 for value in found) == 4, "the last of attention and of the MLP, in two blocks"
    assert sum(value < 0.01 for value in found) == 10
    changed = {each.module for each in effect.effects if each.changed}
    assert len(changed & set(names)) == 4
    share = next(r.value for r in effect.records if r.metric == "parameters_changed_share")
    assert share < 0.35
