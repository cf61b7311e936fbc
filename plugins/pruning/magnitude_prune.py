"""The smallest weights become zero: large networks lose half of them at little cost.

Paper: Learning both Weights and Connections for Efficient Neural Networks. Song Han, Jeff Pool,
John Tran, William J. Dally, 2015, arXiv:1506.02626. Compared with other ways in Gale, Elsen,
Hooker, 2019, arXiv:1902.09574.

Changes: zeros in the linear layers inside the blocks; embeddings, norms, biases and the head stay.
The zeros are unstructured: the dense kernel runs over them, so nothing gets faster or smaller. What
a bitmap and the surviving weights would take is recorded as `bitmap_bytes`, a theoretical size.

Needs: a trained model; with `steps` it retrains, the zeros held at zero (weights, gradients, optimiser). An
untrained `scratch:` model is for gmp, iterative-prune and the rewinding methods.

Knobs: `sparsity`; `scope`, over which weights compete (`layer`, `row` of a layer, `global`);
`min_layer_density`, what a layer keeps at least under `global`; `steps`; `targets`, a regular
expression for the names of layers.

Hurts: beyond half without retraining; on small, well-trained models much earlier.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from harness import Method, Options, Paper, hookimpl
from harness.nn.held_masks import HeldMasks
from harness.nn.magnitude import keep_masks
from harness.nn.pruned import bitmap_bytes, burn_in, record_masks, target_weights
from harness.nn.surgery import Targets

from ._scope import require_reachable

if TYPE_CHECKING:
    from torch import nn

    from harness import Context, ModelInfo

__all__ = ["METHOD", "MagnitudeOptions", "bitmap_bytes", "keep_masks"]


class MagnitudeOptions(Options):
    sparsity: float = Field(0.5, ge=0, lt=1, description="share of the weights that become zero")
    scope: Literal["layer", "global", "row"] = "layer"
    steps: int = Field(0, ge=0, description="retraining steps with the zeros held")
    targets: Targets = Field(None, description="regular expression for the layers' names")
    min_layer_density: float = Field(0.01, ge=0, le=1, description="kept at least; scope=global")

    @model_validator(mode="after")
    def _can_be_reached(self) -> MagnitudeOptions:
        require_reachable(self.sparsity, self.scope, self.min_layer_density)
        return self


def transform(model: nn.Module, options: MagnitudeOptions, context: Context) -> nn.Module:
    weights = target_weights(model, options.targets)
    masks = keep_masks(weights, options.sparsity, options.scope, options.min_layer_density)
    if options.steps:
        with HeldMasks(weights, masks) as held:
            context.train(model, steps=options.steps, on_start=held.start, on_step=held.hold)
    else:
        burn_in(weights, masks)
    record_masks(context, model, weights, masks)
    return model


def applies(info: ModelInfo, options: MagnitudeOptions) -> str | None:
    if info.family == "other":
        return f"architecture {info.model_type!r} is not known"
    if info.scratch:
        return (
            "an untrained model is trained after the method, which would fill its zeros; prune a trained one"
        )
    if options.steps and info.kind == "encoder":
        return "encoders have no training objective here; leave steps at 0"
    return None


METHOD = Method(
    name="magnitude-prune",
    family="pruning",
    paper=Paper(
        title="Learning both Weights and Connections for Efficient Neural Networks",
        authors="Han, Pool, Tran, Dally",
        year=2015,
        arxiv="1506.02626",
    ),
    options=MagnitudeOptions,
    transform=transform,
    needs=lambda options: ("training",) if options.steps else (),
    applies=applies,
    leaves_zeros=True,
)


@hookimpl
def register_methods() -> list[Method]:
    return [METHOD]
