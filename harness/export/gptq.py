"""Layers in the layout of GPTQ checkpoints, version 2.

=============  ===========================================================================================
``qweight``    int32 [in * bits / 32, out]: the codes of a column of outputs, packed along the inputs
``qzeros``     int32 [groups, out * bits / 32]: zero points, packed along the outputs
``scales``     [groups, out]
``g_idx``      int32 [in]: the group of each input column, so that groups need not be consecutive
``bias``       [out]
=============  ===========================================================================================

A value is ``scale * (code - zero)``. Version 1 stores ``zero - 1``, which loses an asymmetric zero point of
0; version 2 (``checkpoint_format: gptq_v2``) stores the zero point itself.

Source: Frantar et al. 2022 (arXiv:2210.17323) for the method; the layout is GPTQModel's and AutoGPTQ's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from harness.export.forms import Form, IntegerForm
from harness.export.words import pack_words, unpack_words

__all__ = ["decode", "quantization_config", "tensors_of", "unfit"]

_UNIT = 32  # codes of any width fill whole words in so many


def unfit(form: Form) -> str | None:
    """Why the layout cannot hold a layer; None where it can."""
    if not isinstance(form, IntegerForm):
        return "GPTQ's layout has integer weights only"
    if form.inputs is not None:
        return "its input is rounded too, and GPTQ's layout has weights only"
    out, columns = form.codes.shape
    if out % _UNIT or columns % _UNIT:
        return f"[{out}, {columns}]: GPTQ's layout needs both sizes to be multiples of {_UNIT}"
    return None


def tensors_of(form: IntegerForm) -> dict[str, torch.Tensor]:
    """The tensors of a layer by their names under the layer's own."""
    zero = form.zero
    if zero is None:
        zero = torch.full_like(form.scale, 2 ** (form.bits - 1), dtype=torch.uint8)
    tensors = {
        "qweight": pack_words(form.codes, form.bits).t(),
        "qzeros": pack_words(zero.t(), form.bits),
        "scales": form.scale.t(),
        "g_idx": form.places().to(torch.int32),
    }
    if form.bias is not None:
        tensors["bias"] = form.bias
    return tensors


def quantization_config(forms: Mapping[str, Form]) -> dict[str, Any]:
    """What config.json says under ``quantization_config``; all layers have the same settings."""
    form = next(iter(forms.values()))
    assert isinstance(form, IntegerForm)
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq_v2",
        "bits": form.bits,
        "group_size": form.group_size,
        "sym": form.zero is None,
        "desc_act": any(
            isinstance(each, IntegerForm) and each.group_of is not None for each in forms.values()
        ),
        "lm_head": False,
        "pack_dtype": "int32",
    }


def decode(tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> torch.Tensor:
    """The matrix [out, in] in float32 that the tensors of one layer stand for.

    Args:
        tensors: by their names under the layer's own.
        config: ``quantization_config``.
    """
    bits, groups = config["bits"], tensors["g_idx"].long()
    scales = tensors["scales"].float()  # [groups, out]
    codes = unpack_words(tensors["qweight"].t().contiguous(), bits, groups.numel()).t().float()
    zeros = unpack_words(tensors["qzeros"], bits, scales.shape[1]).float()
    return ((codes - zeros[groups]) * scales[groups]).t().contiguous()
