"""llm-compressor's GPTQ and SmoothQuant, calibrated on the same tokens as the harness's own.

The library: https://github.com/vllm-project/llm-compressor, an optional package:
pip install 'transformer-harness[llm-compressor]'.

Changes: the weights of the linear layers inside the blocks are rounded in place by the library. It writes
checkpoints for vLLM and has no kernels: what runs here is the dense form of its result, with rounded
activations where the scheme rounds them, so every row says *simulated*. Quality and the cost to
compress are the library's; size and speed are those of the dense model.

Needs: calibration tokens.

Knobs: `scheme` (gptq: weights only; smoothquant: smoothing, then W8A8 with a scale per token), `bits`
and `group_size` (gptq), `damp` (gptq: share of the mean diagonal added to the Hessian), `alpha`
(smoothquant: share of the range moved into the weights).

Hurts: it cannot be served from here; use it to compare quality and the time that compressing takes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import nn
from torch.utils.data import DataLoader

from harness import Method, Options, hookimpl

from ._peers import absence, contained, linear_names, unfit

if TYPE_CHECKING:
    from harness import Context, ModelInfo

__all__ = ["METHOD", "LlmCompressorOptions"]


class LlmCompressorOptions(Options):
    """GPTQ with symmetric groups as the library recommends it, or SmoothQuant."""

    scheme: Literal["gptq", "smoothquant"] = Field("gptq", description="the library's recipe")
    bits: Literal[4, 8] = Field(4, description="bits of a weight, for gptq")
    group_size: int = Field(128, ge=1, description="input columns per scale, for gptq")
    damp: float = Field(0.01, gt=0, description="added to the Hessian, for gptq")
    alpha: float = Field(0.5, ge=0, le=1, description="share of the range moved, for smoothquant")

    @model_validator(mode="after")
    def _consistent(self) -> LlmCompressorOptions:
        if self.scheme == "smoothquant" and (self.bits, self.group_size, self.damp) != (4, 128, 0.01):
            raise ValueError("bits, group_size and damp belong to scheme=gptq; smoothquant is W8A8")
        if self.scheme == "gptq" and self.alpha != 0.5:
            raise ValueError("alpha belongs to scheme=smoothquant, not gptq")
        return self


def _recipe(options: LlmCompressorOptions, names: list[str]) -> list[Any]:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    if options.scheme == "gptq":
        weights = QuantizationArgs(
            num_bits=options.bits, type="int", symmetric=True, strategy="group", group_size=options.group_size
        )
        groups = {"blocks": QuantizationScheme(targets=names, weights=weights)}
        return [GPTQModifier(config_groups=groups, dampening_frac=options.damp)]
    weights = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="channel")
    inputs = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="token", dynamic=True)
    groups = {"blocks": QuantizationScheme(targets=names, weights=weights, input_activations=inputs)}
    return [
        SmoothQuantModifier(smoothing_strength=options.alpha),
        QuantizationModifier(config_groups=groups),
    ]


def transform(model: nn.Module, options: LlmCompressorOptions, context: Context) -> nn.Module:
    names = linear_names(model)
    tokens = context.calibration()
    rows = [{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in tokens]
    with contained(), _known_by_path(model):
        from llmcompressor import oneshot

        oneshot(
            model=model,
            # It wants one, and with tokens that are ready uses it for nothing.
            processor=context.tokenizer or object(),
            dataset=DataLoader(rows, batch_size=None),
            recipe=_recipe(options, names),
            num_calibration_samples=len(rows),
            max_seq_length=tokens.shape[1],
            log_dir=None,
        )
    bits = options.bits if options.scheme == "gptq" else 8
    for name in names:
        layer: Any = model.get_submodule(name)
        layer.simulated, layer.bits, layer.kernel_name = True, bits, "dense (llm-compressor has no kernel)"
    return model.eval()


@contextmanager
def _known_by_path(model: nn.Module) -> Iterator[None]:
    """The library reads the model's configuration from a path, where one in memory has none."""
    config: Any = model.config
    before = config._name_or_path
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        config._name_or_path = folder
        try:
            yield
        finally:
            config._name_or_path = before


def applies(info: ModelInfo, options: LlmCompressorOptions) -> str | None:
    if absent := absence("llmcompressor", "llm-compressor"):
        return absent
    if info.kind == "encoder":
        return "llm-compressor traces decoders, not encoders"
    if options.scheme == "smoothquant" and info.family != "llama":
        return "llm-compressor's SmoothQuant knows the norms of Llama-like models"
    if options.scheme == "gptq" and info.hidden_size % options.group_size:
        return f"group_size {options.group_size} does not divide the hidden size {info.hidden_size}"
    return unfit(info)


METHOD = Method(
    name="llm-compressor",
    family="external",
    paper="Frantar et al. (2022). GPTQ, as llm-compressor has it. arXiv:2210.17323.",
    options=LlmCompressorOptions,
    transform=transform,
    needs=("calibration",),
    applies=applies,
    leaves_layers=lambda _options: False,
)


@hookimpl
def register_methods() -> list[Method]:
    return [METHOD]
