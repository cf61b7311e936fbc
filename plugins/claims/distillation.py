"""Claims on distillation."""

from __future__ import annotations

from harness import hookimpl
from harness.claims import Claim, SweepNeed, all_of, faster, loses_at_most, loses_less, times_smaller

from ._grids import LLAMA, NANO, PLAIN, SEEDS, nano

__all__ = ["CLAIMS"]

SECTION = "distillation"
_TAUGHT = "kd:T=1.0:teacher=llama-6m:lr=0.003"
_BERT = "shape:bert-base"
_FOUR_BITS = "gptq:group_size=64"

CLAIMS = [
    Claim(
        id="kd-beats-plain-training",
        section=SECTION,
        says="A small network learns more from a teacher's predictions and the text than from the text "
        "alone.",
        source="Hinton, Vinyals, Dean 2015, arXiv:1503.02531, section 3",
        methods=("kd",),
        sweep=(nano(PLAIN, _TAUGHT),),
        decide=all_of(loses_less(_TAUGHT, than=PLAIN, model=NANO, task="kjv", seeds=SEEDS)),
        where=("cpu", "cuda"),
        scale="a network of 0.7 M parameters far from trained; at temperature 1, the paper's 2 and "
        "more is worse here",
    ),
    Claim(
        id="distilbert-size-and-speed",
        section=SECTION,
        says="Half the layers make BERT 40 % smaller and 60 % faster.",
        source="Sanh et al. 2019, arXiv:1910.01108, tables 1 and 3",
        methods=("distilbert",),
        sweep=(SweepNeed((_BERT,), ("distilbert",), prompt_lens=(128,), cell_s=40.0),),
        decide=all_of(
            faster("distilbert", model=_BERT, scenario="b1-p128-g0", phase="prefill", by=1.6),
            # Table 3 has 110 and 66 million parameters, rounded: the least that these can stand for.
            times_smaller("weight_bytes", 109.5 / 66.5, model=_BERT, method="distilbert", place="b1-p128-g0"),
        ),
        scale="BERT-base's shapes with random weights: size and speed, not accuracy; 40 % is within the "
        "rounding of the paper's 66 of 110 million parameters",
    ),
    Claim(
        id="distillation-combines-with-quantization",
        section=SECTION,
        says="A distilled network can be quantized to 4 bits at as small a cost as the network it came from.",
        source="Sanh et al. 2019, arXiv:1910.01108, section 4; Polino, Pascanu, Alistarh 2018, "
        "arXiv:1802.05668",
        methods=("distilbert", "gptq"),
        sweep=(
            SweepNeed(
                (LLAMA,),
                ("distilbert", f"distilbert+{_FOUR_BITS}", _FOUR_BITS),
                ("kjv",),
                train_steps=60,
                train_batch_size=8,
                train_len=128,
                calibration_samples=128,
                calibration_len=256,
                making_s=60.0,
            ),
        ),
        decide=all_of(
            loses_at_most(_FOUR_BITS, 0.05, model=LLAMA, task="kjv"),
            loses_at_most(f"distilbert+{_FOUR_BITS}", 0.05, model=LLAMA, task="kjv", than="distilbert"),
        ),
        scale="as small a cost is taken as at most 0.05 nats a token, for both",
    ),
]


@hookimpl
def register_claims() -> list[Claim]:
    return CLAIMS
