"""Claims on quantization-aware training."""

from __future__ import annotations

from harness import hookimpl
from harness.claims import Claim, SweepNeed, all_of, loses_less

from ._grids import ZOO

__all__ = ["CLAIMS"]

SECTION = "quantization-aware training"
_QAT, _QAT_KD, _RTN = "qat:bits=2:lr=0.0005", "qat-kd:bits=2:lr=0.0005", "rtn:bits=2:group_size=16"


def _grid(*methods: str) -> SweepNeed:
    return SweepNeed(
        ZOO, methods, ("kjv",), train_steps=200, train_batch_size=8, train_len=128,
        calibration_samples=128, calibration_len=256, making_s=70.0,
    )  # fmt: skip


CLAIMS = [
    Claim(
        id="a-teacher-helps-qat",
        section=SECTION,
        says="Trained through its rounding to 2 bits, a network recovers more from a teacher than from text.",
        source="Kim et al. 2022, arXiv:2211.11014; Liu et al. 2023, arXiv:2305.17888, table 1",
        methods=("qat", "qat-kd"),
        sweep=(_grid(_QAT, _QAT_KD),),
        decide=all_of(*(loses_less(_QAT_KD, than=_QAT, model=model, task="kjv") for model in ZOO)),
        scale="models of 4 and 6 M parameters, 200 steps of 8 x 128 tokens",
    ),
    Claim(
        id="qat-beats-rounding-at-2-bits",
        section=SECTION,
        says="At 2 bits training through the rounding loses less than rounding does, with fewer bits "
        "for scales.",
        source="Esser et al. 2019, arXiv:1902.08153, table 1; Liu et al. 2023, arXiv:2305.17888, table 1",
        methods=("qat", "rtn"),
        sweep=(_grid(_QAT), _grid(_RTN)),
        decide=all_of(*(loses_less(_QAT, than=_RTN, model=model, task="kjv") for model in ZOO)),
        scale="models of 4 and 6 M parameters, 200 steps of 8 x 128 tokens; rounding has groups of 16 "
        "and the "
        "trained weights one scale a row",
    ),
]


@hookimpl
def register_claims() -> list[Claim]:
    return CLAIMS
