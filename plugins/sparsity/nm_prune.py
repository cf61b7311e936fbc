"""Two of every four weights become zero: half the arithmetic on sparse tensor cores, and 0.56 of the bytes.

Paper: Accelerating Sparse Deep Neural Networks. Asit Mishra, Jorge Albericio Latorre, Jeff Pool, Darko
Stosic, Dusan Stosic, Ganesh Venkatesh, Chong Yu, Paulius Micikevicius, 2021, arXiv:2104.08378.

Changes: of every `m` consecutive input weights of a linear layer inside the blocks the `n` with the
largest scores stay. 2:4 is stored as its values and two bits each for their places; on CUDA cuSPARSELt
multiplies that form, elsewhere it is decompressed first. Other patterns, and 2:4 before another method in
a chain, are zeros in dense weights: nothing gets smaller or faster, and the row says *simulated*. Layers
whose sizes sparse tensor cores cannot run (multiples of 16) stay dense; `layers_left_dense` lists them.

Needs: nothing with `score` magnitude; calibration tokens with wanda and sparsegpt; training text with
`steps`, in which the zeros are held at zero (weights, gradients, optimiser).

Knobs: `n` and `m`; `score`: magnitude |w|, wanda |w| times the norm of its input (Sun et al. 2023,
arXiv:2306.11695), sparsegpt w² / U² with the Cholesky factor U of the inverse Hessian (Frantar, Alistarh
2023, arXiv:2301.00774; the weights that stay are not corrected); `damp` of that Hessian; `steps` and `lr`
of retraining; `backend` (auto; cusparselt: or nothing; dense: zeros in dense weights); `algorithm`, of
cuSPARSELt's some tens (tuned: timed once for each shape, so that the last bits may differ from run to
run; default); `targets`, a regular expression for the names of layers; `ragged`, where `m` does not
divide a width (raise; skip: that layer stays dense).

Hurts: more than unstructured zeros of the same number, at small models without retraining very much; at
few tokens the sparse product is padded to 8 and gains little; in eager calls the library takes most of a
millisecond to begin.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field

from harness import Method, NumericalFailure, Paper, hookimpl
from harness.nn.held_masks import HeldMasks
from harness.nn.hessian import inverse_root, observe_hessians
from harness.nn.n_of_m import keep_n_of_m

from ._patterns import (
    PatternOptions,
    check_finite,
    choose_layers,
    needs_cuda,
    record_left_dense,
    refusal,
    store_zeros,
)
from ._training import require_text, task_of

if TYPE_CHECKING:
    from torch import nn

    from harness import Context, ModelInfo

__all__ = ["METHOD", "NmOptions", "scores_of"]


class NmOptions(PatternOptions):
    score: Literal["magnitude", "wanda", "sparsegpt"] = Field("magnitude", description="what stays")
    damp: float = Field(0.01, gt=0, description="added to the Hessian; score=sparsegpt")
    steps: int = Field(0, ge=0, description="retraining steps with the zeros held")
    lr: float | None = Field(
        None, gt=0, description="peak learning rate of retraining; by default the loop's"
    )


def scores_of(weight: torch.Tensor, score: str, hessian: torch.Tensor | None, damp: float) -> torch.Tensor:
    """How much each weight of a matrix [out, in] is worth, float32 [out, in].

    Args:
        hessian: ``mean(x x^T)`` [in, in] of the inputs; None for ``magnitude`` alone.

    Raises:
        NumericalFailure: the Hessian cannot be factorised.
    """
    magnitude = weight.detach().float().abs()
    if score == "magnitude":
        return magnitude
    assert hessian is not None
    if not bool(hessian.diagonal().any()):  # no input reaches the layer: no weight is worth anything
        return magnitude
    if score == "wanda":
        return magnitude * hessian.diagonal().sqrt()
    root, _ = inverse_root(hessian, damp)
    return magnitude.square() / root.diagonal().square()


def transform(model: nn.Module, options: NmOptions, context: Context) -> nn.Module:
    names, left = choose_layers(model, options, context)
    retrains = options.steps > 0 and not context.info.synthetic
    loss = task_of(model, context) if retrains else None
    if retrains:
        require_text(context)
    masks = _prune(model, names, options, context, keep_masks=retrains)
    if retrains:
        weights = {name: model.get_parameter(f"{name}.weight") for name in names}
        with HeldMasks(weights, masks) as held:
            report = context.train(
                model,
                loss=loss,
                steps=options.steps,
                lr=options.lr,
                on_start=held.start,
                on_step=held.hold,
            )
        context.record("retraining_loss", report.final_loss, "nats", "mean of the last tenth")
    store_zeros(model, names, options, context)
    record_left_dense(context, left)
    return model


@torch.no_grad()
def _prune(
    model: nn.Module, names: list[str], options: NmOptions, context: Context, *, keep_masks: bool
) -> dict[str, torch.Tensor]:
    """Set the weights to zero, layer by layer; the masks where they are wanted."""
    masks: dict[str, torch.Tensor] = {}
    kept = total = 0.0

    def prune(name: str, hessian: torch.Tensor | None) -> None:
        nonlocal kept, total
        weight: Any = model.get_parameter(f"{name}.weight")
        check_finite(name, weight)
        try:
            scores = scores_of(weight, options.score, hessian, options.damp)
        except NumericalFailure as error:
            raise NumericalFailure(f"{name}: {error}") from None
        keep = keep_n_of_m(scores, options.n, options.m)
        total += float(weight.abs().sum(dtype=torch.float64))
        weight.mul_(keep)
        kept += float(weight.abs().sum(dtype=torch.float64))
        if keep_masks:
            masks[name] = keep

    if options.score == "magnitude":
        for name in names:
            prune(name, None)
    else:
        for block in context.blocks(model):  # each sees what the pruned ones before it give
            prefix = f"{block.name}."
            inside = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
            for name, hessian in observe_hessians(block, inside).items():
                prune(f"{prefix}{name}", hessian)
    context.record("kept_magnitude_share", kept / total if total else 1.0, "1", "of the sum of |w|")
    return masks


def _needs(options: NmOptions) -> tuple[str, ...]:
    calibration = () if options.score == "magnitude" else ("calibration",)
    return (*calibration, *(("training",) if options.steps else ()), *needs_cuda(options))


def applies(info: ModelInfo, options: NmOptions) -> str | None:
    return refusal(info, options)


METHOD = Method(
    name="nm-prune",
    family="sparsity",
    paper=Paper(
        title="Accelerating Sparse Deep Neural Networks",
        authors="Mishra, Latorre, Pool, Stosic, Stosic, Venkatesh, Yu, Micikevicius",
        year=2021,
        arxiv="2104.08378",
    ),
    options=NmOptions,
    transform=transform,
    needs=_needs,
    applies=applies,
    leaves_zeros=True,
)


@hookimpl
def register_methods() -> list[Method]:
    return [METHOD]
