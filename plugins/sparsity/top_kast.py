"""Sparse from the first step: compute with the largest weights, and update some more that may replace them.

Paper: Top-KAST: Top-K Always Sparse Training. Siddhant M. Jayakumar, Razvan Pascanu, Jack W. Rae, Simon
Osindero, Erich Elsen, 2020, arXiv:2106.03517.

Changes: zeros in the linear layers inside the blocks. In the forward pass a layer has only its `density`
largest weights; the gradient of those sparse weights updates them and the `extra` next ones, which compute
nothing yet. All others stay to the bit. A penalty, stronger on what is only explored, makes room for it.
From the share `switch` of the run on the masks are fixed and only what is active is updated.

Needs: training tokens. A `scratch:` model is trained this way for the first time; random weights (`shape:`
models) are only cut to `density`. The masks are simulated on dense tensors: training takes the memory and
time of dense training and a copy of the weights, and the dense kernel runs over the zeros. `bitmap_bytes`
records what a bitmap and the active weights would take.

Knobs: `density` (0.2: 80 % zeros forward); `extra` (with density 0.5: 50 % zeros backward; 0: no
exploration); `lam` and `reg`, the penalty (l2 or l1); `refresh`, steps between choices of the masks;
`switch`; `scope`, over which weights compete (`layer` or `global`); `steps` and `lr` (the sweep's);
`targets`.

Hurts: small networks and short runs, where exploration costs more than it finds (`extra` 0 was better
here).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from harness import Method, Options, Paper, hookimpl
from harness.nn.pruned import record_masks, target_weights
from harness.nn.surgery import Targets

from ._exploration import Exploration

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from harness import Context, ModelInfo

__all__ = ["METHOD", "TopKastOptions"]

_WHOLE = 1 + 1e-9  # 0.7 + 0.3 is a little more than 1


class TopKastOptions(Options):
    aliases: ClassVar[Mapping[str, str]] = {"D": "density", "M": "extra"}

    density: float = Field(0.2, gt=0, le=1, description="share of the weights in the forward pass")
    extra: float = Field(0.3, ge=0, lt=1, description="share that is updated besides those")
    lam: float = Field(1e-4, ge=0, description="strength of the penalty; 0: none")
    reg: Literal["l2", "l1"] = "l2"
    refresh: int = Field(1, ge=1, description="steps between two choices of the masks")
    switch: float = Field(0.5, ge=0, le=1, description="share of the run after which masks are fixed")
    scope: Literal["layer", "global"] = "layer"
    steps: int | None = Field(None, ge=1, description="training steps; by default the sweep's")
    lr: float | None = Field(None, gt=0, description="peak learning rate; by default the loop's")
    targets: Targets = Field(None, description="regular expression for the layers' names")

    @model_validator(mode="after")
    def _no_more_than_all(self) -> TopKastOptions:
        if self.density + self.extra > _WHOLE:
            raise ValueError(
                f"density={self.density} and extra={self.extra} are together more than all weights"
            )
        return self


def transform(model: nn.Module, options: TopKastOptions, context: Context) -> nn.Module:
    steps = context.training_steps(options.steps) if not context.info.synthetic else 0
    weights = target_weights(model, options.targets)
    exploration = Exploration(
        weights,
        density=options.density,
        extra=min(options.extra, 1 - options.density),
        scope=options.scope,
        lam=options.lam,
        reg=options.reg,
    )
    last_choice = round(options.switch * steps)
    activated = 0

    def on_step(step: int, _model: nn.Module) -> None:
        nonlocal activated
        if step + 1 == last_choice:
            activated += exploration.stop_exploring()
        elif step + 1 < last_choice and (step + 1) % options.refresh == 0:
            activated += exploration.refresh()

    if last_choice == 0:
        exploration.stop_exploring()
    with exploration:
        report = context.train(model, steps=steps, lr=options.lr, on_start=exploration.start, on_step=on_step)
    if report.steps:
        places = sum(mask.numel() for mask in exploration.active.values())
        context.record("training_loss", report.final_loss, "nats", "without penalty; mean of the last tenth")
        context.record("activated_share", activated / places, "1", "how often one became active, per weight")
    record_masks(context, model, weights, exploration.active)
    return model


def applies(info: ModelInfo, _options: TopKastOptions) -> str | None:
    if info.family == "other":
        return f"architecture {info.model_type!r} is not known"
    if info.kind == "encoder":
        return "encoders have no training objective here"
    return None


METHOD = Method(
    name="top-kast",
    family="sparsity",
    paper=Paper(
        title="Top-KAST: Top-K Always Sparse Training",
        authors="Jayakumar, Pascanu, Rae, Osindero, Elsen",
        year=2020,
        arxiv="2106.03517",
    ),
    options=TopKastOptions,
    transform=transform,
    needs=("training",),
    applies=applies,
    trains_scratch=True,
    leaves_zeros=True,
)


@hookimpl
def register_methods() -> list[Method]:
    return [METHOD]
