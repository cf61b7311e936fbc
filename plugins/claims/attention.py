"""Claims on attention and the key-value cache."""

from __future__ import annotations

from harness import hookimpl
from harness.claims import (
    Claim,
    all_of,
    exponent_above,
    exponent_below,
    exponent_lower,
    times_smaller,
)

from ._grids import LLAMA, ZOO, timed

__all__ = ["CLAIMS"]

SECTION = "attention"
PROMPTS = (256, 512, 960)
LOCAL, SHARED = "block-local:window=64", "mqa:steps=0"
HEADS = 8

CLAIMS = [
    Claim(
        id="attention-dominates-at-length",
        section=SECTION,
        says="Prefill time grows faster than the prompt, because attention is quadratic in its length.",
        source="Weng 2023, Large Transformer Model Inference Optimization, introduction; Vaswani et "
        "al. 2017, "
        "arXiv:1706.03762, table 1",
        methods=("baseline",),
        sweep=(timed("baseline", prompts=PROMPTS),),
        decide=all_of(exponent_above(1.0, model=LLAMA, prompts=PROMPTS)),
        scale="a model of 6 M parameters and at most 960 tokens; at thousands the exponent comes nearer to 2",
    ),
    Claim(
        id="kv-cache-is-linear",
        section=SECTION,
        says="The key-value cache takes as many bytes for each further token, however long the text is.",
        source="Pope et al. 2022, arXiv:2211.05102, section 2; Weng 2023, introduction",
        methods=("baseline",),
        sweep=(timed("baseline", prompts=PROMPTS),),
        decide=all_of(
            *(
                times_smaller(
                    "kv_cache_bytes_per_token",
                    1,
                    model=LLAMA,
                    method="baseline",
                    place=f"b1-p{one}-g16",
                    than_place=f"b1-p{other}-g16",
                )
                for one, other in ((PROMPTS[0], PROMPTS[-1]), (PROMPTS[-1], PROMPTS[0]))
            )
        ),
        scale="a model of 6 M parameters, 256 and 960 tokens",
    ),
    Claim(
        id="mqa-shrinks-the-cache-by-heads",
        section=SECTION,
        says="With one key-value head for all queries the cache shrinks by the number of heads.",
        source="Shazeer 2019, arXiv:1911.02150, section 3",
        methods=("mqa",),
        sweep=(timed(SHARED, prompts=(64,), models=ZOO),),
        decide=all_of(
            *(
                times_smaller(
                    "kv_cache_bytes_per_token", HEADS, model=model, method=SHARED, place="b1-p64-g16"
                )
                for model in ZOO
            )
        ),
        scale="models with 8 heads; bytes as they are held, at any size",
    ),
    Claim(
        id="local-attention-is-linear",
        section=SECTION,
        says="With attention to nearby tokens only, prefill time grows no faster than the prompt.",
        source="Qiu et al. 2019, arXiv:1911.02972, table 2; Child et al. 2019, arXiv:1904.10509",
        methods=("block-local",),
        sweep=(timed(LOCAL, prompts=PROMPTS),),
        decide=all_of(
            exponent_below(1.1, model=LLAMA, method=LOCAL, prompts=PROMPTS),
            exponent_lower(LOCAL, than="baseline", model=LLAMA, prompts=PROMPTS),
        ),
        scale="a window of 64 tokens; a model of 6 M parameters and at most 960 tokens",
    ),
]


@hookimpl
def register_claims() -> list[Claim]:
    return CLAIMS
