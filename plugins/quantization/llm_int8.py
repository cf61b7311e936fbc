"""LLM.int8(): int8 products lose nothing once the few outlier columns are multiplied in 16 bits.

Paper: LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale. Tim Dettmers, Mike Lewis,
Younes Belkada, Luke Zettlemoyer, 2022, arXiv:2208.07339.

Changes: every linear layer inside the blocks (or those whose full name matches `targets`) stores int8
weights with one scale per output row. Of its input, each column with a value of at least `threshold` is
multiplied in the type of the activations; the rest is rounded to int8 with one scale per token, found
after those columns are out, and multiplied exactly in int32. Both products are added.

Needs: nothing; calibration tokens for `outlier_weight` fp16-cached.

Knobs: `threshold` (6 in the paper; one that nothing reaches, say 1e9, leaves plain vector-wise int8, and
0 multiplies everything in 16 bits), `outlier_weight` (what outlier columns are multiplied with: dequant
recovers their weights from int8, as deployed libraries do; fp16-cached keeps those of the columns that
calibration finds in 16 bits, as in the paper, and recovers the rest), `w_scale_over` (regular: cached
columns do not count for the weight's scales, and are always multiplied in 16 bits), `capacity` (columns
taken out of a call at most; on CUDA only, where the launches must not depend on the data. Columns beyond
it stay in int8 and are counted as `outlier_columns_beyond_capacity`).

Hurts: speed. The outliers are looked for, gathered and multiplied apart, on top of W8A8. The threshold
was found on models of 6.7B parameters and more: how many columns a model has beyond it is recorded as
`outlier_column_share`, and a small model's figure says nothing about a large one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from harness import Method, NumericalFailure, Options, Paper, hookimpl
from harness.nn.outlier_int8 import CAPACITY, OutlierInt8Linear
from harness.nn.ranges import observe_peaks
from harness.nn.surgery import Targets, replace_module

from ._weights import quantizable, refusal

if TYPE_CHECKING:
    from harness import Context, ModelInfo

__all__ = ["METHOD", "LlmInt8Options"]


class LlmInt8Options(Options):
    """The paper's threshold; weights as deployed libraries store them."""

    threshold: float = Field(6.0, ge=0, description="columns with |x| of at least this are outliers")
    outlier_weight: Literal["dequant", "fp16-cached"] = Field(
        "dequant", description="what outlier columns are multiplied with"
    )
    w_scale_over: Literal["all", "regular"] = Field(
        "all", description="which columns count for a weight's scale; regular: those that are not cached"
    )
    capacity: int = Field(CAPACITY, ge=1, description="outlier columns of a call at most; CUDA only")
    targets: Targets = Field(None, description="regular expression of full layer names")

    @model_validator(mode="after")
    def _consistent(self) -> LlmInt8Options:
        if self.w_scale_over == "regular" and self.outlier_weight != "fp16-cached":
            raise ValueError(
                "w_scale_over=regular needs outlier_weight=fp16-cached: without cached columns every "
                "weight has to come from its int8 code"
            )
        return self


@torch.no_grad()
def transform(model: nn.Module, options: LlmInt8Options, context: Context) -> nn.Module:
    names, _ = quantizable(model, group_size=-1, ragged="raise", targets=options.targets)
    if options.outlier_weight == "dequant":
        with context.progress("quantize", len(names)) as done:
            for index, name in enumerate(names):
                _replace(model, name, options)
                done(index + 1)
        return model
    found, seen, most = 0, 0, 0
    for block in context.blocks(model):
        prefix = f"{block.name}."
        inside = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
        for name, peaks in observe_peaks(block, inside).items():
            columns = (peaks >= options.threshold).nonzero()[:, 0]
            found, seen, most = found + len(columns), seen + len(peaks), max(most, len(columns))
            _replace(model, prefix + name, options, columns)
    note = f"of the inputs of {len(names)} layers on calibration tokens; most in one layer: {most}"
    context.record("calibration_outlier_column_share", found / seen, "1", note)
    return model


def _replace(
    model: nn.Module, name: str, options: LlmInt8Options, columns: torch.Tensor | None = None
) -> None:
    linear = model.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    try:
        layer = OutlierInt8Linear.from_float(
            linear.weight.detach(),
            linear.bias,
            threshold=options.threshold,
            capacity=options.capacity,
            columns=columns,
            kept_only=options.w_scale_over == "regular",
        )
    except NumericalFailure as error:
        raise NumericalFailure(f"{name}: {error}") from None
    replace_module(model, name, layer)


def applies(info: ModelInfo, options: LlmInt8Options) -> str | None:
    return refusal(info, group_size=-1, ragged="raise", targets=options.targets)


METHOD = Method(
    name="llm-int8",
    family="quantization",
    paper=Paper(
        title="LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale",
        authors="Dettmers, Lewis, Belkada, Zettlemoyer",
        year=2022,
        arxiv="2208.07339",
        venue="NeurIPS 2022",
    ),
    options=LlmInt8Options,
    transform=transform,
    needs=lambda options: ("calibration",) if options.outlier_weight == "fp16-cached" else (),
    applies=applies,
)


@hookimpl
def register_methods() -> list[Method]:
    return [METHOD]
