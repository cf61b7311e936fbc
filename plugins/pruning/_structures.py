"""How much heads and FFN channels matter, which of them go, and what those that stay make up for.

Scores are float32 on the device of the model: [kv_heads] for the heads of a block (a key-value head with
the query heads that read it) and [ffn] for its channels; larger is more important.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from harness import ConfigError, NumericalFailure
from harness.kernels.onednn import onednn_products
from harness.nn.anatomy import anatomy_of, blocks_of
from harness.nn.folding import linears_of
from harness.nn.hessian import factorise
from harness.nn.magnitude import count_of
from harness.nn.narrowing import BlockShape, block_shapes
from harness.training import causal_loss

__all__ = [
    "Scores",
    "activation_scores",
    "choose_kept",
    "lost_block",
    "magnitude_scores",
    "random_scores",
    "refit",
    "removable",
    "taylor_scores",
]


@dataclass(frozen=True)
class Scores:
    """The importance of the parts of one block: heads [kv_heads] and channels [ffn]."""

    heads: torch.Tensor
    channels: torch.Tensor


# --- scores -----------------------------------------------------------------------------------------


def taylor_scores(model: nn.Module, batches: Iterable[torch.Tensor]) -> list[Scores]:
    """First-order change of the loss if a part were gone, by block.

    A head has a gate of 1 on its output; its score is ``E |dL / dgate|`` over sequences, L the mean
    next-token loss of a sequence (Michel et al. 2019, section 4.1). A channel's is ``E |a dL/da|`` over
    tokens of its activation `a`. The graph starts at the first activation that is scored: no gradient of
    a parameter is computed.

    Args:
        batches: token ids int64 [batch, seq_len]; run one sequence at a time.

    Raises:
        NumericalFailure: the loss is NaN or infinite. ConfigError: no tokens.
    """
    shapes = block_shapes(model)
    sums = _empty_sums(model, shapes)
    device = next(model.parameters()).device
    sequences = tokens_seen = 0

    def see(index: int, part: str, x: torch.Tensor, gradient: torch.Tensor) -> None:
        product = (x.detach() * gradient).reshape(-1, x.shape[-1]).float()
        if part == "heads":
            sums[index].heads.add_(_by_kv_head(product.sum(0), shapes[index]).abs())
        else:
            sums[index].channels.add_(product.abs().sum(0))

    def hook(index: int, part: str) -> Callable[..., Any]:
        def start_or_join(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            x = args[0] if args[0].requires_grad else args[0].detach().requires_grad_()
            x.register_hook(lambda gradient: see(index, part, x, gradient))
            return (x, *args[1:])

        return start_or_join

    with _at_inputs(model, hook), _frozen(model), torch.enable_grad(), onednn_products(device):
        for tokens in (row for batch in batches for row in batch[:, None]):
            loss = causal_loss(model, tokens.to(device))
            if not bool(loss.isfinite()):
                raise NumericalFailure(f"the loss on calibration tokens is {float(loss.detach())}")
            loss.backward()
            sequences += 1
            tokens_seen += tokens.numel()
    _require_tokens(tokens_seen)
    return [Scores(each.heads / sequences, each.channels / tokens_seen) for each in sums]


@torch.no_grad()
def activation_scores(model: nn.Module, batches: Iterable[torch.Tensor]) -> list[Scores]:
    """``||W[:, c]|| E|x_c|`` of the channels c that the output and the down projection read, by block.

    A head's score is the sum over its channels. Without labels.

    Raises:
        NumericalFailure: activations are NaN or infinite. ConfigError: no tokens.
    """
    shapes, anatomy = block_shapes(model), anatomy_of(model)
    device = next(model.parameters()).device
    sums: dict[tuple[int, str], torch.Tensor] = {}
    tokens_seen = 0

    def hook(index: int, part: str) -> Callable[..., None]:
        def see(_module: nn.Module, args: tuple[Any, ...]) -> None:
            total = args[0].reshape(-1, args[0].shape[-1]).float().abs().sum(0)
            sums[index, part] = sums[index, part] + total if (index, part) in sums else total

        return see

    with _at_inputs(model, hook), onednn_products(device):
        for batch in batches:
            model(input_ids=batch.to(device))
            tokens_seen += batch.numel()
    _require_tokens(tokens_seen)
    found = []
    for index, (_, block) in enumerate(blocks_of(model)):
        heads = _column_norms(block, anatomy.out) * sums[index, "heads"] / tokens_seen
        channels = _column_norms(block, anatomy.ffn_out) * sums[index, "channels"] / tokens_seen
        found.append(Scores(_by_kv_head(heads, shapes[index]), channels))
    if not all(
        bool(torch.isfinite(each.heads).all() & torch.isfinite(each.channels).all()) for each in found
    ):
        raise NumericalFailure("calibration activations are NaN or infinite")
    return found


@torch.no_grad()
def magnitude_scores(model: nn.Module) -> list[Scores]:
    """Norm of the weights that make a part times norm of those that read it, by block; without data."""
    found = []
    anatomy = anatomy_of(model)
    for (_, block), shape in zip(blocks_of(model), block_shapes(model), strict=True):
        narrow = shape.kv_heads * shape.head_dim
        values = _weight(block, anatomy.qkv[-1])[-narrow:]  # the last rows where they are fused
        made = values.square().sum(1).view(shape.kv_heads, -1).sum(1)
        read = _by_kv_head(_column_norms(block, anatomy.out).square(), shape)
        up = _weight(block, anatomy.ffn_in[-1]).norm(dim=1)
        found.append(Scores((made * read).sqrt(), up * _column_norms(block, anatomy.ffn_out)))
    return found


def random_scores(model: nn.Module, generator: torch.Generator) -> list[Scores]:
    """Uniform scores, by block: the control."""
    device = next(model.parameters()).device
    return [
        Scores(*(torch.rand(size, generator=generator).to(device) for size in (shape.kv_heads, shape.ffn)))
        for shape in block_shapes(model)
    ]


@contextmanager
def _at_inputs(model: nn.Module, hook: Callable[[int, str], Callable[..., Any]]) -> Iterator[None]:
    """Hooks before the output projection ("heads") and the down projection ("channels") of every block."""
    anatomy = anatomy_of(model)
    was_training = model.training
    handles = [
        block.get_submodule(name).register_forward_pre_hook(hook(index, part))
        for index, (_, block) in enumerate(blocks_of(model))
        for part, name in (("heads", anatomy.out), ("channels", anatomy.ffn_out))
    ]
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def _empty_sums(model: nn.Module, shapes: Sequence[BlockShape]) -> list[Scores]:
    device = next(model.parameters()).device
    return [
        Scores(torch.zeros(shape.kv_heads, device=device), torch.zeros(shape.ffn, device=device))
        for shape in shapes
    ]


def _by_kv_head(channels: torch.Tensor, shape: BlockShape) -> torch.Tensor:
    """[heads * head_dim] of the output projection's input, summed to [kv_heads]."""
    return channels.view(shape.kv_heads, -1).sum(1)


def _column_norms(block: nn.Module, name: str) -> torch.Tensor:
    norms: torch.Tensor = _weight(block, name).norm(dim=0)
    return norms


def _weight(block: nn.Module, name: str) -> torch.Tensor:
    (linear,) = linears_of(block, [name], "block")
    return linear.weight.detach().float()


def _require_tokens(count: int) -> None:
    if not count:
        raise ConfigError("no calibration tokens to score heads and channels with")


# --- choice -----------------------------------------------------------------------------------------


def removable(width: int, ratio: float, multiple_of: int = 1) -> int:
    """How many of `width` parts go: at most the ratio, so that a multiple of `multiple_of` is left.

    >>> removable(11008, 0.25, 64), removable(8, 0.3)
    (2752, 2)
    """
    asked = count_of(ratio, width)
    first = width % multiple_of or multiple_of
    return 0 if asked < first else first + (asked - first) // multiple_of * multiple_of


def lost_block(widths: Sequence[int], ratio: float, *, name: str, multiple_of: int = 1) -> str | None:
    """Why blocks of these widths cannot lose a share of all their parts and keep `multiple_of` each."""
    most = sum(max(0, width - multiple_of) for width in widths)
    if count_of(ratio, sum(widths)) - most < multiple_of:
        return None
    return f"{name}={ratio:g} of all blocks would leave one with nothing: each must keep {multiple_of}"


def choose_kept(
    scores: Sequence[torch.Tensor], ratio: float, *, name: str, multiple_of: int = 1, everywhere: bool = False
) -> list[torch.Tensor]:
    """The parts of each block that stay, int64, rising; of equal scores the first ones go.

    Args:
        scores: of each block [width].
        name: of the option, for messages.
        multiple_of: what the number of parts that stay is a multiple of.
        everywhere: parts of all blocks compete, each block's scores divided by their 2-norm. They go in
            lots of `multiple_of` (the lowest of their block together), and each block keeps a lot.

    Raises:
        NumericalFailure: scores are NaN or infinite.
        ConfigError: with `everywhere`, a block would lose all its parts.
    """
    if not all(bool(torch.isfinite(each).all()) for each in scores):
        raise NumericalFailure(f"the scores for {name} are NaN or infinite")
    if everywhere:
        removed = _removed_everywhere(scores, ratio, name, multiple_of)
    else:
        removed = [removable(len(each), ratio, multiple_of) for each in scores]
    return [
        each.sort(stable=True).indices[count:].sort().values
        for each, count in zip(scores, removed, strict=True)
    ]


def _removed_everywhere(
    scores: Sequence[torch.Tensor], ratio: float, name: str, multiple_of: int
) -> list[int]:
    asked = count_of(ratio, sum(len(each) for each in scores))
    lots = []  # (mean score, block, how many parts of the block are gone with it, its size)
    for block, each in enumerate(scores):
        ordered = (each / each.norm().clamp(min=1e-30)).sort(stable=True).values.tolist()
        start, end = 0, len(ordered) % multiple_of or multiple_of
        while end < len(ordered):  # the last lot stays
            lots.append((math.fsum(ordered[start:end]) / (end - start), block, end, end - start))
            start, end = end, end + multiple_of
    if reason := lost_block([len(each) for each in scores], ratio, name=name, multiple_of=multiple_of):
        raise ConfigError(reason)
    removed = [0] * len(scores)
    for _, block, end, size in sorted(lots):
        if size > asked:
            break
        removed[block], asked = end, asked - size
    return removed


# --- compensation -----------------------------------------------------------------------------------


@torch.no_grad()
def refit(
    weight: torch.Tensor, hessian: torch.Tensor, kept: torch.Tensor, *, damp: float = 0.1
) -> torch.Tensor:
    """The columns that stay, [out, kept], changed so that the layer's outputs change least.

    Minimises ``E ||W x - W' x_kept||^2`` plus ``damp * mean(diag H) ||W' - W_kept||^2``: the pull is towards
    the columns as they are, so the error is never above that of merely leaving the others out.

    Args:
        weight: [out, in], float32 or float64. hessian: ``mean(x x^T)`` [in, in] in the same type.

    Raises:
        NumericalFailure: the Hessian is not finite or cannot be factorised.
    """
    stays = torch.zeros(weight.shape[1], dtype=torch.bool, device=weight.device)
    stays[kept] = True
    root = factorise(hessian[kept][:, kept], damp=damp).root
    lost = weight[:, ~stays] @ hessian[~stays][:, kept]
    return weight[:, kept] + lost @ root.T @ root
