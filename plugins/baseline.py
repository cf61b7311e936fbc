"""The model as it is: what every other method is compared with.

Changes: nothing. Needs: nothing. Knobs: none. Hurts: nothing, and saves nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from harness import Method, Options, hookimpl

if TYPE_CHECKING:
    from torch import nn

    from harness import Context

__all__ = ["METHOD", "BaselineOptions"]


class BaselineOptions(Options):
    """There is nothing to choose."""


def transform(model: nn.Module, options: BaselineOptions, context: Context) -> nn.Module:
    return model


METHOD = Method(name="baseline", family="baseline", options=BaselineOptions, transform=transform)


@hookimpl
def register_methods() -> list[Method]:
    return [METHOD]
