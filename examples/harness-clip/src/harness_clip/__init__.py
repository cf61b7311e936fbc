"""clip-weights: limits every weight to a few standard deviations of its row.

Paper: none; an example. Changes: the linear layers inside the blocks, in place. Needs: nothing.
Knobs: `sigmas`. Hurts: rows whose few large weights matter, which is why LLM.int8() keeps them.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import nn

from harness import Context, Method, Options, hookimpl
from harness.nn.surgery import block_linears

__all__ = ["METHOD", "clip_rows", "register_methods"]


class ClipOptions(Options):
    sigmas: float = Field(3.0, gt=0, description="the limit, in standard deviations of a row")


def clip_rows(weight: torch.Tensor, sigmas: float) -> torch.Tensor:
    """The weight [out, in] with each row limited to `sigmas` standard deviations around zero."""
    limit = sigmas * weight.std(dim=1, keepdim=True)
    return weight.clamp(-limit, limit)


@torch.no_grad()
def transform(model: nn.Module, options: ClipOptions, context: Context) -> nn.Module:
    clipped = total = 0
    for _name, linear in block_linears(model):
        new = clip_rows(linear.weight, options.sigmas)
        clipped += int((new != linear.weight).sum())
        total += new.numel()
        linear.weight.copy_(new)
    context.record("clipped_share", clipped / total, "fraction")
    return model


METHOD = Method(name="clip-weights", options=ClipOptions, transform=transform, paper="An example; no paper.")


@hookimpl
def register_methods() -> list[Method]:
    return [METHOD]
