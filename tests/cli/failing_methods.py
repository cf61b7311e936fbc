"""Methods that go wrong in every way, for tests."""

from __future__ import annotations

import os
import signal
import time

import torch
from pydantic import Field
from torch import nn

from harness import Method, NotApplicable, Options, hookimpl
from harness.nn.surgery import block_linears


class _Empty(Options):
    pass


class _Scale(Options):
    factor: float = Field(0.5, gt=0)


@torch.no_grad()
def scale(model, options, context):
    for _, linear in block_linears(model):
        linear.weight.mul_(options.factor)
    return model


def raises(model, options, context):
    raise ValueError("the method is wrong")


def refuses(model, options, context):
    raise NotApplicable("only on Sundays")


def eats(model, options, context):
    return torch.empty(1 << 50, dtype=torch.uint8)


def hangs(model, options, context):
    time.sleep(600)


def dies(model, options, context):
    print("last words", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def exits(model, options, context):
    os._exit(7)


def nothing(model, options, context):
    return model


def wrong_type(model, options, context):
    return "a model"


class _HangsWhenRun(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.linear = linear
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        # The effect check runs the model once; a timed run does it many times.
        if self.calls > 3:
            time.sleep(600)
        return self.linear(x) * 1.01


def hangs_later(model, options, context):
    from harness.nn.surgery import replace_module

    name, linear = next(iter(block_linears(model)))
    replace_module(model, name, _HangsWhenRun(linear))
    return model


@hookimpl
def register_methods():
    plain = {
        "raises": raises,
        "refuses": refuses,
        "eats": eats,
        "hangs": hangs,
        "dies": dies,
        "exits": exits,
        "nothing": nothing,
        "wrong-type": wrong_type,
        "hangs-later": hangs_later,
    }
    methods = [Method(name=name, options=_Empty, transform=function) for name, function in plain.items()]
    return [*methods, Method(name="scale", options=_Scale, transform=scale)]
