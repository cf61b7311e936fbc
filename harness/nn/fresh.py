"""The same network with other random weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from harness.errors import NotApplicable
from harness.nn.attention import keep_bands
from harness.nn.surgery import conv1d_to_linear

__all__ = ["reinitialised"]


def reinitialised(model: nn.Module, generator: torch.Generator) -> nn.Module:
    """A model of the same configuration with random weights, of the same type on the same device.

    Raises:
        NotApplicable: the model is not what its configuration describes (another method changed
        it).
    """
    parameter = next(model.parameters())
    made: Any = type(model)
    seed = int(torch.randint(2**62, (1,), generator=generator))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh: nn.Module = made(model.config)
    conv1d_to_linear(fresh)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if {name: tensor.shape for name, tensor in fresh.state_dict().items()} != shapes:
        raise NotApplicable("init=random needs a model that no other method has changed")
    keep_bands(model, fresh)
    return fresh.to(device=parameter.device, dtype=parameter.dtype)
