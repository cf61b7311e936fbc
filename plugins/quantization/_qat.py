"""What the quantization-aware trainers share: options, training on the grid, packing what came out."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field, model_validator

from harness import NumericalFailure
from harness.nn.fake_quant import FakeQuantLinear
from harness.nn.surgery import replace_module

from ._weights import ActivationBits, ImpliedDefaults, quantizable, refusal, whole_number

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from harness import Context, ModelInfo

__all__ = ["TrainedOptions", "refused", "trained_and_packed"]


class TrainedOptions(ImpliedDefaults):
    """`w_gran` follows from `group_size`."""

    bits: Annotated[Literal[2, 3, 4, 8, 16], BeforeValidator(whole_number)] = Field(
        4, description="bits of a weight; 16: as it is, the control with the same steps"
    )
    a_bits: ActivationBits = Field(16, description="bits of an activation; 16: as it is")
    group_size: int = Field(-1, ge=-1, description="input columns per step; -1: one per output row")
    w_gran: Literal["per-channel", "per-group"] = Field("per-channel", description="what shares a step")
    learn_scale: bool = Field(True, description="learn the steps (LSQ); else they cover the weights' range")
    scale_init: Literal["mse", "lsq"] = Field("mse", description="where learned steps begin")
    lr: float = Field(1e-4, gt=0, description="peak learning rate; small models and 2 bits want 5e-4")
    scale_lr_mult: float = Field(1.0, gt=0, description="of lr / sqrt(Q_p), for the steps of the grid")
    steps: int | None = Field(None, ge=0, description="training steps; by default the sweep's")

    @model_validator(mode="before")
    @classmethod
    def _imply(cls, values: Any) -> Any:
        values = dict(values)
        values.setdefault("group_size", 128 if values.get("w_gran") == "per-group" else -1)
        is_per_row = whole_number(values["group_size"]) == -1
        values.setdefault("w_gran", "per-channel" if is_per_row else "per-group")
        return values

    @model_validator(mode="after")
    def _consistent(self) -> TrainedOptions:
        if self.group_size == 0 or (self.group_size > 0) != (self.w_gran == "per-group"):
            raise ValueError(f"w_gran={self.w_gran} and group_size={self.group_size} contradict each other")
        if self.a_bits == 8 and (self.bits, self.group_size) != (8, -1):
            raise ValueError(
                "a_bits=8 needs bits=8 and no groups: a scale that varies along the summed columns cannot "
                "leave an integer product"
            )
        return self


def trained_and_packed(
    model: nn.Module,
    options: TrainedOptions,
    context: Context,
    loss: Callable[[nn.Module, torch.Tensor], torch.Tensor] | None,
    *,
    weight_decay: float | None = None,
) -> nn.Module:
    """Train all weights through the grid of the linear layers inside the blocks, then pack those.

    Without steps (or with random weights) they are rounded on the grid that training would start from.

    Raises:
        NotApplicable: as `quantizable`.
        NumericalFailure: training diverged, or weights are not finite.
    """
    names: list[str] = []
    if options.bits < 16:
        names, _ = quantizable(model, group_size=options.group_size, ragged="raise", targets=None)
    if options.steps == 0 or context.info.synthetic:
        for name in names:  # one master weight in memory at a time
            replace_module(model, name, _faked(model, name, options).packed())
        return model.eval()
    layers = {name: _faked(model, name, options) for name in names}
    for name, layer in layers.items():
        replace_module(model, name, layer)
    hits = torch.zeros((), dtype=torch.int64, device=context.device)

    def keep_positive(_step: int, _model: nn.Module) -> None:
        for layer in layers.values():
            hits.add_(layer.clamp_scale())

    report = context.train(
        model,
        loss=loss,
        steps=options.steps,
        lr=options.lr,
        # Adam divides by the size of a gradient and so cancels LSQ's 1 / sqrt(N * Q_p). What that factor is
        # for, steps that move no faster than weights relative to their size, the rate must do: a step
        # is some 2 / sqrt(Q_p) of a mean weight.
        lr_multiples={
            layer.scale: options.scale_lr_mult / math.sqrt(layer.highest)
            for layer in layers.values()
            if layer.scale is not None
        },
        weight_decay=weight_decay,
        on_step=keep_positive,
    )
    while layers:
        name, layer = layers.popitem()
        replace_module(model, name, _named(name, layer.packed))
    if not report.steps:
        return model
    context.record("training_loss", report.final_loss, "nats", "mean of the last tenth")
    if options.learn_scale and names:
        context.record("clamped_steps", int(hits), "1", "learned steps that had to be kept above zero")
    return model


def _faked(model: nn.Module, name: str, options: TrainedOptions) -> FakeQuantLinear:
    linear: Any = model.get_submodule(name)
    return _named(
        name,
        lambda: FakeQuantLinear(
            linear,
            bits=options.bits,
            group_size=options.group_size,
            a_bits=options.a_bits,
            learn_scale=options.learn_scale,
            scale_init=options.scale_init,
        ),
    )


def _named(name: str, make: Callable[[], Any]) -> Any:
    """``make()``, whose failures name the layer."""
    try:
        return make()
    except NumericalFailure as error:
        raise NumericalFailure(f"{name}: {error}") from None


def refused(info: ModelInfo, options: TrainedOptions) -> str | None:
    """Why training on a grid does not fit a model, as far as its configuration tells."""
    return refusal(info, group_size=options.group_size, ragged="raise", targets=None)
