"""What pruning costs when the model trains meanwhile or again: gradual, iterative, rewound, at random."""

from __future__ import annotations

import pytest
import torch
from harness_plugins.pruning import gmp, iterative_prune, lottery_rewind, lr_rewind
from harness_plugins.sparsity import top_kast

from harness.models.info import info_from_config
from harness.testing import make_context, tiny_model
from harness.training import TrainSettings
from tests.nano_bed import dense_nll, means_over_seeds, nano_nll

STEPS = 100


@pytest.mark.parametrize("method", [gmp, iterative_prune, lottery_rewind, lr_rewind, top_kast])
def test_four_fifths_of_the_weights_can_go(method):
    """A text that repeats: all of them learn it, sparse, where an untrained model is at ln(256) = 5.5."""
    tokens = torch.randint(256, (40,), generator=torch.Generator().manual_seed(0)).repeat(100)
    model = tiny_model("opt")
    info = info_from_config(model.config, "scratch:x", scratch=True)
    settings = TrainSettings(steps=40, lr=3e-3, batch_size=4, seq_len=40)
    context = make_context(model, info, tokens=tokens, settings=settings)
    options = {"steps_per_cycle": 5} if method is iterative_prune else {}
    method.METHOD.transform(model, method.METHOD.options.parse(options), context)
    with torch.no_grad():
        loss = model(input_ids=tokens[None, :80], labels=tokens[None, :80]).loss.item()
    assert loss < 2.5


@pytest.mark.slow
def test_gradual_and_iterative_pruning_against_one_cut():
    """All after the same dense run, at 80 %.

    Measured, nats: the dense run twice 5.468, one cut 5.532, gradual 5.493; three cycles in the same steps
    5.566, three cycles of a whole run each 5.151. The models are far from trained, so more training wins.
    """
    iterative = iterative_prune.METHOD
    nll = means_over_seeds(
        {
            "dense, twice": lambda seed: dense_nll(seed, STEPS, again=True),
            "one cut": lambda seed: nano_nll(iterative, seed, STEPS, p=0.8),
            "gradual": lambda seed: nano_nll(gmp.METHOD, seed, STEPS, dense_first=True),
            "cycles": lambda seed: nano_nll(iterative, seed, STEPS, p=0.4154, steps_per_cycle=STEPS // 3),
            "long cycles": lambda seed: nano_nll(iterative, seed, STEPS, p=0.4154),
        }
    )
    assert nll["gradual"] <= nll["one cut"] + 0.03
    assert nll["long cycles"] <= nll["one cut"] + 0.02


@pytest.mark.slow
def test_rewinding_against_fine_tuning_and_random_tickets():
    """Each prunes the same trained network once, to 80 %, and trains it once more.

    Measured, nats: dense 5.849, fine-tuning at the last rate 5.803, weights rewound 5.608, rates rewound
    5.532, random mask 5.907, random initial weights 5.806. Dense, trained twice as long: 5.468.
    """
    lottery = lottery_rewind.METHOD
    nll = means_over_seeds(
        {
            "dense": lambda seed: dense_nll(seed, STEPS),
            "fine-tuning": lambda seed: nano_nll(
                iterative_prune.METHOD, seed, STEPS, p=0.8, retrain="fine-tune"
            ),
            "weights": lambda seed: nano_nll(lottery, seed, STEPS),
            "rates": lambda seed: nano_nll(lr_rewind.METHOD, seed, STEPS),
            "random mask": lambda seed: nano_nll(lottery, seed, STEPS, control="random-mask"),
            "random init": lambda seed: nano_nll(lottery, seed, STEPS, control="random-init"),
        }
    )
    assert nll["weights"] <= nll["random mask"] - 0.02
    assert nll["weights"] <= nll["fine-tuning"] + 0.02
    assert nll["rates"] <= nll["fine-tuning"]
    assert nll["rates"] <= nll["weights"] + 0.02
