"""Claims on post-training quantization."""

from __future__ import annotations

from harness import hookimpl
from harness.claims import Claim, SweepNeed, all_of, gains_more, loses_at_most, loses_less, repairs

from ._grids import LLAMA, OUTLIERS, ZOO, quality

__all__ = ["CLAIMS"]

SECTION = "post-training quantization"
W8, A8, W8A8 = "rtn:bits=8", "rtn:bits=16:a_bits=8", "rtn:bits=8:a_bits=8"
PER_TENSOR = f"{W8A8}:a_gran=per-tensor-static"
ENCODER = "minilm"
PLANTED = "models of 4 and 6 M parameters with planted outliers (four channels, 64 times larger)"


def _gptq_against_rounding(bits: int, gptq: str, rtn: str) -> Claim:
    return Claim(
        id=f"gptq-beats-rounding-at-{bits}-bits",
        section=SECTION,
        says=f"At {bits} bits GPTQ loses less than rounding to nearest with the same groups.",
        source="Frantar, Ashkboos, Hoefler, Alistarh 2022, arXiv:2210.17323, tables 2 to 5",
        methods=("gptq", "rtn"),
        sweep=(quality(gptq, rtn, making_s=20.0),),
        decide=all_of(*(loses_less(gptq, than=rtn, model=model, task="kjv") for model in ZOO)),
        scale="models of 4 and 6 M parameters; the papers' start at 125 M",
    )


CLAIMS = [
    Claim(
        id="activations-not-weights",
        section=SECTION,
        says="At 8 bits it is the activations whose rounding hurts; the weights can be rounded almost "
        "for free.",
        source="Bondarenko, Nagel, Blankevoort 2021, arXiv:2109.12948, table 1 (W8A8, W32A8, W8A32)",
        methods=("rtn",),
        sweep=(quality(W8, A8, W8A8, models=OUTLIERS),),
        decide=all_of(
            *(
                part
                for model in OUTLIERS
                for part in (
                    loses_at_most(W8, 0.02, model=model, task="kjv"),
                    loses_less(W8, than=A8, model=model, task="kjv", by=0.05),
                    loses_less(W8, than=W8A8, model=model, task="kjv", by=0.05),
                )
            )
        ),
        scale=f"{PLANTED}; almost for free is at most 0.02 nats a token, hurting 0.05 more than that",
    ),
    Claim(
        id="outliers-break-per-tensor-activations",
        section=SECTION,
        says="A few outlier channels ruin activations that share one scale a tensor, which are "
        "harmless without.",
        source="Bondarenko, Nagel, Blankevoort 2021, arXiv:2109.12948, section 3; Dettmers et al. 2022, "
        "arXiv:2208.07339, figure 1",
        methods=("rtn",),
        sweep=(quality(PER_TENSOR), quality(PER_TENSOR, models=OUTLIERS)),
        decide=all_of(
            *(loses_less("baseline", than=PER_TENSOR, model=model, task="kjv", by=0.5) for model in OUTLIERS),
            *(loses_at_most(PER_TENSOR, 0.05, model=model, task="kjv") for model in ZOO),
        ),
        scale=f"{PLANTED}, against the same models without",
    ),
    Claim(
        id="llm-int8-repairs-outliers",
        section=SECTION,
        says="Multiplying the few outlier columns in 16 bits (LLM.int8()) repairs 8-bit activations.",
        source="Dettmers, Lewis, Belkada, Zettlemoyer 2022, arXiv:2208.07339, table 1",
        methods=("llm-int8",),
        sweep=(quality(W8A8, "llm-int8", models=OUTLIERS),),
        decide=all_of(*(repairs("llm-int8", W8A8, model=model, task="kjv", share=0.9) for model in OUTLIERS)),
        scale=f"{PLANTED}; repairing is taking away nine tenths of the loss",
    ),
    Claim(
        id="smoothquant-repairs-outliers",
        section=SECTION,
        says="Moving the outliers' range into the weights (SmoothQuant) repairs 8-bit activations.",
        source="Xiao et al. 2022, arXiv:2211.10438, tables 3 and 4",
        methods=("smoothquant",),
        sweep=(quality(W8A8, "smoothquant", models=OUTLIERS, making_s=15.0),),
        decide=all_of(
            *(repairs("smoothquant", W8A8, model=model, task="kjv", share=0.9) for model in OUTLIERS)
        ),
        scale=f"{PLANTED}, which are planted where it smooths; repairing is taking away nine tenths of "
        "the loss",
    ),
    Claim(
        id="peg-repairs-outliers",
        section=SECTION,
        says="Ranges for groups of embedding dimensions (PEG) repair an encoder's 8-bit activations.",
        source="Bondarenko, Nagel, Blankevoort 2021, arXiv:2109.12948, table 5",
        methods=("peg",),
        sweep=(
            SweepNeed(
                (ENCODER,),
                ("peg:groups=1", "peg"),
                ("kjv_books",),
                making_s=30.0,
                cell_s=20.0,
            ),
        ),
        decide=all_of(
            loses_less("baseline", than="peg:groups=1", model=ENCODER, task="kjv_books", metric="acc"),
            repairs("peg", "peg:groups=1", model=ENCODER, task="kjv_books", metric="acc", share=0.5),
        ),
        scale="MiniLM, a trained encoder of 23 M parameters, by a linear probe; BERT-base has larger "
        "outliers",
    ),
    Claim(
        id="smoothquant-sweet-spot",
        section=SECTION,
        says="SmoothQuant's alpha has a sweet spot near 0.5: too little or too much of the range moved "
        "hurts.",
        source="Xiao et al. 2022, arXiv:2211.10438, figure 10",
        methods=("smoothquant",),
        sweep=(
            quality(
                "smoothquant",
                "smoothquant:alpha=0.1",
                "smoothquant:alpha=0.9",
                models=(f"{LLAMA}+outliers",),
                making_s=15.0,
            ),
        ),
        decide=all_of(
            *(
                loses_less(
                    "smoothquant", than=f"smoothquant:alpha={alpha}", model=f"{LLAMA}+outliers", task="kjv"
                )
                for alpha in (0.1, 0.9)
            )
        ),
        scale="a model of 6 M parameters with planted outliers",
    ),
    Claim(
        id="larger-outliers-want-larger-alpha",
        section=SECTION,
        says="The larger the outliers, the more a larger alpha of SmoothQuant helps (0.75 against 0.5).",
        source="Xiao et al. 2022, arXiv:2211.10438, section 5.1 (alpha 0.75 for GLM-130B)",
        methods=("smoothquant",),
        sweep=(
            quality(
                "smoothquant",
                "smoothquant:alpha=0.75",
                models=(f"{LLAMA}+outliers:k=16", f"{LLAMA}+outliers:k=256"),
                making_s=15.0,
            ),
        ),
        decide=all_of(
            gains_more(
                "smoothquant:alpha=0.75",
                "smoothquant",
                model=f"{LLAMA}+outliers:k=256",
                reference=f"{LLAMA}+outliers:k=16",
                task="kjv",
            )
        ),
        scale="planted outliers leave the function as it is, so the weights that read them are as much "
        "smaller: "
        "smoothing undoes that whatever alpha is",
    ),
    _gptq_against_rounding(4, "gptq:group_size=64", "rtn:group_size=64"),
    _gptq_against_rounding(3, "gptq:bits=3:group_size=64", "rtn:bits=3:group_size=64"),
    _gptq_against_rounding(2, "gptq:bits=2:group_size=16", "rtn:bits=2:group_size=16"),
    Claim(
        id="finer-weight-scales-lose-less",
        section=SECTION,
        says="4-bit weights lose less with a scale a row than with one a matrix, and less still with "
        "one a group.",
        source="Krishnamoorthi 2018, arXiv:1806.08342, table 2; Shen et al. 2019, arXiv:1909.05840, table 2",
        methods=("rtn",),
        sweep=(quality("rtn:group_size=-1:w_gran=per-tensor", "rtn:group_size=-1", "rtn:group_size=64"),),
        decide=all_of(
            *(
                part
                for model in ZOO
                for part in (
                    loses_less(
                        "rtn:group_size=-1",
                        than="rtn:group_size=-1:w_gran=per-tensor",
                        model=model,
                        task="kjv",
                    ),
                    loses_less("rtn:group_size=64", than="rtn:group_size=-1", model=model, task="kjv"),
                )
            )
        ),
        scale="models of 4 and 6 M parameters",
    ),
    Claim(
        id="finer-activation-scales-lose-less",
        section=SECTION,
        says="8-bit activations lose less with a scale a token than with one a tensor.",
        source="Yao et al. 2022, arXiv:2206.01861, table 3",
        methods=("rtn", "zeroquant"),
        sweep=(quality(W8A8, PER_TENSOR, models=(*ZOO, *OUTLIERS)),),
        decide=all_of(
            *(loses_less(W8A8, than=PER_TENSOR, model=model, task="kjv") for model in (*ZOO, *OUTLIERS))
        ),
        scale="models of 4 and 6 M parameters, with and without planted outliers; the tensor's scale "
        "is fixed",
    ),
]


@hookimpl
def register_claims() -> list[Claim]:
    return CLAIMS
