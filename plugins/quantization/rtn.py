"""Round-to-nearest: at 8 bits plain rounding loses almost nothing; below 4 it is the bar for the rest.

Paper: Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference.
Benoit Jacob et al., 2018, arXiv:1712.05877; conventions of Nagel et al. 2021, arXiv:2106.08295.

Changes: every linear layer inside the blocks (`targets`: those whose full name matches the regular
expression; `include_lm_head`: the output head too, which tied embeddings allow only with `untie`).
With `a_bits` 16 weights are stored packed in `bits` and multiplied with full-precision activations
(W4A16 and the like); with `a_bits` 8 both are int8 and the product is exact in int32 (W8A8). With `bits`
16 and `a_bits` 8 the weights stay as they are and only the inputs are rounded (W16A8, W32A8), so that
what each half of W8A8 costs can be told apart; no kernel computes that form, so it is simulated.

Needs: nothing; calibration for `a_gran` per-tensor-static.

Knobs: `bits`, `group_size` (input columns per scale; 128 up to 4 bits, else -1, one per output row),
`w_gran` (per-tensor: one scale per matrix), `sym` (no zero points; from 8 bits on), `a_gran` (one
activation scale per token, per tensor, or per tensor and fixed by calibration), `calib_method` and
`percentile` (how the fixed one clips), `ragged` (a group size that does not divide a layer: raise,
pad its last group, or skip the layer), `sparse` (W8A8 after nm-prune: of every four codes two are stored, for
sparse tensor cores: 0.625 of the bytes; layers that cannot be stay dense int8 and are recorded by name).

Hurts: at 3 bits and below, with outliers in the weights; with one scale per tensor, on activations
with outlier channels. Weight-only forms save time at a few rows only: with many, the weights are
dequantized first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field, model_validator
from torch import nn

from harness import Method, NotApplicable, Paper, hookimpl
from harness.nn.anatomy import anatomy_of, find
from harness.nn.ranges import ClipMethod, observe_clips
from harness.nn.rounded_input import RoundedInputLinear
from harness.nn.surgery import Targets, replace_module

from ._weights import (
    ActivationBits,
    ImpliedDefaults,
    Ragged,
    leaves_layers,
    left_dense,
    pack_float_weight,
    pack_int8,
    pack_sparse_int8,
    quantizable,
    refusal,
    round_linear,
    whole_number,
)

if TYPE_CHECKING:
    from harness import Context, ModelInfo

__all__ = ["METHOD", "RtnOptions"]


RtnBits = Annotated[Literal[2, 3, 4, 8, 16], BeforeValidator(whole_number)]


class RtnOptions(ImpliedDefaults):
    """`group_size`, `w_gran` and `sym` follow from `bits` where they are not given."""

    bits: RtnBits = Field(4, description="bits of a weight; 16: as it is")
    a_bits: ActivationBits = Field(16, description="bits of an activation; 16: as it is")
    group_size: int = Field(128, ge=-1, description="input columns per scale; -1: one per output row")
    w_gran: Literal["per-group", "per-channel", "per-tensor"] = Field(
        "per-group", description="what shares a weight scale; follows from group_size"
    )
    sym: bool = Field(False, description="no zero points; default: at 8 bits")
    a_gran: Literal["per-token", "per-tensor-dynamic", "per-tensor-static"] = Field(
        "per-token", description="what shares an activation scale"
    )
    calib_method: ClipMethod = Field("absmax", description="how a static activation scale clips")
    percentile: float = Field(99.9, gt=0, le=100, description="of |x|, for calib_method=percentile")
    targets: Targets = Field(None, description="regular expression of full layer names")
    include_lm_head: bool = Field(False, description="quantize the output head too")
    untie: bool = Field(False, description="let include_lm_head separate tied embeddings")
    ragged: Ragged = Field("raise", description="where the group size does not divide a layer")
    sparse: bool = Field(False, description="store 2:4 weights as such; bits=8, a_bits=8")

    @model_validator(mode="before")
    @classmethod
    def _imply(cls, values: Any) -> Any:
        values = dict(values)
        is_8_bit = whole_number(values.get("bits", 4)) in (8, 16)
        gran = values.get("w_gran", "per-channel" if is_8_bit else "per-group")
        values.setdefault("group_size", 128 if gran == "per-group" else -1)
        implied = "per-channel" if whole_number(values["group_size"]) == -1 else "per-group"
        values.setdefault("w_gran", implied)
        values.setdefault("sym", is_8_bit)
        return values

    @model_validator(mode="after")
    def _consistent(self) -> RtnOptions:
        if self.group_size == 0 or (self.group_size > 0) != (self.w_gran == "per-group"):
            raise ValueError(f"w_gran={self.w_gran} and group_size={self.group_size} contradict each other")
        if self.bits == 16:
            self._check_weights_untouched()
        elif self.a_bits == 8 and not (self.bits == 8 and self.sym and self.group_size == -1):
            raise ValueError(
                "a_bits=8 needs bits=8, sym=true and no groups: a scale that varies along the summed "
                "columns cannot leave an integer product"
            )
        if self.sparse and (self.a_bits != 8 or self.bits != 8 or self.a_gran != "per-token"):
            raise ValueError("sparse=true needs bits=8, a_bits=8 and a_gran=per-token: int8 2:4 has a kernel")
        if self.a_bits == 16 and self.a_gran != "per-token":
            raise ValueError(f"a_gran={self.a_gran} needs a_bits=8")
        if self.calib_method != "absmax" and self.a_gran != "per-tensor-static":
            raise ValueError(f"calib_method={self.calib_method} needs a_gran=per-tensor-static")
        return self

    def _check_weights_untouched(self) -> None:
        if self.a_bits == 16:
            raise ValueError("bits=16 and a_bits=16 change nothing; choose fewer bits of one of them")
        for name, implied in (("group_size", -1), ("w_gran", "per-channel"), ("sym", True)):
            if getattr(self, name) != implied:
                raise ValueError(f"bits=16 leaves the weights as they are, so {name} means nothing")


@torch.no_grad()
def transform(model: nn.Module, options: RtnOptions, context: Context) -> nn.Module:
    names, skipped = quantizable(
        model, group_size=options.group_size, ragged=options.ragged, targets=options.targets
    )
    if options.include_lm_head:
        head = _head_name(model, options)
        is_skipped = options.ragged == "skip" and not _divides(options, model.get_submodule(head))
        (skipped if is_skipped else names).append(head)
    if options.ragged == "skip":
        context.record("skipped_layers", len(skipped), "layers", ", ".join(skipped) or None)
    scales: dict[str, torch.Tensor] = {}
    if options.a_gran == "per-tensor-static":
        scales = _static_scales(model, names, options, context)
    dense = left_dense(model, names, torch.int8, context) if options.sparse else {}
    with context.progress("quantize", len(names)) as done:
        for index, name in enumerate(names):
            linear = model.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            sparse = options.sparse and name not in dense
            replacement = _quantized(name, linear, options, scales.get(name), sparse=sparse)
            replace_module(model, name, replacement)
            del linear
            done(index + 1)
    return model


def _quantized(
    name: str, linear: nn.Linear, options: RtnOptions, input_scale: torch.Tensor | None, *, sparse: bool
) -> nn.Module:
    per_tensor = options.w_gran == "per-tensor"
    if options.bits == 16:
        return RoundedInputLinear.from_linear(linear, a_gran=options.a_gran, input_scale=input_scale)
    if sparse:
        return pack_sparse_int8(name, linear, per_tensor=per_tensor)
    if options.a_bits == 8:
        return pack_int8(name, linear, per_tensor=per_tensor, a_gran=options.a_gran, input_scale=input_scale)
    weight = round_linear(
        name,
        linear.weight,
        bits=options.bits,
        group_size=options.group_size,
        sym=options.sym,
        per_tensor=per_tensor,
    )
    return pack_float_weight(linear, weight)


def _static_scales(
    model: nn.Module, names: list[str], options: RtnOptions, context: Context
) -> dict[str, torch.Tensor]:
    scales: dict[str, torch.Tensor] = {}
    for block in context.blocks(model):
        prefix = f"{block.name}."
        inside = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
        found = observe_clips(block, inside, options.calib_method, options.percentile)
        scales |= {f"{prefix}{name}": scale for name, scale in found.items()}
    return scales


def _divides(options: RtnOptions, linear: Any) -> bool:
    """Whether the group size, if any, divides a layer's columns."""
    return options.group_size == -1 or linear.in_features % options.group_size == 0


def _head_name(model: nn.Module, options: RtnOptions) -> str:
    found = find(model, anatomy_of(model).head)
    if found is None or not isinstance(found[1], nn.Linear):
        raise NotApplicable("include_lm_head: the model has no linear output head")
    name, head = found[0], found[1]
    # An embedding that another method packed has no weight, and shares none.
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    if options.bits < 16 and getattr(embedding, "weight", None) is head.weight and not options.untie:
        raise NotApplicable(_TIED)
    if options.ragged == "raise" and not _divides(options, head):
        raise NotApplicable(
            f"group_size {options.group_size} does not divide the {head.in_features} columns of {name}"
        )
    return name


_TIED = (
    "include_lm_head: the output head shares its weight with the embedding, which stays as it is, so "
    "nothing would be saved; untie=true quantizes a copy"
)


def applies(info: ModelInfo, options: RtnOptions) -> str | None:
    if options.include_lm_head and options.bits < 16 and info.tied_embeddings and not options.untie:
        return _TIED
    if options.include_lm_head and options.a_gran == "per-tensor-static":
        return "include_lm_head: a static activation scale is calibrated inside the blocks only"
    return refusal(info, group_size=options.group_size, ragged=options.ragged, targets=options.targets)


METHOD = Method(
    name="rtn",
    family="quantization",
    paper=Paper(
        title="Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
        authors="Jacob et al.",
        year=2018,
        arxiv="1712.05877",
        venue="CVPR 2018",
    ),
    options=RtnOptions,
    transform=transform,
    needs=lambda options: ("calibration",) if options.a_gran == "per-tensor-static" else (),
    applies=applies,
    leaves_layers=leaves_layers,
)


@hookimpl
def register_methods() -> list[Method]:
    return [METHOD]
