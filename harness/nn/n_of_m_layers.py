"""The forms in which a linear layer with N:M zeros is measured: stored 2:4, or dense and saying so."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from harness.nn.semi_structured import SemiStructuredLinear, misfit
from harness.nn.surgery import replace_module

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["MaskedLinear", "store_n_of_m"]


class MaskedLinear(nn.Linear):
    """An `nn.Linear` whose weights hold a pattern that no kernel here makes use of."""

    simulated = True
    pattern = ""

    @classmethod
    def of(cls, linear: nn.Linear, n: int, m: int) -> MaskedLinear:
        """Takes over the parameters of `linear`."""
        masked = cls(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        masked.weight, masked.bias, masked.pattern = linear.weight, linear.bias, f"{n}:{m}"
        return masked

    @property
    def kernel_name(self) -> str:
        """What the forward pass runs."""
        return f"dense matmul over {self.pattern} zeros"

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, zeros={self.pattern}"


def store_n_of_m(
    model: nn.Module, names: Iterable[str], n: int, m: int, *, compress: bool = True, tuned: bool = True
) -> list[str]:
    """Replace linear layers that hold the pattern by the form that is measured.

    2:4 is stored as its values and their places where `compress` is set and sparse tensor cores can run
    the shape; everything else becomes a `MaskedLinear`.

    Args:
        names: full names of `nn.Linear` layers.
        tuned: as of `SemiStructuredLinear`.

    Returns:
        The names of the layers that are stored compressed.

    Raises:
        ConfigError: a layer that would be compressed is not 2:4.
    """
    compressed = []
    for name in names:
        linear: Any = model.get_submodule(name)
        if compress and (n, m) == (2, 4) and misfit(linear.out_features, linear.in_features) is None:
            layer: nn.Module = SemiStructuredLinear.from_dense(linear.weight, linear.bias, tuned=tuned)
            compressed.append(name)
        else:
            layer = MaskedLinear.of(linear, n, m)
        replace_module(model, name, layer)
        del linear
    return compressed
