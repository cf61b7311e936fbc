"""What a checkpoint of a variant holds: its layers as they are stored, its other tensors, and its format."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

from harness.export import compressed_tensors, gptq
from harness.export.forms import DenseForm, Form, IntegerForm

__all__ = ["UNPACKED", "Contents"]

UNPACKED = "weights are stored dequantized: size and speed are not the variant's"
"""What is said of a dense form though it computes what the variant computes."""


@dataclass
class Contents:
    """What a checkpoint of a variant holds.

    Args:
        layout: ``plain`` (nothing is quantized), ``compressed-tensors``, ``gptq`` or ``dense`` (simulated).
        stock: the model that transformers builds from `config`, without values.
        layers: what each linear layer (``dense``: and embedding) is stored as, by name.
        transposed: those that the stock model keeps transposed (GPT-2's).
        rest: all other tensors by name.
        sources: the variant's own modules that `layers` were taken out of.
        simulated: what a dense form is not that the variant is; empty where nothing was dequantized.
    """

    layout: str
    stock: nn.Module
    config: Any
    layers: dict[str, Form]
    transposed: frozenset[str]
    rest: dict[str, torch.Tensor]
    sources: dict[str, nn.Module] = field(default_factory=dict)
    simulated: list[str] = field(default_factory=list)

    @property
    def quantized(self) -> dict[str, Form]:
        """The layers that are not stored as a plain matrix."""
        return {name: form for name, form in self.layers.items() if not isinstance(form, DenseForm)}

    @property
    def schemes(self) -> dict[str, int]:
        """How many layers there are of each scheme, such as ``{"W4A16 g128": 28}``."""
        counts: dict[str, int] = {}
        for form in self.quantized.values():
            counts[form.scheme] = counts.get(form.scheme, 0) + 1
        return counts

    @property
    def rounds_inputs(self) -> bool:
        """Whether whoever loads it has to round the inputs of layers."""
        return any(getattr(form, "inputs", None) is not None for form in self.layers.values())

    @property
    def computes_otherwise(self) -> bool:
        """Whether a dense form leaves out rounding that the variant does."""
        return any(each != UNPACKED for each in self.simulated)

    @cached_property
    def quantization_config(self) -> dict[str, Any] | None:
        """What config.json says of the format; None where nothing is quantized."""
        if not self.quantized:
            return None
        if self.layout == "gptq":
            return gptq.quantization_config(self.quantized)
        others = [
            name
            for name, module in self.stock.named_modules()
            if isinstance(module, nn.Linear) and name not in self.quantized
        ]
        return compressed_tensors.quantization_config(self.quantized, others)

    @property
    def format(self) -> str:
        """The format in words."""
        config = self.quantization_config
        if config is None:
            return "plain" if self.layout != "dense" else "plain, dequantized (simulated)"
        if self.layout == "gptq":
            return f"gptq ({config['checkpoint_format']})"
        return f"compressed-tensors {config['format']}"

    def tensors_of(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of one of `layers` by their full names."""
        form = self.layers[name]
        if isinstance(form, DenseForm):
            weight = form.weight.to(self.config.dtype)
            tensors = {"weight": weight.t() if name in self.transposed else weight}
            if form.bias is not None:
                tensors["bias"] = form.bias.to(self.config.dtype)
        elif self.layout == "gptq":
            assert isinstance(form, IntegerForm)
            tensors = gptq.tensors_of(form)
        else:
            tensors = compressed_tensors.tensors_of(form)
        return {f"{name}.{key}": tensor for key, tensor in tensors.items()}

    @property
    def stored_bytes(self) -> int:
        """Bytes of all tensors on paper: codes at their bits, scales and zero points beside them."""
        total = sum(tensor.numel() * tensor.element_size() for tensor in self.rest.values())
        return total + sum(_form_bytes(form, self.config.dtype) for form in self.layers.values())


def _form_bytes(form: Form, dtype: torch.dtype) -> int:
    bias = 0 if form.bias is None else form.bias.numel() * form.bias.element_size()
    if isinstance(form, DenseForm):
        return form.weight.numel() * dtype.itemsize + bias
    bits = form.bits if isinstance(form, IntegerForm) else 8
    zero = form.zero if isinstance(form, IntegerForm) else None
    beside = form.scale.numel() * form.scale.element_size() + bias
    return (form.codes.numel() + (0 if zero is None else zero.numel())) * bits // 8 + beside
