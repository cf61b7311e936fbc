"""The grids that several claims share, so that what they need is measured once."""

from __future__ import annotations

from harness.claims import SweepNeed

__all__ = [
    "DENSE",
    "LLAMA",
    "NANO",
    "NARROW",
    "OPT",
    "OUTLIERS",
    "PLAIN",
    "SEEDS",
    "ZOO",
    "nano",
    "quality",
    "timed",
]

LLAMA, OPT = "zoo:llama-6m", "zoo:opt-4m"
ZOO = (LLAMA, OPT)
OUTLIERS = tuple(f"{model}+outliers" for model in ZOO)
NANO = "scratch:llama-nano"
NARROW = "scratch:llama-pico"
"""With as many weights in all as `NANO` has left at 75 % zeros in its blocks, to one per cent."""
SEEDS = (0, 1, 2)
PLAIN = "gmp:sparsity=0.0:lr=0.003"
"""Plain training of a scratch model at the rate of the methods beside it: gradual pruning of nothing."""
DENSE = "gmp:sparsity=0.0"
"""The same of a trained model at the loop's own rate: as many more steps, without zeros."""


def quality(*methods: str, models: tuple[str, ...] = ZOO, making_s: float = 12.0) -> SweepNeed:
    """All of kjv, calibrated on 128 windows of 256 tokens."""
    return SweepNeed(
        models, methods, ("kjv",), calibration_samples=128, calibration_len=256, making_s=making_s
    )


def nano(*methods: str, model: str = NANO) -> SweepNeed:
    """A network that learns from random weights, 120 steps of 8 x 64 tokens at a time, three seeds."""
    return SweepNeed(
        (model,), methods, ("kjv",), seeds=SEEDS, train_steps=120, train_batch_size=8, train_len=64,
        making_s=10.0, cell_s=5.0,
    )  # fmt: skip


def timed(*methods: str, prompts: tuple[int, ...] = (256,), models: tuple[str, ...] = (LLAMA,)) -> SweepNeed:
    """One sequence, so many tokens of prompt, 16 new ones."""
    return SweepNeed(models, methods, prompt_lens=prompts, cell_s=10.0)
