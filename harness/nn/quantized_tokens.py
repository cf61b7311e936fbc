"""Activations that are quantized already, on their way from what made them to the layers that read them.

A norm that is followed by linear layers can round its output to int8 once, and an attention module its
input, instead of leaving that to each of its projections. What travels between the two is a
`QuantizedTokens`: it lives inside one forward pass only, holds plain tensors, and has just what models ask
of an activation before they give it to a linear layer, so that anything else that reads it fails at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from harness.kernels import int8, reference

__all__ = ["QuantizedTokens", "QuantizingNorm", "quantize_input_once"]


@dataclass(frozen=True, slots=True)
class QuantizedTokens:
    """Activations [..., d] as int8 with one scale per token.

    Args:
        codes: int8 [..., d].
        scale: float32 [..., 1].
        dtype: the type in which layers that read them give their output.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def size(self, dim: int | None = None) -> Any:
        """As of a tensor."""
        return self.codes.size() if dim is None else self.codes.size(dim)

    def numel(self) -> int:
        """As of a tensor."""
        return self.codes.numel()

    def dequantize(self) -> torch.Tensor:
        """The numbers [..., d] that the codes stand for, in `dtype`."""
        return (self.codes.float() * self.scale).to(self.dtype)


class QuantizingNorm(nn.Module):
    """A LayerNorm or RMSNorm that gives its output as int8 with one scale per token.

    Keeps the names and values of the norm's own parameters, so a state dict looks as before.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    simulated = False

    def __init__(self, norm: nn.Module, *, eps: float, kind: reference.NormKind) -> None:
        super().__init__()
        for name in ("weight", "bias"):
            self.register_parameter(name, getattr(norm, name, None))
        self.eps, self.kind = eps, kind

    @classmethod
    def from_norm(cls, norm: nn.Module) -> QuantizingNorm | None:
        """The same norm with a quantized output, or None where it is of no kind that is known.

        Which kind it is, is found by running it: the candidate must give its output for random numbers.
        """
        weight = getattr(norm, "weight", None)
        eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
        if not isinstance(eps, float) or weight is None or weight.ndim != 1:
            return None
        kinds: tuple[reference.NormKind, ...] = ("layer",)
        if not isinstance(norm, nn.LayerNorm):
            kinds = ("rms", "rms-unit-offset") if getattr(norm, "bias", None) is None else ()
        made = (cls(norm, eps=eps, kind=kind) for kind in kinds)
        return next((candidate for candidate in made if candidate._agrees_with(norm)), None)

    @torch.no_grad()
    def _agrees_with(self, norm: nn.Module) -> bool:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(4, self.weight.numel(), generator=generator).to(self.weight)
        expected = norm(x)
        found = reference.normalize(x, self.weight, self.bias, eps=self.eps, kind=self.kind)
        difference = (found - expected).float().abs().max()
        return bool(difference <= 8 * torch.finfo(x.dtype).eps * expected.float().abs().max())

    @property
    def kernel_name(self) -> str:
        """What runs on the device of the parameters."""
        return int8.choose_norm(self.weight.device)

    def forward(self, x: torch.Tensor) -> QuantizedTokens:
        """Codes and scales of the norm of x [..., d]."""
        codes, scale = int8.normalize_quantize(x, self.weight, self.bias, eps=self.eps, kind=self.kind)
        return QuantizedTokens(codes, scale, x.dtype)

    def extra_repr(self) -> str:
        return f"kind={self.kind}, eps={self.eps}"


def quantize_input_once(module: nn.Module) -> None:
    """Quantize the hidden states that `module` is called with before it runs, once for all that reads them.

    For a module all of whose linear layers that read its input take `QuantizedTokens`, and which asks
    nothing else of the input than its size. The caller keeps the original (for its residual).
    """
    module.register_forward_pre_hook(_quantize_hidden, with_kwargs=True)


def _quantize_hidden(
    _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    hidden = args[0] if args else kwargs["hidden_states"]
    if isinstance(hidden, torch.Tensor):
        hidden = QuantizedTokens(*int8.quantize_tokens(hidden), hidden.dtype)
    return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})
