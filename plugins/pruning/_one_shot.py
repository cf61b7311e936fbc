"""What one-shot pruning on calibration data shares: options, and which layers.

A pruned layer keeps its dense form with zeros in it, but for 2:4; masks are bool [out, in], True where a
weight stays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field, model_validator

from harness import NotApplicable, NumericalFailure, Options
from harness.nn.anatomy import anatomy_of, blocks_of, sharing_input
from harness.nn.magnitude import count_of, keep_largest_of_rows
from harness.nn.n_of_m import keep_n_of_m
from harness.nn.n_of_m_layers import store_n_of_m
from harness.nn.surgery import Targets, block_linears

if TYPE_CHECKING:
    from torch import nn

    from harness import Context, ModelInfo

__all__ = ["MaskOptions", "keep_best", "prunable", "refusal", "store_pattern"]


class MaskOptions(Options):
    """How many weights go: a share of them, or all but `n` of every `m`."""

    sparsity: float = Field(0.5, ge=0, lt=1, description="share of zeros; with n and m it is 1 - n/m")
    n: int | None = Field(None, ge=1, description="weights that stay of every m inputs")
    m: int | None = Field(None, ge=2, description="inputs in a group of N:M")
    backend: Literal["auto", "dense"] = Field(
        "auto", description="2:4 stored for sparse tensor cores, or as zeros in dense weights"
    )
    targets: Targets = Field(None, description="regular expression for the layers' names")

    @model_validator(mode="before")
    @classmethod
    def _implied_sparsity(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or values.get("sparsity") is not None:
            return values
        try:
            share = 1 - int(values["n"]) / int(values["m"])
        except (KeyError, TypeError, ValueError, ZeroDivisionError):
            return values
        return {**values, "sparsity": share} if 0 <= share < 1 else values

    @model_validator(mode="after")
    def _one_amount(self) -> MaskOptions:
        if (self.n is None) != (self.m is None):
            raise ValueError("give n and m together: n of every m weights stay")
        if self.n is None or self.m is None:
            return self
        if self.n >= self.m:
            raise ValueError(f"n must be below m: {self.n} of every {self.m} weights cannot be what stays")
        if abs(self.sparsity - (1 - self.n / self.m)) > 1e-9:
            raise ValueError(
                f"give sparsity or n and m, not both: {self.n}:{self.m} leaves {1 - self.n / self.m:g} zeros"
            )
        return self

    def non_default(self) -> dict[str, Any]:
        """Without the sparsity that `n` and `m` imply."""
        written = super().non_default()
        if self.m is not None:
            written.pop("sparsity", None)
        return written


def keep_best(scores: torch.Tensor, sparsity: float, n: int | None, m: int | None) -> torch.Tensor:
    """Keep mask of scores [out, in], not negative: within each row, or N:M where `n` and `m` are given.

    Raises:
        ConfigError: as `keep_n_of_m`.
    """
    if n is not None and m is not None:
        return keep_n_of_m(scores, n, m)
    return keep_largest_of_rows(scores, count_of(sparsity, scores.shape[1]))


def prunable(model: nn.Module, options: MaskOptions) -> dict[str, list[list[str]]]:
    """By block the layers to prune, by their names inside it, those that read the same input together.

    Everything is checked here, before the first weight is changed.

    Raises:
        NotApplicable: no full-precision layer is left, or `m` does not divide a layer's inputs.
        NumericalFailure: a weight is NaN or infinite.
        ConfigError: `targets` is no regular expression or matches nothing.
    """
    if not any(True for _ in block_linears(model)):
        raise NotApplicable("the model is quantized already: no nn.Linear is left inside its blocks")
    linears = dict(block_linears(model, targets=options.targets))
    for name, linear in linears.items():
        if options.m is not None and linear.in_features % options.m:
            raise NotApplicable(
                f"groups of {options.m} do not divide the {linear.in_features} input columns of {name}"
            )
        if not bool(torch.isfinite(linear.weight).all()):
            raise NumericalFailure(f"{name}: weights are NaN or infinite")
    plan: dict[str, list[list[str]]] = {}
    for block, _ in blocks_of(model):
        inside = [name.removeprefix(f"{block}.") for name in linears if name.startswith(f"{block}.")]
        plan[block] = sharing_input(inside, anatomy_of(model).sequential_groups)
    return plan


def store_pattern(
    model: nn.Module, names: Sequence[str], options: MaskOptions, context: Context
) -> list[str]:
    """Put N:M layers that are last in the chain into the form that is measured; nothing without `n`, `m`.

    Returns:
        The layers that are stored compressed.
    """
    if options.n is None or options.m is None or not context.last_in_chain:
        return []
    return store_n_of_m(model, names, options.n, options.m, compress=options.backend == "auto")


def refusal(info: ModelInfo, options: MaskOptions) -> str | None:
    """Why the model cannot be pruned, as far as its configuration tells."""
    if info.family == "other":
        return f"architecture {info.model_type!r} is not known"
    if info.scratch:
        return "a scratch model is trained after the transform, which would fill the zeros again"
    if options.m is None or options.targets is not None:
        return None
    for what, size in (("hidden size", info.hidden_size), ("FFN size", info.ffn_size)):
        if size % options.m:
            return f"groups of {options.m} do not divide the {what} {size}"
    return None
