"""torchao's quantized tensors, on the very layers that the harness's own methods quantize.

The library: https://github.com/pytorch/ao (`torchao.quantization.quantize_`), an optional package:
pip install 'transformer-harness[peers]'.

Changes: the weight of every linear layer inside the blocks becomes a tensor of torchao, which brings its
own kernels. The layers stay `nn.Linear`.

Needs: int4 and float8 a CUDA device (float8 one of compute capability 8.9 or more), int4 bfloat16.

Knobs: `scheme` (int8-weight-only; int8-dynamic: W8A8, a scale per token; int4: tile-packed for the
tinygemm kernel of PyTorch; float8: dynamic activations, a scale per row) and `group_size` (int4 only:
32, 64, 128 or 256 input columns per scale).

Hurts: at few rows int8 products refuse or pad, at many rows int4 is slow; `harness why` tells. torchao
would also switch the compiler to slower searches for faster code (`set_inductor_config`); it is not let,
since every method here is compiled in the same way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from harness import Method, NotApplicable, Options, hookimpl

from ._peers import absence, linear_names, unfit

if TYPE_CHECKING:
    from harness import Context, ModelInfo

__all__ = ["METHOD", "TorchaoOptions", "configuration"]

Scheme = Literal["int8-weight-only", "int8-dynamic", "int4", "float8"]
_FLOAT8_CAPABILITY = (8, 9)


class TorchaoOptions(Options):
    """Which of torchao's configurations; their other settings are torchao's defaults."""

    scheme: Scheme = Field("int8-weight-only", description="torchao's configuration")
    group_size: Literal[32, 64, 128, 256] = Field(128, description="input columns per scale, for int4")

    @model_validator(mode="after")
    def _consistent(self) -> TorchaoOptions:
        if self.scheme != "int4" and "group_size" in self.model_fields_set and self.group_size != 128:
            raise ValueError(f"group_size belongs to scheme=int4, not {self.scheme}")
        return self


def configuration(options: TorchaoOptions) -> tuple[Any, int]:
    """torchao's configuration object, and the bits of a weight."""
    from torchao import quantization as ao

    if options.scheme == "int8-weight-only":
        return ao.Int8WeightOnlyConfig(set_inductor_config=False), 8
    if options.scheme == "int8-dynamic":
        return ao.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False), 8
    if options.scheme == "int4":
        config = ao.Int4WeightOnlyConfig(
            group_size=options.group_size,
            int4_packing_format="tile_packed_to_4d",
            set_inductor_config=False,
        )
        return config, 4
    return ao.Float8DynamicActivationFloat8WeightConfig(granularity=ao.PerRow(), set_inductor_config=False), 8


@torch.no_grad()
def transform(model: nn.Module, options: TorchaoOptions, context: Context) -> nn.Module:
    from torchao.quantization import quantize_

    _check_device(options, context)
    names = linear_names(model)
    if options.scheme == "int4":
        _check_groups(model, names, options.group_size)
    config, bits = configuration(options)
    chosen = set(names)
    quantize_(model, config, filter_fn=lambda _module, name: name in chosen)
    for name in names:
        layer: Any = model.get_submodule(name)
        layer.bits = bits
        layer.kernel_name = f"torchao {options.scheme}"
    return model


def _check_device(options: TorchaoOptions, context: Context) -> None:
    if options.scheme == "int4" and context.dtype != torch.bfloat16:
        raise NotApplicable("torchao's int4 needs --dtype bfloat16")
    if options.scheme == "float8" and context.device.type == "cuda":
        capability = torch.cuda.get_device_capability(context.device)
        if capability < _FLOAT8_CAPABILITY:
            raise NotApplicable("torchao's float8 needs a GPU of compute capability 8.9 or more")


def _check_groups(model: nn.Module, names: list[str], group_size: int) -> None:
    for name in names:
        columns = model.get_submodule(name).in_features
        if columns % group_size:  # torchao would leave the layer as it is and only log it
            raise NotApplicable(f"group_size {group_size} does not divide the {columns} columns of {name}")


def applies(info: ModelInfo, options: TorchaoOptions) -> str | None:
    return absence("torchao", "peers") or unfit(info)


METHOD = Method(
    name="torchao",
    family="external",
    paper="Or et al. (2025). TorchAO: Training-to-Serving Model Optimization. arXiv:2507.16099.",
    options=TorchaoOptions,
    transform=transform,
    needs=lambda options: ("cuda",) if options.scheme in ("int4", "float8") else (),
    applies=applies,
    leaves_layers=lambda _options: False,
)


@hookimpl
def register_methods() -> list[Method]:
    return [METHOD]
