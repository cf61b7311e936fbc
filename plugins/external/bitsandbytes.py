"""bitsandbytes' LLM.int8() and NF4, on the very layers that the harness's own methods quantize.

The library: https://github.com/bitsandbytes-foundation/bitsandbytes, an optional package:
pip install 'transformer-harness[peers]'.

Changes: every linear layer inside the blocks is stored by bitsandbytes' quantizers and multiplied by its
kernels.

Needs: llm-int8 a CUDA device: on a CPU the library rounds no activations and takes out no columns, whatever
the threshold, which is not LLM.int8().

Knobs: `scheme` (llm-int8: int8 with input columns beyond the threshold in 16 bit; nf4: 4-bit NormalFloat
with blocks of 64 and scales that are quantized too) and `threshold` (of |x|, for llm-int8; 0 switches
the decomposition off).

Hurts: both save memory first; small batches are often slower than 16 bit, `harness why` tells.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from harness import Method, Options, hookimpl
from harness.nn.surgery import replace_module

from ._bitsandbytes import Int8OutlierLinear, Nf4Linear
from ._peers import absence, linear_names, unfit

if TYPE_CHECKING:
    from harness import Context, ModelInfo

__all__ = ["METHOD", "BitsandbytesOptions"]


class BitsandbytesOptions(Options):
    """The library's two formats."""

    scheme: Literal["llm-int8", "nf4"] = Field("llm-int8", description="the library's format")
    threshold: float = Field(6.0, ge=0, description="|x| of an outlier column, for llm-int8; 0: none")

    @model_validator(mode="after")
    def _consistent(self) -> BitsandbytesOptions:
        if self.scheme == "nf4" and self.threshold != 6.0:
            raise ValueError("threshold belongs to scheme=llm-int8, not nf4")
        return self


@torch.no_grad()
def transform(model: nn.Module, options: BitsandbytesOptions, context: Context) -> nn.Module:
    names = linear_names(model)
    with context.progress("quantize", len(names)) as done:
        for index, name in enumerate(names):
            linear = model.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            is_nf4 = options.scheme == "nf4"
            layer = Nf4Linear(linear) if is_nf4 else Int8OutlierLinear(linear, options.threshold)
            replace_module(model, name, layer)
            del linear
            done(index + 1)
    return model


def applies(info: ModelInfo, options: BitsandbytesOptions) -> str | None:
    return absence("bitsandbytes", "peers") or unfit(info)


METHOD = Method(
    name="bitsandbytes",
    family="external",
    paper="Dettmers et al. (2022). LLM.int8(), as bitsandbytes has it. arXiv:2208.07339.",
    options=BitsandbytesOptions,
    transform=transform,
    needs=lambda options: ("cuda",) if options.scheme == "llm-int8" else (),
    applies=applies,
    leaves_layers=lambda _options: False,
)


@hookimpl
def register_methods() -> list[Method]:
    return [METHOD]
