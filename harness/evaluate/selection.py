"""Computing only what is asked for, at the end of a model: its head, and the FFN of its last block.

What a place holds after the last attention is read by nobody but that place, so the FFN of the last
block and the head need only see the places whose logits are wanted. Hooks on the model's own modules
give them those; they are there for one call, and in its thread alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from harness.errors import NotApplicable
from harness.nn.anatomy import anatomy_of, blocks_of

__all__ = ["Ffn", "head_of", "last_ffn", "only_selected"]


@dataclass(frozen=True)
class Ffn:
    """The modules that read an FFN's input, and the one that gives its output (maybe the same)."""

    entries: tuple[nn.Module, ...]
    exit: nn.Module


def head_of(model: nn.Module) -> nn.Module | None:
    """The module that makes the logits, or None."""
    find = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    return head if isinstance(head, nn.Module) else None


def last_ffn(model: nn.Module) -> Ffn | None:
    """The FFN of the last block, or None where the model is of no known family or has none there."""
    try:
        anatomy, blocks = anatomy_of(model), blocks_of(model)
    except (NotApplicable, AttributeError):  # a model of one's own may have any `config`
        return None
    if not blocks:
        return None
    (_, block), parent = blocks[-1], anatomy.ffn_out.rpartition(".")[0]
    try:
        if parent:
            module = block.get_submodule(parent)
            return Ffn((module,), module)
        entries = tuple(block.get_submodule(name) for name in anatomy.ffn_in)
        return Ffn(entries, block.get_submodule(anatomy.ffn_out))
    except AttributeError:
        return None


@contextmanager
def only_selected(
    head: nn.Module, ffn: Ffn | None, shape: torch.Size, selected: torch.Tensor
) -> Iterator[None]:
    """Within: of inputs of this shape the head, and the FFN, see the selected places only.

    [rows, width, hidden] becomes one row [1, n, hidden], and [rows · width, hidden], as OPT makes it,
    [n, hidden]. The head's logits stay so; what the FFN gives is put back into its places, with zeros
    elsewhere.

    Args:
        shape: (rows, width) of the batch.
        selected: int64 [n], places in the flattened batch.
    """
    thread, places = threading.get_ident(), shape.numel()

    def here(value: object) -> bool:
        return threading.get_ident() == thread and isinstance(value, torch.Tensor)

    def select(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not arguments or not here(arguments[0]):
            return None
        hidden = arguments[0]
        if hidden.dim() == 2 and len(hidden) == places:
            return (hidden.index_select(0, selected), *arguments[1:])
        if hidden.dim() == 3 and hidden.shape[:2] == shape:
            return (hidden.flatten(0, 1).index_select(0, selected).unsqueeze(0), *arguments[1:])
        return None

    def put_back(_: nn.Module, __: tuple[Any, ...], output: Any) -> torch.Tensor | None:
        if not here(output):
            return None
        is_flat = output.dim() == 2 and len(output) == len(selected)
        if not is_flat and output.shape[:2] != (1, len(selected)):
            return None
        full: torch.Tensor = output.new_zeros(places, output.shape[-1])
        full.index_copy_(0, selected, output.flatten(0, -2))
        return full if is_flat else full.unflatten(0, shape)

    with ExitStack() as hooks:
        hooked: list[Callable[[], object]] = [head.register_forward_pre_hook(select).remove]
        if ffn is not None:
            hooked += [module.register_forward_pre_hook(select).remove for module in ffn.entries]
            hooked.append(ffn.exit.register_forward_hook(put_back).remove)
        for remove in hooked:
            hooks.callback(remove)
        yield
