"""What the methods share that round every activation tensor of a model to a static grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.nn import functional

from harness import NotApplicable
from harness.nn.activation_grid import ActivationGrid, ActivationQuantizer
from harness.nn.activation_sites import Site, at_sites, inputs_of_linears, run
from harness.nn.anatomy import anatomy_of
from harness.nn.static_int8 import StaticInt8Linear
from harness.nn.surgery import replace_module

from ._weights import pack_float_weight, quantizable, round_linear

if TYPE_CHECKING:
    from torch import nn

    from harness import Context

__all__ = [
    "WeightGranularity",
    "calibration_windows",
    "output_distance",
    "quantize_everywhere",
    "reference_outputs",
]

WeightGranularity = Literal["per-tensor", "per-channel"]


def calibration_windows(context: Context) -> list[torch.Tensor]:
    """Calibration batches; those of an encoder begin and end with the tokens that its inputs do.

    The largest activations of BERT-like models are those of [SEP], which plain text does not have.
    """
    batches = context.calibration_batches()
    first = getattr(context.tokenizer, "cls_token_id", None)
    last = getattr(context.tokenizer, "sep_token_id", None)
    if context.info.kind != "encoder" or first is None or last is None:
        return batches
    framed = [batch.clone() for batch in batches]
    for batch in framed:
        batch[:, 0], batch[:, -1] = first, last
    return framed


@torch.no_grad()
def quantize_everywhere(
    model: nn.Module,
    sites: Sequence[Site],
    grids: Mapping[Site, ActivationGrid],
    *,
    bits: int,
    w_gran: WeightGranularity,
) -> None:
    """Put the grids at their sites and int8 weights into the linear layers of the blocks, in place.

    A linear layer rounds its input to the grid of the site itself and multiplies int8 with int8. Tensors
    that something else reads or makes (sums, norms, attention) are rounded where they are and stay floats.

    Args:
        grids: sites without a grid stay as they are.
        bits: 8, or 16: the weights stay as they are.

    Raises:
        NotApplicable: a linear layer of the blocks is quantized already or of an unknown place.
    """
    inputs = inputs_of_linears(model, sites)
    names, _ = quantizable(model, group_size=-1, ragged="raise", targets=None)
    odd = set(names) ^ inputs.keys()
    if odd:
        raise NotApplicable(
            f"{min(odd)} is quantized already, or not one of the linear layers that are known"
        )
    if bits == 8:
        for name in names:
            linear: Any = model.get_submodule(name)
            replace_module(model, name, _packed(name, linear, grids.get(inputs[name]), w_gran))
            del linear
    only_linears = {"attn_in", "context", "ffn_hidden"}
    if not anatomy_of(model).residual_reads_norm:
        only_linears.add("ffn_in")
    rounded = {
        site: ActivationQuantizer(grid)
        for site, grid in grids.items()
        if bits != 8 or site.kind not in only_linears
    }
    at_sites(model, rounded)


def _packed(name: str, linear: Any, grid: ActivationGrid | None, w_gran: WeightGranularity) -> nn.Module:
    weight = round_linear(
        name, linear.weight, bits=8, group_size=-1, sym=True, per_tensor=w_gran == "per-tensor"
    )
    if grid is None:
        return pack_float_weight(linear, weight)
    return StaticInt8Linear.from_weight(weight, grid, linear.bias)


# --- how far outputs are from the original's ------------------------------------------------------


@torch.no_grad()
def reference_outputs(model: nn.Module, batches: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """What `output_distance` compares with: log-probabilities [batch, tokens, vocabulary] of a model with
    logits, else the mean hidden state [batch, d]; one for each batch of token ids."""
    return [_compared(run(model, batch)) for batch in batches]


@torch.no_grad()
def output_distance(
    model: nn.Module, batches: Sequence[torch.Tensor], reference: Sequence[torch.Tensor]
) -> float:
    """Mean KL divergence from the reference in nats, or mean 1 - cosine of the mean hidden states.

    Either way 0.01 is a small loss: a perplexity of 1 % more, or an angle of 8 degrees.
    """
    total, count = 0.0, 0
    for batch, expected in zip(batches, reference, strict=True):
        found = _compared(run(model, batch))
        if expected.ndim == 2:
            distances = 1 - functional.cosine_similarity(found, expected, dim=-1)
        else:
            distances = (expected.exp() * (expected - found)).sum(-1)
        total += float(distances.double().sum())
        count += distances.numel()
    return total / count


def _compared(output: Any) -> torch.Tensor:
    logits = getattr(output, "logits", None)
    if logits is None:
        hidden: torch.Tensor = output.last_hidden_state
        return hidden.float().mean(1)
    scores: torch.Tensor = logits.float().log_softmax(-1)
    return scores if scores.ndim == 3 else scores[:, None]
