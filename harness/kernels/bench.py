"""Time the quantized and sparse linear layers beside bfloat16: ``python -m harness.kernels.bench``.

One CUDA graph runs a layer over enough copies of its weight that together they exceed the cache
several times over (a single copy would stay in it and look too fast); the time of a replay divided by
the copies is the time of one layer, launch gaps included and host overhead excluded. Before timing,
each layer is compared with the plain-torch form of the same numbers; sparse ones, whose numbers only the
library can read, with the dense product of the weights that they were made of.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from harness.errors import ConfigError, NotApplicable, NumericalFailure
from harness.kernels.sparse_8_bit import SparseFp8Linear, SparseInt8Linear, prune_2_of_4
from harness.nn.quantized import Int8Linear, QuantizedLinear
from harness.nn.quantizer import quantize_weight
from harness.nn.semi_structured import SemiStructuredLinear

__all__ = ["SCHEMES", "SHAPES", "Timing", "main", "time_linear"]

SHAPES = (
    (1, 4096, 4096),
    (1, 4096, 11008),
    (1, 11008, 4096),
    (2, 4096, 11008),
    (8, 4096, 11008),
    (16, 4096, 4096),
    (16, 4096, 11008),
    (32, 4096, 11008),
    (64, 4096, 11008),
    (512, 4096, 4096),
    (512, 4096, 11008),
    (2048, 4096, 11008),
    (8192, 4096, 11008),
    (8192, 11008, 4096),
)
"""(rows, in, out) of Llama-7B's projections."""

# bfloat16 results; these round the activations as well, to int8 or to a mantissa of three bits.
_TOLERANCES = {"w8a8": 2e-2, "2:4-int8": 2e-2, "2:4-fp8": 5e-2}
_MIN_ROTATION_BYTES = 256 << 20
_REPLAYS = 30


@dataclass(frozen=True, slots=True)
class Timing:
    """One layer: microseconds per call (median, 10th and 90th percentile) and its kernel."""

    median_us: float
    low_us: float
    high_us: float
    kernel: str


def _dense(weight: torch.Tensor) -> nn.Module:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.bfloat16(), requires_grad=False)
    return layer


def _weight_only(bits: int, group_size: int, *, sym: bool) -> Callable[[torch.Tensor], nn.Module]:
    def make(weight: torch.Tensor) -> nn.Module:
        quantized = quantize_weight(weight, bits=bits, group_size=group_size, sym=sym)
        return QuantizedLinear.from_weight(quantized)

    return make


def _int8(weight: torch.Tensor) -> nn.Module:
    return Int8Linear.from_weight(quantize_weight(weight, bits=8, sym=True))


def _sparse(*, tuned: bool) -> Callable[[torch.Tensor], nn.Module]:
    def make(weight: torch.Tensor) -> nn.Module:
        layer = SemiStructuredLinear.from_dense(prune_2_of_4(weight).bfloat16(), tuned=tuned)
        if layer.packed is None:
            raise NotApplicable("cuSPARSELt does not multiply bfloat16 on this device")
        return layer

    return make


SCHEMES: dict[str, Callable[[torch.Tensor], nn.Module]] = {
    "bf16": _dense,
    "w4a16-g128": _weight_only(4, 128, sym=False),
    "w4a16-g64": _weight_only(4, 64, sym=False),
    "w3a16-g128": _weight_only(3, 128, sym=False),
    "w2a16-g64": _weight_only(2, 64, sym=False),
    "w8a16": _weight_only(8, -1, sym=True),
    "w8a8": _int8,
    "2:4-bf16": _sparse(tuned=True),
    "2:4-bf16-default": _sparse(tuned=False),  # the library's first algorithm
    "2:4-int8": SparseInt8Linear.from_dense,
    "2:4-fp8": SparseFp8Linear.from_dense,
}
"""What is timed, each made from a float32 weight [out, in]."""


def time_linear(scheme: str, rows: int, in_features: int, out_features: int, device: torch.device) -> Timing:
    """Time one scheme at one shape on a CUDA device.

    Raises:
        NumericalFailure: the layer's result is not that of the weights it stores.
        NotApplicable: the device has no kernel for it.
    """
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randn(out_features, in_features, device=device, generator=generator) / in_features**0.5
    layer = SCHEMES[scheme](weight)
    dense = prune_2_of_4(weight) if scheme.startswith("2:4") else _stored(layer)
    del weight
    x = torch.randn(rows, in_features, device=device, generator=generator).bfloat16()
    held = sum(t.numel() * t.element_size() for t in [*layer.parameters(), *layer.buffers()])
    copies = [layer, *(copy.deepcopy(layer) for _ in range(-(-_MIN_ROTATION_BYTES // held)))]
    with torch.no_grad():
        _check(scheme, layer, x, dense)
        del dense
        graph = _capture(copies, x)
    samples = _replay(graph, len(copies))
    kernel = "cuBLAS" if isinstance(layer, nn.Linear) else layer.kernel_for(rows, x.dtype)  # type: ignore[operator]
    low, *_, high = statistics.quantiles(samples, n=10)
    return Timing(statistics.median(samples), low, high, kernel)


def _stored(layer: nn.Module) -> torch.Tensor:
    return layer.weight if isinstance(layer, nn.Linear) else layer.dequantize()  # type: ignore[operator]


def _check(scheme: str, layer: nn.Module, x: torch.Tensor, weight: torch.Tensor) -> None:
    expected = functional.linear(x.float(), weight.float())
    error = float((layer(x).float() - expected).norm() / expected.norm())
    if not error <= _TOLERANCES.get(scheme, 1e-2):
        raise NumericalFailure(f"{scheme} at {tuple(x.shape)}: relative error {error:.2e}")


def _capture(layers: Sequence[nn.Module], x: torch.Tensor) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles kernels and fills the library's work space
        for layer in layers[:2]:
            layer(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in layers:
            layer(x)
    return graph


def _replay(graph: torch.cuda.CUDAGraph, calls: int) -> list[float]:
    """Microseconds per call, one number per replay."""
    for _ in range(3):
        graph.replay()
    samples = []
    for _ in range(_REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) * 1000 / calls)
    return samples


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table: one row per shape, microseconds and the speed-up over bfloat16 per scheme."""
    parser = argparse.ArgumentParser(prog="python -m harness.kernels.bench", description=__doc__)
    parser.add_argument("--schemes", default=",".join(SCHEMES), help="comma-separated, of those in the table")
    parser.add_argument("--rows", default="", help="only shapes with these numbers of rows")
    parser.add_argument("--csv", action="store_true", help="print comma-separated values with percentiles")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise SystemExit("the benchmark needs a CUDA device")
    schemes = options.schemes.split(",")
    if unknown := set(schemes) - set(SCHEMES):
        raise ConfigError(f"unknown schemes {sorted(unknown)}; known: {', '.join(SCHEMES)}")
    wanted = {int(rows) for rows in options.rows.split(",") if rows}
    device = torch.device("cuda")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; microseconds (speed-up over bf16)")
    if options.csv:
        print("scheme,rows,in,out,median_us,p10_us,p90_us,speed_up,kernel")
    for shape in SHAPES:
        if wanted and shape[0] not in wanted:
            continue
        dense = time_linear("bf16", *shape, device)
        if not options.csv:
            print(f"{shape!s:20} bf16 {dense.median_us:8.1f}", flush=True)
        for scheme in schemes:
            try:
                timing = dense if scheme == "bf16" else time_linear(scheme, *shape, device)
            except NotApplicable as error:
                print(f"{scheme}: {error}", file=sys.stderr)
                continue
            speed_up = dense.median_us / timing.median_us
            if options.csv:
                numbers = [timing.median_us, timing.low_us, timing.high_us, speed_up]
                cells = [scheme, *map(str, shape), *(f"{number:.2f}" for number in numbers)]
                print(",".join([*cells, timing.kernel]), flush=True)
            elif scheme != "bf16":
                line = f"{timing.median_us:8.1f} ({speed_up:.2f}x)  {timing.kernel}"
                print(f"{'':20} {scheme:16} {line}", flush=True)


if __name__ == "__main__":
    main()
