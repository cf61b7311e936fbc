"""Masks that hold through training: weights, gradients, moments, and what may come back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from harness.nn.held_masks import HeldMasks, mask_moments
from harness.nn.surgery import block_linears
from harness.testing import make_context, tiny_model
from harness.training import TrainSettings

SETTINGS = TrainSettings(steps=4, lr=1e-2, batch_size=2, seq_len=16, weight_decay=0.3)


def _halves(weights) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.rand(weight.shape, generator=generator) < 0.5 for name, weight in weights.items()}


def _weights(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: linear.weight for name, linear in block_linears(model)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_pruned_weights_have_no_gradient_no_moment_and_no_value(family, dtype):
    model = tiny_model(family).to(dtype)
    context = make_context(model, settings=SETTINGS)
    weights = _weights(model)
    masks = _halves(weights)
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    optimizers, seen = [], []

    def on_step(step: int, model: nn.Module) -> None:
        (optimizer,) = optimizers
        held.hold(step, model)
        for name, weight in weights.items():
            gone = ~masks[name]
            state = optimizer.state[weight]
            seen.append(step)
            assert weight.dtype == torch.float32  # the master weights
            assert (weight[gone] == 0).all()
            assert (weight.grad[gone] == 0).all()
            assert weight.grad[masks[name]].any()
            assert (state["exp_avg"][gone] == 0).all()
            assert (state["exp_avg_sq"][gone] == 0).all()

    def on_start(optimizer: torch.optim.Optimizer) -> None:
        optimizers.append(optimizer)
        held.start(optimizer)

    with HeldMasks(weights, masks) as held:
        context.train(model, on_start=on_start, on_step=on_step)
    assert len(seen) == 4 * len(weights)
    for name, weight in weights.items():
        assert weight.dtype == dtype
        assert (weight[~masks[name]] == 0).all()
        assert not torch.equal(weight[masks[name]], before[name][masks[name]])


def test_after_the_run_the_model_trains_freely():
    model = tiny_model("llama")
    context = make_context(model, settings=SETTINGS)
    weights = _weights(model)
    masks = HeldMasks(weights, _halves(weights))

    def stop(_step: int, _model: nn.Module) -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), masks:
        context.train(model, on_start=masks.start, on_step=stop)
    context.train(model)
    assert all((weight != 0).all() for weight in weights.values())


def test_the_clipped_norm_leaves_pruned_gradients_out():
    """A huge gradient in a pruned place must not make the others small."""
    weight = nn.Parameter(torch.tensor([[1.0, 2.0]]))
    with HeldMasks({"w": weight}, {"w": torch.tensor([[True, False]])}) as held:
        held.start(torch.optim.SGD([weight], lr=1.0))
        (weight * torch.tensor([[3.0, 1e6]])).sum().backward()
        assert weight.grad.tolist() == [[3.0, 0.0]]


def test_what_is_remembered_comes_back_and_only_that():
    start = torch.tensor([[1.0, 2.0, 3.0]])
    for remember, restored in ((True, [[1.0, 2.0, 5.0]]), (False, [[0.0, 0.0, 5.0]])):
        weight = nn.Parameter(start.clone())
        held = HeldMasks({"w": weight}, {"w": torch.tensor([[False, False, True]])}, remember=remember)
        assert weight.tolist() == [[0.0, 0.0, 3.0]]
        with torch.no_grad():
            weight[0, 2] = 5.0
        assert held.full("w").tolist() == restored
        held.change({"w": torch.tensor([[True, False, False]])})
        assert weight.tolist() == [[restored[0][0], 0.0, 0.0]]
        assert held.full("w").tolist() == (restored if remember else [[0.0, 0.0, 0.0]])
        held.change({"w": torch.tensor([[True, True, True]])})
        assert weight.tolist() == ([[1.0, 2.0, 5.0]] if remember else [[0.0, 0.0, 0.0]])


def test_moments_are_zeroed_and_the_step_count_is_not():
    weight = nn.Parameter(torch.ones(2, 2))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    mask_moments(optimizer, weight, torch.zeros(2, 2, dtype=torch.bool))  # nothing there yet
    weight.sum().backward()
    optimizer.step()
    keep = torch.tensor([[True, False], [True, True]])
    with HeldMasks({"w": weight}, {"w": torch.ones(2, 2, dtype=torch.bool)}) as held:
        held.start(optimizer)
        held.change({"w": keep})
    state = optimizer.state[weight]
    assert (state["exp_avg"] != 0).tolist() == keep.tolist()
    assert (state["exp_avg_sq"] != 0).tolist() == keep.tolist()
    assert float(state["step"]) == 1
