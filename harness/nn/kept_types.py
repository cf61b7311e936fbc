"""Modules whose floating-point buffers keep their type when the model is cast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import nn

__all__ = ["KeptTypes"]


class KeptTypes(nn.Module):
    """``model.to(dtype)`` must not round the scales of a quantizer: codes are chosen for exactly these."""

    _kept: tuple[str, ...] = ()  # buffers whose type is part of the quantization

    def _apply(self, fn: Callable[..., torch.Tensor], recurse: bool = True) -> Self:
        kept = {name: getattr(self, name) for name in self._kept}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in kept.items():
            after = getattr(self, name)
            if before is not None and after.dtype != before.dtype:
                setattr(self, name, before.to(after.device))
        self._moved()
        return self

    def _moved(self) -> None:
        """Called where the module may have come to another device."""
