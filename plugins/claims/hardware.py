"""Claims on what the hardware makes of compressed models."""

from __future__ import annotations

from harness import hookimpl
from harness.claims import Claim, SweepNeed, all_of, faster, no_faster, slower

from ._grids import LLAMA, timed
from .pruning import STRUCTURED

__all__ = ["CLAIMS"]

SECTION = "hardware"
SHAPE = "b1-p256-g16"
LARGE = "shape:llama-7b"
FOUR_BITS, W8A8 = "rtn:group_size=64", "rtn:bits=8:a_bits=8"
ONE_CARD = "Llama-7B's shapes with random weights, one sequence"


def _on_cuda(*methods: str, prompts: tuple[int, ...] = (512,)) -> SweepNeed:
    return SweepNeed(
        (LARGE,), methods, prompt_lens=prompts, dtype="bfloat16", calibration_samples=16,
        calibration_len=512, making_s=60.0, cell_s=60.0,
    )  # fmt: skip


CLAIMS = [
    Claim(
        id="unstructured-zeros-give-no-speed",
        section=SECTION,
        says="Zeros anywhere in the weights make nothing faster on common hardware.",
        source="Weng 2023, section Sparsity; Gale, Zaharia, Young, Elsen 2020, arXiv:2006.10901",
        methods=("magnitude-prune",),
        sweep=(timed("magnitude-prune"),),
        decide=all_of(
            *(
                no_faster("magnitude-prune", model=LLAMA, scenario=SHAPE, phase=phase)
                for phase in ("prefill", "decode")
            )
        ),
        scale="a model of 6 M parameters, half zeros; no speed is less than 1.05 times as fast",
    ),
    Claim(
        id="structured-pruning-is-faster",
        section=SECTION,
        says="Taking out half of the heads and channels makes the prefill faster on any hardware.",
        source="Michel, Levy, Neubig 2019, arXiv:1905.10650, table 3; Ma, Fang, Wang 2023, arXiv:2305.11627",
        methods=("structured-prune",),
        sweep=(timed(STRUCTURED),),
        decide=all_of(faster(STRUCTURED, model=LLAMA, scenario=SHAPE, phase="prefill", by=1.2)),
        scale="a model of 6 M parameters, whose embeddings and head stay; faster is 1.2 times and more",
    ),
    Claim(
        id="not-every-smaller-form-is-faster",
        section=SECTION,
        says="Fewer bits alone make nothing faster: without a kernel for them 4-bit weights slow the "
        "prefill down, "
        "and 8-bit weights and activations do not speed up the decoding.",
        source="Weng 2023, section Quantization; Dettmers et al. 2022, arXiv:2208.07339, table 3",
        methods=("rtn",),
        sweep=(timed(FOUR_BITS, W8A8),),
        decide=all_of(
            slower(FOUR_BITS, model=LLAMA, scenario=SHAPE, phase="prefill"),
            no_faster(W8A8, model=LLAMA, scenario=SHAPE, phase="decode"),
        ),
        where=("cpu",),
        scale="a model of 6 M parameters, whose weights fit into the processor's cache",
    ),
    Claim(
        id="four-bit-weights-speed-up-decoding-only",
        section=SECTION,
        says="4-bit weights with 16-bit activations speed up decoding, which waits for memory, and not the "
        "prefill, which waits for arithmetic.",
        source="Frantar et al. 2022, arXiv:2210.17323, table 6; Weng 2023, section Quantization",
        methods=("rtn", "gptq"),
        sweep=(_on_cuda("rtn"),),
        decide=all_of(
            faster("rtn", model=LARGE, scenario="b1-p512-g16", phase="decode", by=1.2),
            no_faster("rtn", model=LARGE, scenario="b1-p512-g16", phase="prefill"),
        ),
        where=("cuda",),
        scale=f"{ONE_CARD}, 512 tokens",
    ),
    Claim(
        id="sparse-tensor-cores-speed-up-2-4",
        section=SECTION,
        says="On sparse tensor cores 2:4 weights speed up the prefill.",
        source="Mishra et al. 2021, arXiv:2104.08378, figure 3",
        methods=("nm-prune",),
        sweep=(_on_cuda("nm-prune", prompts=(2048,)),),
        decide=all_of(faster("nm-prune", model=LARGE, scenario="b1-p2048-g16", phase="prefill", by=1.1)),
        where=("cuda",),
        scale=f"{ONE_CARD}, 2048 tokens; faster is 1.1 times and more",
    ),
    Claim(
        id="two-of-four-needs-sparse-tensor-cores",
        section=SECTION,
        says="Without sparse tensor cores 2:4 weights make the prefill no faster.",
        source="Mishra et al. 2021, arXiv:2104.08378, section 3; Weng 2023, section Sparsity",
        methods=("nm-prune",),
        sweep=(timed("nm-prune"),),
        decide=all_of(no_faster("nm-prune", model=LLAMA, scenario=SHAPE, phase="prefill")),
        where=("cpu",),
        scale="a model of 6 M parameters; no faster is less than 1.05 times",
    ),
    Claim(
        id="llm-int8-is-slower-at-small-batch",
        section=SECTION,
        says="LLM.int8() decodes a single sequence slower than 16 bits do.",
        source="Dettmers et al. 2022, arXiv:2208.07339, table 3 and appendix D",
        methods=("llm-int8",),
        sweep=(_on_cuda("llm-int8"),),
        decide=all_of(slower("llm-int8", model=LARGE, scenario="b1-p512-g16", phase="decode")),
        where=("cuda",),
        scale=f"{ONE_CARD}, 512 tokens",
    ),
]


@hookimpl
def register_claims() -> list[Claim]:
    return CLAIMS
