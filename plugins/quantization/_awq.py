"""The two searches of AWQ: a scale per input channel, and a clipping limit per group of weights.

Both minimise the squared error of what a layer computes on calibration tokens, which for a change D of
its weights is ``tr(D H D^T)`` with ``H = mean(x x^T)``: no token has to be kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from harness import ConfigError
from harness.nn.blocks import Block
from harness.nn.hessian import InputHessian, output_error
from harness.nn.quantizer import find_grid, padded_to_groups

from ._weights import round_linear

__all__ = ["ScaleSearch", "SiteInputs", "activity_scale", "clip_weight", "observe_inputs", "search_scale"]

_SMALLEST = 1e-4
_DEEPEST_CLIP = 0.5  # of the largest weight of a group
_CLIP_STEPS = 20


@dataclass
class SiteInputs:
    """What a layer reads: ``mean|x_j|`` [in] and ``mean(x x^T)`` [in, in], float32."""

    activity: torch.Tensor
    hessian: torch.Tensor

    def divided(self, scale: torch.Tensor) -> SiteInputs:
        """The same once every input is divided by `scale` [in]."""
        return SiteInputs(self.activity / scale, self.hessian / torch.outer(scale, scale))


@dataclass(frozen=True)
class ScaleSearch:
    """The best scale [in], its exponent, and the error with it and without any."""

    scale: torch.Tensor
    alpha: float
    error: float
    plain_error: float


def observe_inputs(block: Block, names: tuple[str, ...]) -> dict[str, SiteInputs]:
    """The inputs of the named layers of a block, all in one pass.

    Raises:
        ConfigError: no calibration tokens.
        NumericalFailure: activations are NaN or infinite.
    """
    hessians: dict[str, InputHessian] = {}
    sums: dict[str, torch.Tensor] = {}

    def see(name: str, x: torch.Tensor) -> None:
        x = x.reshape(-1, x.shape[-1]).float()
        if name not in hessians:
            hessians[name], sums[name] = InputHessian(x.shape[1], x.device), torch.zeros_like(x[0])
        hessians[name].add(x)
        sums[name] += x.abs().sum(0)

    block.observe(names, see)
    if not hessians:
        raise ConfigError(f"{block.name}: no calibration tokens reached it")
    found = {}
    for name, hessian in hessians.items():
        matrix = hessian.matrix(f"{block.name}.{name}")
        found[name] = SiteInputs(sums[name] / hessian.tokens, matrix)
    return found


def activity_scale(activity: torch.Tensor, alpha: float) -> torch.Tensor:
    """``s = a^alpha / sqrt(max(a^alpha) * min(a^alpha))``; `activity` [d] counts as at least 1e-4."""
    scale = activity.clamp(min=_SMALLEST) ** alpha
    return scale / (scale.max() * scale.min()).sqrt()


def search_scale(
    weights: Mapping[str, torch.Tensor],
    inputs: SiteInputs,
    *,
    bits: int,
    group_size: int,
    n_grid: int,
    shared: Callable[[torch.Tensor], torch.Tensor] = lambda channels: channels,
    spread: Callable[[torch.Tensor], torch.Tensor] = lambda channels: channels,
) -> ScaleSearch:
    """The exponent among 0, 1/n_grid, ..., 1 with the least error of all layers that read an input.

    Exponent 0 scales nothing, so the result is never worse than plain rounding.

    Args:
        weights: float32 [out, in] by the name of the layer.
        shared: from the inputs' channels [in] to those that have a scale of their own.
        spread: from those back to the inputs' channels.
    """

    def error(scale: torch.Tensor) -> float:
        total = 0.0
        for name, weight in weights.items():
            rounded = round_linear(name, weight * scale, bits=bits, group_size=group_size, sym=False)
            total += output_error(rounded.dequantize() / scale - weight, inputs.hessian)
        return total

    activity = shared(inputs.activity)
    best = ScaleSearch(
        torch.ones_like(activity), 0.0, plain := error(torch.ones_like(inputs.activity)), plain
    )
    for step in range(1, n_grid + 1):
        scale = activity_scale(activity, step / n_grid)
        if (found := error(spread(scale))) < best.error:
            best = ScaleSearch(scale, step / n_grid, found, plain)
    return best


def clip_weight(weight: torch.Tensor, hessian: torch.Tensor, *, bits: int, group_size: int) -> torch.Tensor:
    """The matrix [out, in] with each group clipped to the share of its peak that rounds best.

    Shares are 1 down to 0.5 in 20 steps; a group is judged by its own part of the output.
    """
    out, columns = weight.shape
    padded = padded_to_groups(weight, group_size)
    width = padded.shape[1] if group_size == -1 else group_size
    groups = padded.view(out, -1, width).transpose(0, 1)  # [groups, out, width]
    missing = padded.shape[1] - columns
    hessian = torch.nn.functional.pad(hessian, (0, missing, 0, missing))
    own = torch.stack([hessian[at : at + width, at : at + width] for at in range(0, len(hessian), width)])
    scale_dtype = torch.float32 if bits == 8 and group_size == -1 else None

    def error(candidate: torch.Tensor) -> torch.Tensor:
        grid = find_grid(candidate, bits=bits, sym=False, scale_dtype=scale_dtype)
        difference = grid.round(candidate) - groups
        return ((difference @ own) * difference).sum(-1, keepdim=True)  # [groups, out, 1]

    best, least = groups, error(groups)
    peak = groups.abs().amax(-1, keepdim=True)
    for step in range(1, _CLIP_STEPS + 1):
        limit = peak * (1 - (1 - _DEEPEST_CLIP) * step / _CLIP_STEPS)
        candidate = torch.minimum(torch.maximum(groups, -limit), limit)
        found = error(candidate)
        best = torch.where(found < least, candidate, best)
        least = torch.minimum(found, least)
    return best.transpose(0, 1).reshape(out, -1)[:, :columns]
