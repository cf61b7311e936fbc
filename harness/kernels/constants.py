"""A mark for torch.compile that costs nothing where nothing is compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

__all__ = ["constant_when_compiled"]

Function = TypeVar("Function", bound=Callable[..., object])


def constant_when_compiled(function: Function) -> Function:
    """`torch.compiler.assume_constant_result`, which imports the whole compiler in order to set this mark.

    That is more than a second for each command and each worker, of which most compile nothing.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
