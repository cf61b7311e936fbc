"""Ranges of activations, found by calibration: one static scale for everything a layer will read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch

from harness.errors import ConfigError, NumericalFailure
from harness.nn.blocks import Block

__all__ = ["ClipMethod", "best_clip", "observe_clips", "observe_peaks"]

ClipMethod = Literal["absmax", "percentile", "mse"]

_BINS = 16384
_CLIP_RATIOS = 100
_LEVELS = 127


def observe_peaks(block: Block, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """The largest |x_j| of each input channel of the named layers: float32 [in] by name."""
    peaks: dict[str, torch.Tensor] = {}

    def see(name: str, x: torch.Tensor) -> None:
        peak = x.reshape(-1, x.shape[-1]).abs().amax(0).float()
        peaks[name] = torch.maximum(peaks[name], peak) if name in peaks else peak

    block.observe(names, see)
    for name in names:
        if name not in peaks:
            raise ConfigError(f"{block.name}.{name}: no calibration tokens reached the layer")
        if not bool(torch.isfinite(peaks[name]).all()):
            raise NumericalFailure(f"{block.name}.{name}: calibration activations are NaN or infinite")
    return peaks


def observe_clips(
    block: Block, names: Sequence[str], method: ClipMethod, percentile: float = 99.9
) -> dict[str, torch.Tensor]:
    """The static int8 scale, float32 [1], of the input of each named layer."""
    peaks = {name: peak.amax() for name, peak in observe_peaks(block, names).items()}
    if method == "absmax":
        return {name: _scale(peak) for name, peak in peaks.items()}
    counts: dict[str, torch.Tensor] = {}

    def see(name: str, x: torch.Tensor) -> None:
        width = (peaks[name] / _BINS).clamp(min=1e-38)
        bins = (x.abs().float() / width).long().clamp(max=_BINS - 1)
        found = torch.bincount(bins.flatten(), minlength=_BINS)
        counts[name] = counts[name] + found if name in counts else found

    block.observe(names, see)
    return {name: _scale(best_clip(counts[name], peaks[name], method, percentile)) for name in names}


def best_clip(
    counts: torch.Tensor, peak: torch.Tensor, method: ClipMethod, percentile: float = 99.9
) -> torch.Tensor:
    """Where to clip |x|, from the histogram of |x| over [0, peak].

    ``percentile`` clips all but so many percent; ``mse`` takes the best of 100 fractions of the peak
    by the squared error of symmetric int8, rounding and clipping together.
    """
    edges = torch.linspace(0, 1, counts.numel() + 1, device=counts.device) * peak
    counts = counts.double()
    if method == "percentile":
        reached = counts.cumsum(0) / counts.sum().clamp(min=1) >= percentile / 100 - 1e-12
        return edges[1:][int(reached.to(torch.uint8).argmax())]
    if method == "absmax":
        return peak
    centres = (edges[:-1] + edges[1:]).double() / 2

    def error(clip: torch.Tensor) -> torch.Tensor:
        step = (clip.double() / _LEVELS).clamp(min=1e-300)
        rounded = (centres / step).round().clamp(max=_LEVELS) * step
        return (counts * (centres - rounded) ** 2).sum()

    return _argmin([peak * ratio / _CLIP_RATIOS for ratio in range(1, _CLIP_RATIOS + 1)], error)


def _argmin(candidates: list[torch.Tensor], error: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    errors = torch.stack([error(candidate) for candidate in candidates])
    return candidates[int(errors.argmin())]


def _scale(clip: torch.Tensor) -> torch.Tensor:
    scale = clip.float().view(1) / _LEVELS
    return torch.where(scale == 0, torch.ones_like(scale), scale)
