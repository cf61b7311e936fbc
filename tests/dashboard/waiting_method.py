"""A method that waits for a file, so that a test can look at a sweep while it runs."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
from pydantic import Field

from harness import Method, Options, hookimpl
from harness.nn.surgery import block_linears

PATIENCE_S = 120.0


class _Waiting(Options):
    number: int = Field(1, ge=1)


@torch.no_grad()
def _wait(model, options, context):
    deadline = time.monotonic() + PATIENCE_S
    while not Path(os.environ["WAITING_FOR"], str(options.number)).exists():
        if time.monotonic() > deadline:
            raise TimeoutError("the test has forgotten this sweep")
        time.sleep(0.05)
    if options.number == 2:
        raise ValueError(os.environ["WAITING_SAYS"])
    for _, linear in block_linears(model):
        linear.weight.mul_(0.5)
    return model


@hookimpl
def register_methods():
    return [Method("waiting", _Waiting, _wait)]
