"""The command line of the recipe."""

from __future__ import annotations

import argparse
from pathlib import Path

from harness.zoo.architectures import ARCHITECTURES
from harness.zoo.training import Hyperparameters

__all__ = ["build_parser"]

DESCRIPTION = (
    "Train a small language model from text files and write it in Hugging Face format, "
    "with what was measured on it. See docs/zoo.md."
)


def build_parser() -> argparse.ArgumentParser:
    """All options of `python -m harness.zoo.recipe`."""
    parser = argparse.ArgumentParser(prog="python -m harness.zoo.recipe", description=DESCRIPTION)
    parser.add_argument("--arch", choices=sorted(ARCHITECTURES), required=True)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="checkpoint to write")
    text = parser.add_argument_group("text (.txt, .txt.xz, .txt.gz; two blank lines part documents)")
    text.add_argument("--text", type=Path, action="append", default=[], metavar="FILE")
    text.add_argument("--kjv", action="store_true", help="add the King James Bible")
    text.add_argument("--kjv-repeats", type=_positive, default=2, help="times an epoch reads it")
    text.add_argument(
        "--fragment-share",
        type=_share,
        default=0.4,
        help="share of the lines read once more as single passages of 1 to 6 sentences",
    )
    text.add_argument("--tokenizer", type=Path, metavar="DIR", help="reuse it; else one is trained")
    text.add_argument("--vocab-size", type=_positive, default=4096)
    measure = parser.add_argument_group("evaluation")
    measure.add_argument("--eval-text", type=Path, action="append", default=[], metavar="FILE")
    measure.add_argument("--minimal-pairs", type=Path, action="append", default=[], metavar="FILE")
    budget = parser.add_argument_group("training")
    limit = budget.add_mutually_exclusive_group(required=True)
    limit.add_argument("--seconds", type=float, help="train that long; the schedule follows the clock")
    limit.add_argument("--steps", type=_positive, help="train that many steps")
    budget.add_argument("--batch-sequences", type=_positive, default=64, help="sequences per step")
    budget.add_argument("--learning-rate", type=float, default=Hyperparameters.learning_rate)
    budget.add_argument(
        "--weight-noise-levels",
        type=int,
        default=0,
        metavar="N",
        help="train under rounding-like noise of a grid of N steps per group (15: 4 bits; 0: none)",
    )
    budget.add_argument("--weight-noise-group", type=_positive, default=64, metavar="SIZE")
    budget.add_argument("--seed", type=int, default=0)
    budget.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    budget.add_argument("--compile", action="store_true", help="compile the model with torch")
    budget.add_argument("--note", default="", help="a sentence for the card's training section")
    budget.add_argument("--checkpoint-steps", default="", metavar="0,1%,500", help="also save to OUT/step-N")
    shape = parser.add_argument_group("shape, where it should differ from the architecture's own")
    for name in ("layers", "width", "heads", "ffn-width", "context-tokens"):
        shape.add_argument(f"--{name}", type=_positive)
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value
