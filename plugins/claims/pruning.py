"""Claims on pruning."""

from __future__ import annotations

from harness import hookimpl
from harness.claims import Claim, all_of, loses_at_most, loses_less

from ._grids import NANO, NARROW, PLAIN, SEEDS, ZOO, nano, quality

__all__ = ["CLAIMS"]

SECTION = "pruning"
SMALL = "a network of 0.7 M parameters, 80 % zeros, far from trained, so that more training wins by itself"
ONE_SHOT = "iterative-prune:p=0.8:lr=0.003"
GRADUAL = "gmp:steps=240:lr=0.003"
LARGE_SPARSE, SMALL_DENSE = (f"gmp:sparsity={share}:steps=240:lr=0.003" for share in (0.75, 0.0))
ITERATIVE = "iterative-prune:p=0.4154:steps_per_cycle=40:lr=0.003"
FINE_TUNED = "iterative-prune:p=0.8:retrain=fine-tune:lr=0.003"
TICKET, RATES = "lottery-rewind:lr=0.003", "lr-rewind:lr=0.003"
RANDOM_MASK, RANDOM_INIT = f"{TICKET}:control=random-mask", f"{TICKET}:control=random-init"
STRUCTURED = "structured-prune:head_ratio=0.5:ffn_ratio=0.5"


def _unstructured_against_structured(id_: str, zeros: str, says: str, fairness: str) -> Claim:
    return Claim(
        id=id_,
        section=SECTION,
        says=says,
        source="Gale, Elsen, Hooker 2019, arXiv:1902.09574; Ma, Fang, Wang 2023, arXiv:2305.11627",
        methods=(zeros, "structured-prune"),
        sweep=(quality(zeros, STRUCTURED, making_s=20.0),),
        decide=all_of(*(loses_less(zeros, than=STRUCTURED, model=model, task="kjv") for model in ZOO)),
        scale="models of 4 and 6 M parameters, half of the blocks' weights, no retraining; " + fairness,
    )


CLAIMS = [
    Claim(
        id="gradual-beats-one-shot",
        section=SECTION,
        says="At an equal number of training steps, pruning gradually loses less than one cut.",
        source="Zhu, Gupta 2017, arXiv:1710.01878, section 4; Gale, Elsen, Hooker 2019, arXiv:1902.09574",
        methods=("gmp", "iterative-prune"),
        sweep=(nano(GRADUAL, ONE_SHOT),),
        decide=all_of(loses_less(GRADUAL, than=ONE_SHOT, model=NANO, task="kjv", seeds=SEEDS)),
        scale=f"{SMALL}; 240 steps each, of which one cut has 120 before it",
    ),
    Claim(
        id="large-sparse-beats-small-dense",
        section=SECTION,
        says="Of networks with as many weights that are not zero, a large pruned one loses less than a small "
        "dense one.",
        source="Zhu, Gupta 2017, arXiv:1710.01878, section 4",
        methods=("gmp",),
        sweep=(nano(LARGE_SPARSE), nano(SMALL_DENSE, model=NARROW)),
        decide=all_of(
            loses_less(LARGE_SPARSE, than=SMALL_DENSE, model=NANO, than_model=NARROW, task="kjv", seeds=SEEDS)
        ),
        scale="0.48 M weights, embeddings included: of a network of 0.7 M three quarters of the blocks' "
        "weights are zeros, or all its widths are three quarters; 240 steps each, far from trained",
    ),
    Claim(
        id="iterative-beats-one-shot",
        section=SECTION,
        says="At an equal number of training steps, pruning and retraining in cycles loses less than "
        "one cut.",
        source="Han, Pool, Tran, Dally 2015, arXiv:1506.02626, figure 5; Renda, Frankle, Carbin 2020, "
        "arXiv:2003.02389",
        methods=("iterative-prune",),
        sweep=(nano(ITERATIVE, ONE_SHOT),),
        decide=all_of(loses_less(ITERATIVE, than=ONE_SHOT, model=NANO, task="kjv", seeds=SEEDS)),
        scale=f"{SMALL}; 120 steps, then three cycles of 40 against one of 120. The papers' cycles are "
        "each as long "
        "as the one",
    ),
    Claim(
        id="rewinding-beats-fine-tuning",
        section=SECTION,
        says="After pruning, going back to early weights and training again loses less than fine-tuning.",
        source="Renda, Frankle, Carbin 2020, arXiv:2003.02389, figure 1",
        methods=("lottery-rewind", "iterative-prune"),
        sweep=(nano(TICKET, FINE_TUNED),),
        decide=all_of(loses_less(TICKET, than=FINE_TUNED, model=NANO, task="kjv", seeds=SEEDS)),
        scale=SMALL,
    ),
    Claim(
        id="rewound-rates-match-rewound-weights",
        section=SECTION,
        says="Going back to early learning rates alone loses no more than going back to early weights.",
        source="Renda, Frankle, Carbin 2020, arXiv:2003.02389, figure 2",
        methods=("lr-rewind", "lottery-rewind"),
        sweep=(nano(RATES, TICKET),),
        decide=all_of(loses_at_most(RATES, 0.02, model=NANO, task="kjv", than=TICKET, seeds=SEEDS)),
        scale=f"{SMALL}; no more is at most 0.02 nats a token",
    ),
    Claim(
        id="winning-tickets-beat-random-ones",
        section=SECTION,
        says="A ticket's weights at their own early values learn better than as many at random places, "
        "or than "
        "the same places with other initial values.",
        source="Frankle, Carbin 2019, arXiv:1803.03635, figures 1 and 3",
        methods=("lottery-rewind",),
        sweep=(nano(TICKET, RANDOM_MASK, RANDOM_INIT),),
        decide=all_of(
            loses_less(TICKET, than=RANDOM_MASK, model=NANO, task="kjv", seeds=SEEDS),
            loses_less(TICKET, than=RANDOM_INIT, model=NANO, task="kjv", seeds=SEEDS),
        ),
        scale=SMALL,
    ),
    Claim(
        id="winning-tickets-match-the-dense-network",
        section=SECTION,
        says="A winning ticket with a fifth of the weights learns as well as the whole network in as "
        "many steps.",
        source="Frankle, Carbin 2019, arXiv:1803.03635, figure 1",
        methods=("lottery-rewind",),
        sweep=(nano(TICKET, PLAIN),),
        decide=all_of(loses_at_most(TICKET, 0.02, model=NANO, task="kjv", than=PLAIN, seeds=SEEDS)),
        scale=f"{SMALL}; as well is at most 0.02 nats a token worse",
    ),
    Claim(
        id="calibrated-scores-beat-magnitudes",
        section=SECTION,
        says="At 50 % zeros in one shot, Wanda loses less than magnitudes and SparseGPT less than Wanda.",
        source="Sun et al. 2023, arXiv:2306.11695, table 3; Frantar, Alistarh 2023, arXiv:2301.00774, "
        "table 1",
        methods=("wanda", "sparsegpt", "magnitude-prune"),
        sweep=(quality("magnitude-prune", "wanda", "sparsegpt", making_s=20.0),),
        decide=all_of(
            *(
                loses_less(better, than=worse, model=model, task="kjv")
                for model in ZOO
                for better, worse in (("wanda", "magnitude-prune"), ("sparsegpt", "wanda"))
            )
        ),
        scale="models of 4 and 6 M parameters",
    ),
    _unstructured_against_structured(
        "unstructured-loses-less-than-structured",
        "sparsegpt",
        "At equal parameters, zeros anywhere lose less than heads and channels that are taken out.",
        "in both what is left makes up for what is gone, by the same calibration text",
    ),
    _unstructured_against_structured(
        "plain-zeros-lose-less-than-structured",
        "magnitude-prune",
        "At equal parameters, even zeros by magnitude lose less than heads and channels that are taken out.",
        "what is left of the structured ones is refitted to the old outputs, the zeros are not compensated",
    ),
]


@hookimpl
def register_claims() -> list[Claim]:
    return CLAIMS
