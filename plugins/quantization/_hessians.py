"""Hessians of the untouched model, computed once and kept on disk for every later configuration."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from harness.nn.anatomy import anatomy_of
from harness.nn.hessian import observe_hessians, packed_lower, unpacked_lower

if TYPE_CHECKING:
    from torch import nn

    from harness import Context
    from harness.nn.blocks import Block

__all__ = ["OriginalHessians"]


class OriginalHessians:
    """``mean(x x^T)`` of the inputs of layers in the model as it is now, from the cache where they are known.

    Those that are not are computed at once, in one pass over the blocks. An entry is the lower triangle
    in float32 of one input, which all layers that read it share: 11 GB for all of a 7B model.

    Args:
        layers: by block the names, inside it, of the layers to be asked for.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, Sequence[str]], context: Context) -> None:
        self._model, self._context = model, context
        # What is read ahead has a stream of its own, or it would wait for what is being computed.
        self._stream = torch.cuda.Stream(context.device) if context.device.type == "cuda" else None
        self._batches = context.calibration_batches()
        tokens = hashlib.sha256()
        for batch in self._batches:
            tokens.update(batch.numpy().tobytes())
        self._tokens = tokens.hexdigest()
        groups = anatomy_of(model).sequential_groups
        self._input_of = {name: group[0] for group in groups for name in group}
        missing = {
            block: [name for name in names if not context.is_cached(self._key(block, name))]
            for block, names in layers.items()
        }
        missing = {block: names for block, names in missing.items() if names}
        for block in context.blocks(model, self._batches) if missing else ():
            names = missing.pop(block.name, [])
            # The last one wanted need not be carried on.
            for name, packed in self._observe(block, names, advance=bool(missing)).items():
                context.cache(self._key(block.name, name), lambda packed=packed: packed)
            if not missing:
                break

    def of_each(self, layers: Sequence[tuple[str, str]]) -> Iterator[torch.Tensor]:
        """The Hessians [in, in] of layers, by block and name inside it, float32; meanwhile the next one is
        on its way from disk to the device.

        An entry that cannot be read is computed again. So go from the last layer to the first where they
        are changed meanwhile: those that run before the one that is asked for must be as they were.
        """
        with ThreadPoolExecutor(1, "hessians") as reader:
            coming = reader.submit(self._read, *layers[0]) if layers else None
            for place, (block, layer) in enumerate(layers, 1):
                assert coming is not None
                packed = coming.result()
                if packed is not None and packed.is_cuda:  # its memory is the other stream's
                    packed.record_stream(torch.cuda.current_stream(packed.device))
                if place < len(layers):
                    coming = reader.submit(self._read, *layers[place])
                yield unpacked_lower(self._again(block, layer) if packed is None else packed)

    def _read(self, block: str, layer: str) -> torch.Tensor | None:
        """What the cache has for a layer, on the device; None where it cannot be read."""

        def absent() -> NoReturn:
            raise _NotCached

        try:
            packed: torch.Tensor = self._context.cache(self._key(block, layer), absent)
        except _NotCached:
            return None
        if self._stream is None:
            return packed
        with torch.cuda.stream(self._stream):
            packed = packed.to(self._context.device)
        self._stream.synchronize()
        return packed

    def _again(self, block: str, layer: str) -> torch.Tensor:
        def compute() -> torch.Tensor:
            blocks = self._context.blocks(self._model, self._batches)  # open until this is done
            found = next(each for each in blocks if each.name == block)
            return self._observe(found, [layer])[layer]

        return self._context.cache(self._key(block, layer), compute).to(self._context.device)

    def _key(self, block: str, layer: str) -> dict[str, Any]:
        read = self._input_of.get(layer, layer)
        return {"hessian": "original", "tokens": self._tokens, "input": f"{block}.{read}"}

    @staticmethod
    def _observe(block: Block, names: list[str], *, advance: bool = False) -> dict[str, torch.Tensor]:
        found = observe_hessians(block, names, advance=advance)
        return {name: packed_lower(hessian).cpu() for name, hessian in found.items()}


class _NotCached(Exception):
    """There is no entry that can be read."""
