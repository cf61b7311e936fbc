"""How sharply the loss bends in the weights of each block (Q-BERT's measure of sensitivity)."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from harness.nn.anatomy import blocks_of
from harness.nn.curvature import hessian_product, top_eigenvalue, twice_differentiable
from harness.nn.surgery import block_linears
from harness.training import causal_loss

if TYPE_CHECKING:
    from harness import Context

__all__ = ["block_eigenvalues", "calibration_loss", "distance_loss", "sensitivities"]

Loss = Callable[[nn.Module, torch.Tensor], torch.Tensor]


def calibration_loss(kind: str) -> Loss:
    """What the Hessian is taken of, for tokens int64 [batch, seq_len].

    A language model: the mean cross-entropy of the next token. An encoder, which has no labels here: half
    the squared distance of the sequences' normalised mean embeddings from what they are now. Its gradient is
    exactly zero at the original weights, and its Hessian is the Gauss-Newton form J^T J: how far embeddings
    move for a change of weights.
    """
    if kind == "decoder":
        return causal_loss

    def loss(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        found = _embedded(model, tokens)
        return 0.5 * (found - found.detach()).square().sum(1).mean()

    return loss


def distance_loss(teacher: nn.Module) -> Loss:
    """The distance of an encoder's embeddings from a teacher's, to train with."""

    def loss(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            wanted = _embedded(teacher, tokens)
        return 0.5 * (_embedded(model, tokens) - wanted).square().sum(1).mean()

    return loss


def _embedded(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Mean last hidden states of length 1, float32 [batch, d]."""
    states: Any = model(input_ids=tokens, output_hidden_states=True).hidden_states[-1]
    embedding: torch.Tensor = nn.functional.normalize(states.float().mean(1), dim=1)
    return embedding


def sensitivities(eigenvalues: Sequence[Sequence[float]]) -> list[float]:
    """Of each block ``|mean| + standard deviation`` of its eigenvalues over subsets of the data."""
    return [abs(statistics.fmean(each)) + statistics.pstdev(each) for each in eigenvalues]


def block_eigenvalues(
    model: nn.Module,
    subsets: Sequence[torch.Tensor],
    loss: Loss,
    context: Context,
    *,
    iterations: int,
    tolerance: float,
) -> dict[str, Any]:
    """The top eigenvalue of the loss Hessian in the linear weights of every block, on every subset.

    Args:
        subsets: token ids int64 [sequences, seq_len] each.

    Returns:
        ``eigenvalues`` [blocks][subsets], ``unconverged`` (how many stopped at the last iteration) and
        ``gradient_norm`` (of all these weights together, mean over subsets).

    Raises:
        NumericalFailure: the Hessian is NaN or infinite.
    """
    names = [name for name, _ in blocks_of(model)]
    found: list[list[float]] = []
    unconverged, squares = 0, [0.0] * len(subsets)
    with context.progress("curvature", len(names)) as done, _float32(model), twice_differentiable():
        for index, block in enumerate(names):
            weights = [linear.weight for name, linear in block_linears(model) if name.startswith(f"{block}.")]
            of_block = []
            for number, tokens in enumerate(subsets):
                with torch.enable_grad(), _only_trainable(model, weights):
                    value = loss(model, tokens.to(context.device))
                    gradient, product = hessian_product(value, weights)
                squares[number] += sum(float(each.square().sum()) for each in gradient)
                top = top_eigenvalue(
                    product,
                    weights,
                    context.generator(f"curvature/{index}/{number}"),
                    iterations=iterations,
                    tolerance=tolerance,
                )
                of_block.append(top.value)
                unconverged += not top.converged
                del value, gradient, product  # the graph: one at a time
            found.append(of_block)
            done(index + 1)
    norm = statistics.fmean(square**0.5 for square in squares)
    return {"eigenvalues": found, "unconverged": unconverged, "gradient_norm": norm}


@contextmanager
def _only_trainable(model: nn.Module, weights: Sequence[torch.Tensor]) -> Iterator[None]:
    """Gradients for these weights alone, so that the graph begins at their block."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    wanted = {id(weight) for weight in weights}
    for parameter, _ in before:
        parameter.requires_grad_(id(parameter) in wanted)
    try:
        yield
    finally:
        for parameter, flag in before:
            parameter.requires_grad_(flag)


@contextmanager
def _float32(model: nn.Module) -> Iterator[None]:
    """Parameters in float32: second derivatives drown in bfloat16's rounding. Exact there and back."""
    before = [(parameter, parameter.dtype) for parameter in model.parameters()]
    for parameter, dtype in before:
        if dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for parameter, dtype in before:
            parameter.data = parameter.data.to(dtype)
