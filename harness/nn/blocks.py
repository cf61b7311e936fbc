"""Block-by-block iteration with captured inputs.

Methods that calibrate (GPTQ, SmoothQuant, Wanda, layer-by-layer distillation ...) need the inputs of
one block at a time, computed by the already changed blocks before it, in the memory of one block.
`iterate_blocks` runs the embedding part once per calibration batch, stops at the first block, and
then carries the hidden states from block to block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from harness.errors import NotApplicable
from harness.kernels.onednn import onednn_products
from harness.nn.anatomy import blocks_of

__all__ = ["Block", "BlockInput", "iterate_blocks", "run_block"]


_MASKED_APART = {"full_attention", "sliding_attention", "chunked_attention", "linear_attention"}
"""Kinds of layers for which transformers itself makes different masks."""


@dataclass(slots=True)
class BlockInput:
    """What one calibration batch feeds a block: hidden states [batch, tokens, d] and the rest."""

    hidden: torch.Tensor
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Block:
    """A block under calibration. Change `module` in place (replace its children) between steps.

    `outputs` are what the block gave before any change, one per calibration batch, where they are kept.
    """

    index: int
    name: str  # full name in the model
    module: nn.Module
    inputs: list[BlockInput]
    is_advanced: bool = False  # `inputs` are the block's outputs by now
    outputs: list[torch.Tensor] | None = None

    @torch.no_grad()
    def run(self) -> list[torch.Tensor]:
        """The block's outputs [batch, tokens, d], one per calibration batch, as it is now."""
        return [run_block(self.module, item) for item in self.inputs]

    @torch.no_grad()
    def advance(self) -> None:
        """Put the block's outputs, as it is now, in the place of its inputs.

        `iterate_blocks` does it after the last change; a method that wants the next block to see this
        one unchanged does it before the first.
        """
        for item in self.inputs:
            item.hidden = run_block(self.module, item)
        self.is_advanced = True

    @torch.no_grad()
    def observe(
        self, names: Sequence[str], see: Callable[[str, torch.Tensor], None], *, advance: bool = False
    ) -> None:
        """Run all batches and show ``see(name, x)`` the input x [batch, tokens, in] of each layer.

        The first batch runs to the end of the block. Where it called each layer once, the others stop
        at the last of them: what comes after is not computed.

        Args:
            names: relative to the block.
            advance: `advance` in the same pass.
        """
        if not names and not advance:
            return
        calls: list[str] = []
        wanted: set[str] = set()  # what is still to come before the pass may stop

        def hook_of(name: str) -> Callable[..., None]:
            def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
                see(name, args[0].detach())
                calls.append(name)
                if name in wanted:
                    wanted.remove(name)
                    if not wanted:
                        raise _SeenAll

            return hook

        handles = [self.module.get_submodule(n).register_forward_pre_hook(hook_of(n)) for n in names]
        try:
            for item in self.inputs:
                if not advance and sorted(calls) == sorted(names):
                    wanted.update(names)
                calls.clear()
                with suppress(_SeenAll):
                    hidden = run_block(self.module, item)
                    if advance:
                        item.hidden = hidden
        finally:
            for handle in handles:
                handle.remove()
        self.is_advanced |= advance


def iterate_blocks(
    model: nn.Module,
    batches: Sequence[torch.Tensor],
    device: torch.device | None = None,
    *,
    from_originals: bool = False,
) -> Iterator[Block]:
    """Yield the blocks in order with the inputs that the blocks before them, as changed, produce.

    Args:
        model: a decoder or encoder of a known family.
        batches: token ids [batch, tokens], int64; each is one step.
        device: where the blocks run; by default where the model is.
        from_originals: the inputs are what the blocks before produced as they were; `Block.outputs` is kept.

    Raises:
        NotApplicable: an unknown architecture, or one whose blocks differ in their attention masks.
    """
    _require_equal_masks(model)
    blocks = blocks_of(model)
    device = device or next(model.parameters()).device
    # no_grad is entered inside the helpers, never across a yield: there it would leak to the caller.
    with _evaluating(model):
        inputs = [_first_inputs(model, blocks[0][1], batch.to(device)) for batch in batches]
        for index, (name, module) in enumerate(blocks):
            block = Block(index, name, module, inputs)
            if from_originals:
                block.outputs = block.run()
            yield block
            if index + 1 < len(blocks) and not block.is_advanced:
                # The module may have been replaced as a whole: look it up again.
                block.module = model.get_submodule(name)
                if block.outputs is None:
                    block.advance()
                else:
                    for item, hidden in zip(inputs, block.outputs, strict=True):
                        item.hidden = hidden


def _require_equal_masks(model: nn.Module) -> None:
    # What the first block gets beside the hidden states is passed on to all others.
    kinds = {*(getattr(getattr(model, "config", None), "layer_types", None) or ())} & _MASKED_APART
    if len(kinds) > 1:
        raise NotApplicable(
            f"blocks with different attention ({', '.join(sorted(kinds))}) cannot be run one by one"
        )


def run_block(module: nn.Module, item: BlockInput) -> torch.Tensor:
    """What a block gives for one batch, [batch, tokens, d]; gradients as the caller has them."""
    with onednn_products(item.hidden.device):
        output = module(item.hidden, *item.args, **item.kwargs)
    hidden = output[0] if isinstance(output, tuple) else output
    assert isinstance(hidden, torch.Tensor)
    return hidden


class _Captured(Exception):
    """Ends the forward pass once the first block's inputs are known."""


class _SeenAll(Exception):
    """Ends a pass over a block once every observed layer has been called."""


@torch.no_grad()
def _first_inputs(model: nn.Module, first: nn.Module, tokens: torch.Tensor) -> BlockInput:
    captured: list[BlockInput] = []

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kwargs = dict(kwargs)
        hidden, rest = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
        # A cache would grow with every repeated run of the block.
        for name in ("past_key_values", "past_key_value"):
            if name in kwargs:
                kwargs[name] = None
        if "use_cache" in kwargs:
            kwargs["use_cache"] = False
        rest = tuple(None if _is_cache(value) else value for value in rest)
        captured.append(BlockInput(hidden.detach(), rest, kwargs))
        raise _Captured

    handle = first.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        model(input_ids=tokens, use_cache=False) if _takes_use_cache(model) else model(input_ids=tokens)
    except _Captured:
        pass
    finally:
        handle.remove()
    return captured[0]


def _is_cache(value: Any) -> bool:
    from transformers.cache_utils import Cache

    return isinstance(value, Cache)


def _takes_use_cache(model: nn.Module) -> bool:
    return hasattr(getattr(model, "config", None), "use_cache")


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
