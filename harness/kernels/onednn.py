"""Float32 products on x86 processors that MKL has no fast path for.

torch gives float32 matrix products on a CPU to MKL, which chooses its code by the maker of the processor: on
an AMD one with AVX-512 it runs at less than half the speed of oneDNN, which torch ships too and which chooses
by instructions. Within `onednn_products` linear layers go there instead. Both sum in float32; the last
bits differ.

For the harness's own work (scoring, training) alone: what is timed is what torch does by itself.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from harness.cpuinfo import cpu_fact
from harness.kernels import dense

__all__ = ["OneDnnProducts", "onednn_products"]

FEWEST_ROWS = 16
"""Below, torch's own product is as fast."""

_PLAIN = (torch.Tensor, torch.nn.Parameter)


def onednn_products(device: torch.device) -> AbstractContextManager[object]:
    """Within, and in this thread, linear layers on `device` are computed by oneDNN where that is faster."""
    return OneDnnProducts() if device.type == "cpu" and _is_faster() else nullcontext()


class OneDnnProducts(TorchFunctionMode):
    """`functional.linear` and the `addmm` of a Conv1D layer by oneDNN, and their gradients."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is functional.linear and not kwargs and _fits(args[0], args[1], *args[2:]):
            return _linear(*args)
        # torch.addmm(bias, x, weight [in, out])
        if func is torch.addmm and not kwargs and args[0].dim() == 1 and _fits(args[1], args[2].t(), args[0]):
            return _linear(args[1], args[2].t(), args[0])
        return func(*args, **(kwargs or {}))


def _fits(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> bool:
    return (
        type(x) in _PLAIN
        and weight.dim() == 2
        and x.numel() >= FEWEST_ROWS * weight.shape[1] > 0
        and x.shape[-1] == weight.shape[1]
        and not torch.is_autocast_enabled("cpu")
        and all(
            type(each) in _PLAIN
            and each.dtype == torch.float32
            and each.device.type == "cpu"
            and each.layout == torch.strided
            for each in (x, weight, *(() if bias is None else (bias,)))
        )
        # torch adds any bias that can be expanded; oneDNN reads as many neighbours as there are outputs.
        and (bias is None or dense.fits_bias(bias, weight))
    )


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return _Linear.apply(x, weight, bias)  # type: ignore[no-any-return, no-untyped-call]
    return _product(x, weight, bias)


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., in] times the transpose of weight [out, in], plus bias."""
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, grad: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        rows = grad.flatten(0, -2)
        return (
            _product(grad, weight.t()) if for_x else None,
            _product(rows.t(), x.flatten(0, -2).t()) if for_weight else None,
            rows.sum(0) if for_bias else None,
        )


@cache
def _is_faster() -> bool:
    """Whether this is an x86 processor that Intel did not make; decided by no clock, so always alike."""
    if platform.machine().lower() not in ("x86_64", "amd64") or not torch.backends.mkldnn.is_available():
        return False
    return torch.backends.mkl.is_available() and _maker() not in (None, "GenuineIntel")


def _maker() -> str | None:
    return cpu_fact("vendor_id")
