"""Whether compiled calls compute what the model computes, as far as rounding lets anyone tell.

A compiler rounds elsewhere than eager execution does. How much that moves the outputs depends on the
model: a trained one by a few thousandths, a deep one with random weights or with 8-bit activations by a
tenth. So the measure is taken from the model itself: its outputs are computed once more, eagerly, with
the input of every block rounded once more at random. What differs by more than a few times that is
another function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from harness.nn.anatomy import blocks_of

__all__ = ["LARGEST", "SMALLEST", "Agreement", "distance", "perturbed"]

SMALLEST = {torch.float32: 1e-3, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Differences that are always allowed, relative in the Frobenius norm."""
LARGEST = 0.7
"""Outputs that have nothing in common differ by 1.4."""
_TIMES_NOISE = 3.0


class Agreement:
    """Compares outputs with those of the model as it was written.

    Args:
        outputs: runs the model eagerly; the tensors that are compared.

    Raises:
        NotApplicable: the model's blocks are not known.
    """

    def __init__(self, model: nn.Module, outputs: Callable[[], list[torch.Tensor]]) -> None:
        self._expected = outputs()
        smallest = SMALLEST.get(self._expected[0].dtype, 1e-3)
        with perturbed(model):
            noise = distance(self._expected, outputs())
        self.allowed = min(LARGEST, max(smallest, _TIMES_NOISE * noise))

    def problem(self, found: Sequence[torch.Tensor]) -> str | None:
        """How other outputs differ where they differ by too much; None where they agree."""
        difference = distance(self._expected, found)
        if difference <= self.allowed:
            return None
        return (
            f"compiled outputs differ from eager ones by {difference:.1e}, "
            f"rounding alone would by {self.allowed:.1e} at most (relative)"
        )


def distance(expected: Sequence[torch.Tensor], found: Sequence[torch.Tensor]) -> float:
    """The largest relative Frobenius difference of the pairs; infinite where one is not finite."""
    distances = []
    for wanted, got in zip(expected, found, strict=True):
        norm = torch.linalg.vector_norm(wanted.float()).clamp_min(1e-20)
        each = float(torch.linalg.vector_norm(got.float() - wanted.float()) / norm)
        distances.append(each if math.isfinite(each) else math.inf)
    return max(distances)


@contextmanager
def perturbed(model: nn.Module) -> Iterator[None]:
    """Inside, the hidden states [batch, tokens, width] that enter each block are rounded once more: each
    is changed by up to half a unit in its last place, at random but always the same."""

    def rounded(states: Any) -> Any:
        if not isinstance(states, torch.Tensor) or not states.is_floating_point():
            return states
        generator = torch.Generator(states.device).manual_seed(0)
        noise = torch.rand(states.shape, generator=generator, device=states.device) - 0.5
        return (states.float() * (1 + torch.finfo(states.dtype).eps * noise)).to(states.dtype)

    def hook(_module: nn.Module, args: Any, kwargs: Any) -> Any:
        if args:
            return (rounded(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": rounded(kwargs.get("hidden_states"))}

    handles = [block.register_forward_pre_hook(hook, with_kwargs=True) for _, block in blocks_of(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
