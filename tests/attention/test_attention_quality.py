"""What local attention and shared heads cost, on recall tasks and on the bundled models."""

from __future__ import annotations

import pytest
import torch
from harness_plugins.attention.block_local import METHOD, BlockLocalOptions
from harness_plugins.attention.mqa import GQA, GqaOptions

from harness.testing import make_context
from harness.training import TrainSettings
from tests.zoo_models import held_out_nll, training_tokens, zoo_model

from .recall import RecallModel, accuracy, dense, needle_batch, recall_batch, sliding, train


@pytest.mark.parametrize("name", ["llama-6m", "opt-4m"])
def test_a_narrower_window_costs_more(name):
    """Measured, nats at 16 / 64 / 256: llama-6m .46 / .13 / .01, opt-4m 1.27 / .45 / .07."""
    original = held_out_nll(zoo_model(name), windows=8, seq_len=512)
    costs = []
    for window in (16, 64, 256, 512):
        model = zoo_model(name)
        METHOD.transform(model, BlockLocalOptions(window=window), make_context(model))
        costs.append(held_out_nll(model, windows=8, seq_len=512) - original)
    assert costs == sorted(costs, reverse=True)
    assert costs[0] > 0.1
    assert costs[3] == 0


@pytest.mark.slow
def test_recall_needs_the_window_to_reach_and_survives_shared_heads():
    """Eight pairs, asked 32 tokens later (chance 0.03). Measured: dense 1, mqa 1, w=16 .029.

    With one head of keys it is learnt later and at once: after 600 steps .55 here, .94 on another machine.
    """
    scores = {}
    for name, attend, kv_heads in (
        ("dense", dense, 2),
        ("mqa", dense, 1),
        ("sliding", sliding(16), 2),
    ):
        torch.manual_seed(0)
        model = train(RecallModel(attend, kv_heads), recall_batch, steps=900)
        scores[name] = accuracy(model, recall_batch(512, torch.Generator().manual_seed(10_000)))
    assert scores["dense"] >= 0.95, "the base model must solve the task"
    assert scores["mqa"] >= 0.75
    assert scores["sliding"] <= 0.10


@pytest.mark.slow
def test_a_needle_is_found_inside_the_window_only():
    near, far = (2, 12), (45, 63)  # two layers of 16 and the convolutions reach 36 tokens
    scores = {}
    for name, attend in (("dense", dense), ("sliding", sliding(16))):
        torch.manual_seed(0)
        model = train(RecallModel(attend), needle_batch, steps=400)
        for place, (nearest, farthest) in (("near", near), ("far", far)):
            batch = needle_batch(512, torch.Generator().manual_seed(1), nearest, farthest)
            scores[name, place] = accuracy(model, batch)
    assert scores["dense", "near"] >= 0.95
    assert scores["dense", "far"] >= 0.95
    assert scores["sliding", "near"] >= scores["dense", "near"] - 0.02
    assert scores["sliding", "far"] <= 0.10


@pytest.mark.slow
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_averaged_heads_recover_better_than_random_ones(groups):
    """25 steps of 8 x 128 on llama-6m: the mean beats random heads by 0.05 nats, as in the paper.

    That it also beats the first head of each group is no law at this size and is not asserted.
    Measured over 3 byte-level models (3 layers, width 128, 8 heads, 500 steps, 2.01 bits per byte;
    25 steps of uptraining), bits per byte with mean / first / random: 4 groups 2.49 / 2.49 / 3.39,
    2 groups 3.03 / 2.93 / 3.41, 1 group 3.32 / 3.12 / 3.42. On llama-6m the mean won each time.
    """
    after = {}
    for init in ("mean", "random"):
        model = zoo_model("llama-6m")
        settings = TrainSettings(batch_size=8, seq_len=128)
        context = make_context(model, tokens=training_tokens(), settings=settings)
        GQA.transform(model, GqaOptions(groups=groups, init=init, steps=25), context)
        after[init] = held_out_nll(model)
    assert after["mean"] <= after["random"] - 0.05
