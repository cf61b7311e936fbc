"""What the N:M methods share: options, which layers, how their zeros are stored, what is recorded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from harness import ConfigError, NotApplicable, NumericalFailure, Options
from harness.kernels import semi_structured as kernel
from harness.nn.n_of_m_layers import store_n_of_m
from harness.nn.pruned import bitmap_bits, note_before_others
from harness.nn.semi_structured import misfit
from harness.nn.surgery import Targets, block_linears

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from harness import Context, ModelInfo

__all__ = [
    "PatternOptions",
    "check_finite",
    "choose_layers",
    "kept_counts",
    "needs_cuda",
    "record_left_dense",
    "refusal",
    "store_zeros",
    "stores_compressed",
]


class PatternOptions(Options):
    n: int = Field(2, ge=1, description="weights kept of every m along the inputs")
    m: int = Field(4, ge=2, le=1024, description="weights of a group")
    backend: Literal["auto", "cusparselt", "dense"] = Field("auto", description="how 2:4 is stored and run")
    algorithm: Literal["tuned", "default"] = Field("tuned", description="of cuSPARSELt, on CUDA")
    targets: Targets = Field(None, description="regular expression for the layers' names")
    ragged: Literal["raise", "skip"] = Field("raise", description="where m does not divide a width")

    @model_validator(mode="after")
    def _is_a_pattern(self) -> PatternOptions:
        if self.n >= self.m:
            raise ValueError(f"n: of every m={self.m} weights fewer than m are kept, not {self.n}")
        if self.backend == "cusparselt" and (self.n, self.m) != (2, 4):
            raise ValueError(f"backend: cusparselt runs 2:4 alone, not {self.n}:{self.m}")
        return self


def stores_compressed(options: PatternOptions, context: Context) -> bool:
    """Whether the zeros leave memory: 2:4, where nothing follows that needs plain weights."""
    return (options.n, options.m) == (2, 4) and options.backend != "dense" and context.last_in_chain


def needs_cuda(options: PatternOptions) -> tuple[str, ...]:
    """As of `Method.needs`, where the options ask for the library's kernel."""
    return ("cuda",) if options.backend == "cusparselt" else ()


def refusal(info: ModelInfo, options: PatternOptions) -> str | None:
    """Why a pattern does not fit a model, as far as its configuration tells."""
    if info.family == "other":
        return f"architecture {info.model_type!r} is not known"
    if info.scratch:
        return "a scratch model is trained after the transform, which would fill the zeros again"
    if options.targets is not None or options.ragged == "skip":
        return None
    for what, size in (("hidden size", info.hidden_size), ("FFN size", info.ffn_size)):
        if size % options.m:
            return f"{_width_problem(size, options.m)} (the {what}); choose another m, or ragged=skip"
    return None


def choose_layers(
    model: nn.Module, options: PatternOptions, context: Context
) -> tuple[list[str], dict[str, str]]:
    """The full names of the linear layers to prune, and of those that stay dense, with the reason.

    Raises:
        NotApplicable: no `nn.Linear` is left inside the blocks, `m` does not divide a width (where
            `ragged` is ``raise``), no layer can be pruned, or the kernel that was asked for is absent.
        ConfigError: `targets` is no regular expression or matches nothing.
    """
    compressed = stores_compressed(options, context)
    if compressed and options.backend == "cusparselt":
        _require_kernel(context)
    if not any(True for _ in block_linears(model)):
        raise NotApplicable("no nn.Linear is left inside the blocks: prune before quantizing")
    names: list[str] = []
    left: dict[str, str] = {}
    for name, linear in block_linears(model, targets=options.targets):
        if linear.in_features % options.m:
            problem = f"{name}: {_width_problem(linear.in_features, options.m)}"
            if options.ragged == "raise":
                raise NotApplicable(f"{problem}; choose another m, or ragged=skip")
            left[name] = problem.partition(": ")[2]
        elif compressed and (reason := misfit(linear.out_features, linear.in_features)):
            left[name] = f"{reason} for sparse tensor cores"
        else:
            names.append(name)
    if not names:
        raise NotApplicable(f"no layer can be pruned: {_listed(left)}")
    return names, left


def _width_problem(width: int, m: int) -> str:
    if width < m:
        return f"a width of {width} is narrower than a group of m={m}"
    return f"m={m} does not divide a width of {width}"


def _require_kernel(context: Context) -> None:
    if kernel.choose(context.device, context.dtype) != kernel.KERNEL:
        dtype = str(context.dtype).removeprefix("torch.")
        raise NotApplicable(f"cuSPARSELt does not multiply {dtype} on {context.device.type} here")


def _listed(left: Mapping[str, str]) -> str:
    by_reason: dict[str, list[str]] = {}
    for name, reason in left.items():
        by_reason.setdefault(reason, []).append(name)
    return "; ".join(f"{', '.join(names)} ({reason})" for reason, names in by_reason.items())


def record_left_dense(context: Context, left: Mapping[str, str]) -> None:
    """How many targeted layers stayed as they were; the note says which and why."""
    context.record("layers_left_dense", len(left), "1", _listed(left) or None)


def check_finite(name: str, weight: torch.Tensor) -> None:
    """Raises `NumericalFailure`, naming the layer, where a weight is NaN or infinite."""
    if not bool(torch.isfinite(weight).all()):
        raise NumericalFailure(f"{name}: weights are NaN or infinite")


def kept_counts(weight: torch.Tensor, m: int) -> torch.Tensor:
    """How many weights of each run of `m` are not zero: int64 [out, in / m]."""
    return (weight.detach() != 0).view(weight.shape[0], -1, m).sum(-1)


@torch.no_grad()
def store_zeros(model: nn.Module, names: Iterable[str], options: PatternOptions, context: Context) -> None:
    """Put the layers that hold the pattern into the form that is measured, and record what they hold.

    Raises:
        NumericalFailure: a group of a layer keeps more than `n` weights.
    """
    compressed = stores_compressed(options, context)
    zeros = places = groups = stored_bits = 0
    for name in names:
        linear: Any = model.get_submodule(name)
        weight = linear.weight
        counts = kept_counts(weight, options.m)
        if int(counts.max()) > options.n:
            raise NumericalFailure(
                f"{name}: {int((counts > options.n).sum())} groups of {options.m} keep more than {options.n}"
            )
        kept = int(counts.sum())
        zeros += weight.numel() - kept
        places, groups = places + weight.numel(), groups + counts.numel()
        stored_bits += bitmap_bits(weight.numel(), kept, 8 * weight.element_size())
        if context.last_in_chain:  # what follows looks for plain layers
            store_n_of_m(
                model,
                [name],
                options.n,
                options.m,
                compress=compressed,
                tuned=options.algorithm == "tuned",
            )
        del linear, weight
    if not places:
        raise ConfigError("no layer was pruned")
    pattern = f"{options.n}:{options.m}"
    before = note_before_others(context)
    counted = before or "counted in the final weights"
    context.record("nm_groups", groups, "1", f"each keeps at most {pattern}; {counted}")
    context.record("pruned_share_of_targets", zeros / places, "1", before)
    if not compressed:
        note = (
            f"theoretical size of the {pattern} layers; dense weights are what runs, so no speed is claimed"
        )
        note = f"{note}; {before}" if before else note
        context.record("bitmap_bytes", stored_bits // 8, "B", note)
