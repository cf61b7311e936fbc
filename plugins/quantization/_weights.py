"""What the weight quantizers share: options with implied defaults, which layers, packing one layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, ValidationError

from harness import ConfigError, NotApplicable, NumericalFailure, Options
from harness.nn.anatomy import sharing_input
from harness.nn.quantized import Int8Linear, QuantizedLinear
from harness.nn.quantizer import quantize_weight
from harness.nn.semi_structured import misfit
from harness.nn.sparse_8_bit import SparseInt8Linear
from harness.nn.surgery import block_linears

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn

    from harness import Context, ModelInfo
    from harness.nn.quantized import ActivationScale
    from harness.nn.quantizer import QuantizedWeight

__all__ = [
    "UNTRAINED",
    "ActivationBits",
    "EmbeddingBits",
    "ImpliedDefaults",
    "Int8Bits",
    "Ragged",
    "WeightBits",
    "leaves_layers",
    "left_dense",
    "pack_float_weight",
    "pack_int8",
    "pack_sparse_int8",
    "quantizable",
    "refusal",
    "round_linear",
    "sharing_input",
    "whole_number",
]

Ragged = Literal["raise", "pad", "skip"]
UNTRAINED = "a scratch model is trained after the transform, and packed weights cannot be trained"


def whole_number(value: Any) -> Any:
    """A whole number where a text spells one: what the command line gives in quotes."""
    return int(value) if isinstance(value, str) and value.removeprefix("-").isdecimal() else value


WeightBits = Annotated[Literal[2, 3, 4, 8], BeforeValidator(whole_number)]
ActivationBits = Annotated[Literal[8, 16], BeforeValidator(whole_number)]
EmbeddingBits = Annotated[Literal[4, 8, 16], BeforeValidator(whole_number)]
Int8Bits = Annotated[Literal[8], BeforeValidator(whole_number)]


class ImpliedDefaults(Options):
    """Options whose defaults depend on other options; labels leave out what is implied."""

    def non_default(self) -> dict[str, Any]:
        written: dict[str, Any] = {}
        for name, value in self.canonical().items():
            if self._implied(written)[name] != value:
                written[name] = value
        return written

    @classmethod
    def _implied(cls, written: dict[str, Any]) -> dict[str, Any]:
        """All options where only some are written; the plain defaults where those alone are refused."""
        try:
            return cls(**written).canonical()
        except ValidationError:
            return cls.model_construct().model_dump(mode="json", warnings=False)


def leaves_layers(options: Any) -> bool:
    """Whether some layers stay in full precision for a quantizer that follows in the chain."""
    return options.targets is not None or options.ragged == "skip"


def refusal(info: ModelInfo, *, group_size: int, ragged: Ragged, targets: str | None) -> str | None:
    """Why a weight quantizer does not fit a model, as far as its configuration tells."""
    if info.family == "other":
        return f"architecture {info.model_type!r} is not known"
    if info.scratch:
        return UNTRAINED
    if group_size == -1 or ragged != "raise" or targets is not None:
        return None
    for what, size in (
        ("hidden size", info.hidden_size),
        ("attention width", info.num_heads * info.head_dim),  # another one where heads have their own size
        ("FFN size", info.ffn_size),
    ):
        if size % group_size:
            return (
                f"group_size {group_size} does not divide the {what} {size}; choose a divisor, "
                "group_size=-1, or ragged=pad"
            )
    return None


def quantizable(
    model: nn.Module, *, group_size: int, ragged: Ragged, targets: str | None
) -> tuple[list[str], list[str]]:
    """The full names of the linear layers to quantize, and of those that `ragged` leaves out.

    Raises:
        NotApplicable: no full-precision layer is left, or the group size does not divide a layer's
            columns and `ragged` is ``raise``.
        ConfigError: `targets` is no regular expression or matches nothing.
    """
    if not any(True for _ in block_linears(model)):
        raise NotApplicable("the model is quantized already: no nn.Linear is left inside its blocks")
    chosen: list[str] = []
    skipped: list[str] = []
    for name, linear in block_linears(model, targets=targets):
        fits = group_size == -1 or linear.in_features % group_size == 0
        if not fits and ragged == "raise":
            raise NotApplicable(
                f"group_size {group_size} does not divide the {linear.in_features} columns of {name} "
                f"[{linear.out_features}, {linear.in_features}]; choose a divisor, group_size=-1, "
                "or ragged=pad"
            )
        (chosen if fits or ragged == "pad" else skipped).append(name)
    if not chosen:
        raise NotApplicable(f"group_size {group_size} divides no layer, so ragged=skip leaves nothing")
    return chosen, skipped


def round_linear(
    name: str, weight: torch.Tensor, *, bits: int, group_size: int, sym: bool, per_tensor: bool = False
) -> QuantizedWeight:
    """Round a matrix [out, in] to nearest; failures name the layer."""
    try:
        return quantize_weight(
            weight, bits=bits, group_size=group_size, sym=sym, per_tensor=per_tensor, pad=True
        )
    except (NumericalFailure, ConfigError) as error:
        raise type(error)(f"{name}: {error}") from None


def pack_float_weight(linear: nn.Linear, weight: QuantizedWeight) -> QuantizedLinear:
    """The packed replacement of a linear layer whose activations stay in full precision."""
    return QuantizedLinear.from_weight(weight, linear.bias)


def pack_int8(
    name: str,
    linear: nn.Linear,
    *,
    per_tensor: bool,
    a_gran: ActivationScale,
    input_scale: torch.Tensor | None = None,
) -> Int8Linear:
    """The W8A8 replacement of a linear layer; failures name the layer."""
    weight = round_linear(name, linear.weight, bits=8, group_size=-1, sym=True, per_tensor=per_tensor)
    return Int8Linear.from_weight(weight, linear.bias, a_gran=a_gran, input_scale=input_scale)


def left_dense(
    model: nn.Module, names: Iterable[str], dtype: torch.dtype, context: Context
) -> dict[str, str]:
    """Of the layers that are to be stored 2:4 those that cannot be, with the reason; recorded by name.

    Raises:
        NotApplicable: none can.
    """
    left: dict[str, str] = {}
    fits = 0
    for name in names:
        linear = model.get_submodule(name)
        assert isinstance(linear, torch.nn.Linear)
        reason = misfit(linear.out_features, linear.in_features, dtype)
        if reason is None and _most_kept(linear.weight) > 2:
            reason = "its weights are not 2:4"
        if reason is None:
            fits += 1
        else:
            left[name] = reason
    if not fits:
        name, reason = next(iter(left.items()))
        raise NotApplicable(
            f"sparse=true: no layer can be stored 2:4 ({name}: {reason}); put nm-prune (n=2, m=4) before this"
            " method, as in nm-prune+rtn:..."
        )
    note = "; ".join(f"{name} ({reason})" for name, reason in left.items())
    context.record("layers_left_dense", len(left), "1", note or None)
    return left


def _most_kept(weight: torch.Tensor) -> int:
    """The most weights that a group of four along the inputs keeps."""
    return int((weight.detach() != 0).view(weight.shape[0], -1, 4).sum(-1).max())


def pack_sparse_int8(name: str, linear: nn.Linear, *, per_tensor: bool) -> SparseInt8Linear:
    """The W8A8 replacement of a linear layer with 2:4 weights, which stores two of four of them."""
    weight = round_linear(name, linear.weight, bits=8, group_size=-1, sym=True, per_tensor=per_tensor)
    return SparseInt8Linear.from_weight(weight, linear.bias)
