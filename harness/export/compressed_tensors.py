"""Layers in the formats of compressed-tensors: ``pack-quantized``, ``int-quantized``, ``float-quantized``.

A layer ``x.q_proj`` becomes tensors beside each other, all under its name:

==================  ================================================================================
pack-quantized      ``weight_packed`` int32 [out, ceil(in * bits / 32)], ``weight_shape`` int64 [2],
                    ``weight_scale`` [out, groups], asymmetric: ``weight_zero_point`` int32
                    [ceil(out * bits / 32), groups]
int-quantized       ``weight`` int8 [out, in], ``weight_scale`` [out, 1], asymmetric:
                    ``weight_zero_point`` int8 [out, 1]
float-quantized     ``weight`` float8 E4M3 [out, in], ``weight_scale`` [out, 1], or [1] for one in all
all of them         ``input_scale`` [1] where inputs are rounded with a calibrated scale; ``bias``
==================  ================================================================================

Codes are signed there and unsigned here, ``2^(bits - 1)`` more; the packed words hold them unsigned.

Source: the package compressed-tensors 0.20 (Apache-2.0), https://github.com/vllm-project/compressed-tensors.
Before its dense packing it held codes of 3 bits ten to a word: those files need 0.20 or newer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from harness.export.forms import FloatForm, Form, Inputs, IntegerForm
from harness.export.words import pack_words, unpack_words

__all__ = ["decode", "quantization_config", "tensors_of", "unfit"]

VERSION = "0.20.1"
"""The version of the package that this was written for and is tested with."""


def unfit(form: Form) -> str | None:
    """Why these formats cannot hold a layer; None where they can."""
    if isinstance(form, IntegerForm) and form.group_of is not None:
        return (
            "its groups are not consecutive columns (act_order), which compressed-tensors has no place for; "
            "--layout gptq has one"
        )
    return None


def tensors_of(form: IntegerForm | FloatForm) -> dict[str, torch.Tensor]:
    """The tensors of a layer by their names under the layer's own."""
    tensors: dict[str, torch.Tensor] = {}
    if isinstance(form, FloatForm):
        scale = form.scale if form.scale.numel() == 1 < form.codes.shape[0] else form.scale[:, None]
        tensors |= {"weight": form.codes, "weight_scale": scale}
    elif _is_packed(form):
        tensors |= {
            "weight_packed": pack_words(form.codes, form.bits),
            "weight_shape": torch.tensor(form.codes.shape),
            "weight_scale": form.scale,
        }
        if form.zero is not None:
            tensors["weight_zero_point"] = pack_words(form.zero.t(), form.bits).t()
    else:
        tensors |= {"weight": _signed(form.codes, form.bits), "weight_scale": form.scale}
        if form.zero is not None:
            tensors["weight_zero_point"] = _signed(form.zero, form.bits)
    if form.inputs is not None and form.inputs.scale is not None:
        tensors["input_scale"] = form.inputs.scale
    if form.bias is not None:
        tensors["bias"] = form.bias
    return tensors


def quantization_config(forms: Mapping[str, Form], other_linears: Sequence[str]) -> dict[str, Any]:
    """What config.json says under ``quantization_config``.

    Args:
        forms: the quantized layers by name.
        other_linears: the linear layers of the model that stay as they are.
    """
    groups: dict[str, dict[str, Any]] = {}
    targets: dict[str, list[str]] = {}
    for name, form in forms.items():
        scheme = _scheme(form)
        key = json.dumps(scheme, sort_keys=True)
        groups.setdefault(key, scheme)
        targets.setdefault(key, []).append(name)
    # One scheme for all is written by the class of the layers, as the package itself writes it.
    is_single = len(groups) == 1
    formats = {group["format"] for group in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "version": VERSION,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{number}": {"targets": ["Linear"] if is_single else targets[key], **scheme}
            for number, (key, scheme) in enumerate(groups.items())
        },
        "ignore": sorted(other_linears) if is_single else [],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def decode(tensors: Mapping[str, torch.Tensor], scheme: Mapping[str, Any]) -> torch.Tensor:
    """The matrix [out, in] in float32 that the tensors of one layer stand for.

    Args:
        tensors: by their names under the layer's own.
        scheme: the layer's entry of ``config_groups``.
    """
    weights, scale = scheme["weights"], tensors["weight_scale"].float()
    bits = weights["num_bits"]
    if scheme["format"] != "pack-quantized":
        codes: torch.Tensor = tensors["weight"].float()
        if "weight_zero_point" in tensors:
            codes = codes - tensors["weight_zero_point"].float()
        return codes * (scale if scale.ndim == 2 else scale.view(1, 1))
    out, columns = tensors["weight_shape"].tolist()
    codes = unpack_words(tensors["weight_packed"], bits, columns).float() - 2 ** (bits - 1)
    groups = scale.shape[1]
    zero = torch.zeros(out, groups)
    if "weight_zero_point" in tensors:
        packed = tensors["weight_zero_point"].t().contiguous()
        zero = unpack_words(packed, bits, out).t().float() - 2 ** (bits - 1)
    grouped = codes.view(out, groups, -1)
    return ((grouped - zero[..., None]) * scale[..., None]).view(out, columns)


def _is_packed(form: IntegerForm) -> bool:
    """8-bit codes that meet 8-bit inputs are stored as int8; all others in words."""
    return form.inputs is None or form.bits < 8


def _signed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    return (codes.to(torch.int16) - (1 << bits - 1)).to(torch.int8)


def _scheme(form: Form) -> dict[str, Any]:
    """An entry of ``config_groups``, without its targets."""
    if isinstance(form, FloatForm):
        per_tensor = form.scale.numel() == 1 < form.codes.shape[0]
        strategy = "tensor" if per_tensor else "channel"
        weights: dict[str, Any] = _arguments(8, "float", strategy)
        kind = "float-quantized"
    else:
        assert isinstance(form, IntegerForm)
        strategy = "channel" if form.group_size == -1 else "group"
        weights = _arguments(form.bits, "int", strategy, symmetric=form.zero is None)
        if form.group_size != -1:
            weights["group_size"] = form.group_size
        kind = "pack-quantized" if _is_packed(form) else "int-quantized"
    scheme: dict[str, Any] = {"weights": weights, "format": kind}
    if form.inputs is not None:
        scheme["input_activations"] = _input_arguments(form.inputs, weights["type"])
    return scheme


def _arguments(bits: int, kind: str, strategy: str, *, symmetric: bool = True) -> dict[str, Any]:
    return {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": symmetric, "dynamic": False}


def _input_arguments(inputs: Inputs, kind: str) -> dict[str, Any]:
    strategy = "token" if inputs.granularity == "per-token" else "tensor"
    return {**_arguments(8, kind, strategy), "dynamic": inputs.scale is None}
