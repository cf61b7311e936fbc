"""A fixed workload that is timed next to everything else.

It is the same on every variant, so what it takes tells how fast the device was at that moment. Where two
variants cannot be timed in one process, their times are compared in units of it.
"""

from __future__ import annotations

import torch

from harness.measure.clock import clock_for
from harness.measure.graphs import prepare_call

__all__ = ["Control"]

_PRODUCTS = 4


class Control:
    """A few matrix products and copies, both limits of a device; calling it gives its seconds."""

    def __init__(self, device: torch.device) -> None:
        cuda = device.type == "cuda"
        size, elements = (2048, 1 << 25) if cuda else (256, 1 << 20)
        dtype = torch.bfloat16 if cuda else torch.float32
        left = torch.full((size, size), 1 / size, device=device, dtype=dtype)
        right = torch.ones(size, size, device=device, dtype=dtype)
        source = torch.zeros(elements, device=device, dtype=dtype)
        target = torch.empty_like(source)

        def work() -> torch.Tensor:
            product = left
            for _ in range(_PRODUCTS):
                product = product @ right
                target.copy_(source)
            return product

        with torch.inference_mode():
            self._call = prepare_call(work, device)
        self._clock = clock_for(device)
        self.mode = self._call.mode
        self.note = f"{_PRODUCTS} products of {size}x{size} and copies of {source.nbytes:,} B"

    def __call__(self) -> float:
        """Run it once; seconds."""
        self._clock.start()
        marks = [self._clock.mark()]
        self._call.run()
        marks.append(self._clock.mark())
        return self._clock.seconds(marks)[-1]
