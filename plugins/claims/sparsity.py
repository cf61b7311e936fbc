"""Claims on N:M sparsity and sparse training."""

from __future__ import annotations

from harness import hookimpl
from harness.claims import Claim, SweepNeed, all_of, loses_less, repairs

from ._grids import DENSE, NANO, OPT, SEEDS, nano

__all__ = ["CLAIMS"]

SECTION = "sparsity"
PERMUTED = "channel-permute:bounded_regressions=2:max_rows=256"
REFINED, PLAIN_STE = "sr-ste:lr=0.003:init=scratch", "sr-ste:lambda_w=0.0:lr=0.003:init=scratch"
EXPLORING, NOT_EXPLORING = "top-kast:lr=0.003", "top-kast:extra=0.0:lr=0.003"

CLAIMS = [
    Claim(
        id="permutation-helps-2-4",
        section=SECTION,
        says="Reordering channels before 2:4 pruning loses less than pruning them as they stand.",
        source="Pool, Yu 2021, NeurIPS 2021, table 3",
        methods=("channel-permute", "nm-prune"),
        sweep=(SweepNeed((OPT,), (PERMUTED, "nm-prune"), ("kjv",), making_s=100.0),),
        decide=all_of(loses_less(PERMUTED, than="nm-prune", model=OPT, task="kjv")),
        scale="a model of 4 M parameters, without retraining",
    ),
    Claim(
        id="retraining-repairs-2-4",
        section=SECTION,
        says="Retraining with the zeros held brings back most of what 2:4 pruning costs.",
        source="Mishra et al. 2021, arXiv:2104.08378, table 4",
        methods=("nm-prune",),
        sweep=(
            SweepNeed(
                (OPT,),
                ("nm-prune", "nm-prune:steps=60", DENSE),
                ("kjv",),
                train_steps=60,
                train_batch_size=4,
                train_len=1024,
                making_s=90.0,
            ),
        ),
        decide=all_of(
            repairs("nm-prune:steps=60", "nm-prune", model=OPT, task="kjv", share=0.65, clean=DENSE)
        ),
        scale="a model of 4 M parameters; most is two thirds (0.65) of the gap to the same 60 steps without "
        "zeros, on sequences as long as those that are scored (1024 tokens)",
    ),
    Claim(
        id="sr-ste-beats-plain-ste",
        section=SECTION,
        says="Trained from scratch to 2:4, letting masked weights decay (SR-STE) loses less than plain "
        "straight-through gradients.",
        source="Zhou et al. 2021, arXiv:2102.04010, table 1",
        methods=("sr-ste",),
        sweep=(
            SweepNeed(
                (OPT,),
                (REFINED, PLAIN_STE),
                ("kjv",),
                seeds=SEEDS,
                train_steps=120,
                train_batch_size=8,
                train_len=64,
                making_s=35.0,
            ),
        ),
        decide=all_of(loses_less(REFINED, than=PLAIN_STE, model=OPT, task="kjv", seeds=SEEDS)),
        scale="4 M parameters and 120 steps, where masks hardly have time to settle",
    ),
    Claim(
        id="exploration-helps-top-kast",
        section=SECTION,
        says="Sparse training that also updates weights outside of the forward pass loses less than "
        "without them.",
        source="Jayakumar et al. 2020, arXiv:2106.03517, table 1",
        methods=("top-kast",),
        sweep=(nano(EXPLORING, NOT_EXPLORING),),
        decide=all_of(loses_less(EXPLORING, than=NOT_EXPLORING, model=NANO, task="kjv", seeds=SEEDS)),
        scale="a network of 0.7 M parameters, 120 steps",
    ),
]


@hookimpl
def register_claims() -> list[Claim]:
    return CLAIMS
