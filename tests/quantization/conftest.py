"""What the tests of the quantizers share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from harness import Method
from harness.nn.surgery import block_linears
from harness.testing.making import make_context


@pytest.fixture
def apply() -> Callable[..., nn.Module]:
    """``apply(METHOD, model, last_in_chain=True, bits=4, ...)``: transform with random calibration tokens."""

    def run(method: Method, model: nn.Module, *, last_in_chain: bool = True, **options: Any) -> nn.Module:
        context = make_context(model, calibration_samples=4, calibration_len=32, has_teacher=False)
        context.last_in_chain = last_in_chain
        return method.transform(model, method.options.parse(options, method=method.name), context)

    return run


@pytest.fixture
def weights() -> Callable[[nn.Module], dict[str, torch.Tensor]]:
    """The weights of all linear layers inside the blocks, by full name, copied."""
    return lambda model: {name: linear.weight.detach().clone() for name, linear in block_linears(model)}


@pytest.fixture
def logits() -> Callable[[nn.Module], torch.Tensor]:
    """The output of a model on the same tokens each time."""
    tokens = torch.randint(256, (2, 24), generator=torch.Generator().manual_seed(1))

    @torch.no_grad()
    def run(model: nn.Module) -> torch.Tensor:
        output = model(input_ids=tokens)
        return output.logits if hasattr(output, "logits") else output.last_hidden_state

    return run
