"""What the wrapped libraries share: whether they are here, and which layers they get."""

from __future__ import annotations

import importlib.util
import os
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch

from harness import MissingExtra, NotApplicable
from harness.nn.surgery import block_linears

if TYPE_CHECKING:
    from torch import nn

    from harness import ModelInfo

__all__ = ["absence", "contained", "linear_names", "unfit"]


def absence(package: str, extra: str) -> str | None:
    """Why a library cannot be measured here, with the pip line; None where it is installed."""
    return None if importlib.util.find_spec(package) else str(MissingExtra(package, extra))


@contextmanager
def contained() -> Iterator[None]:
    """Give the process back as it was: a library may seed generators and set variables and filters."""
    environment, drawn, drawn_by_numpy = dict(os.environ), random.getstate(), np.random.get_state()
    with torch.random.fork_rng(), warnings.catch_warnings():
        try:
            yield
        finally:
            random.setstate(drawn)
            np.random.set_state(drawn_by_numpy)
            os.environ.clear()
            os.environ.update(environment)


def unfit(info: ModelInfo) -> str | None:
    """Why none of them fits a model, as far as its configuration tells."""
    if info.family == "other":
        return f"architecture {info.model_type!r} is not known"
    if info.scratch:
        return "a scratch model is trained after the transform, and packed weights cannot be trained"
    return None


def linear_names(model: nn.Module) -> list[str]:
    """The full names of the linear layers inside the blocks: the same ones that the harness quantizes.

    Raises:
        NotApplicable: none is left in full precision.
    """
    names = [name for name, _ in block_linears(model)]
    if not names:
        raise NotApplicable("the model is quantized already: no nn.Linear is left inside its blocks")
    return names
