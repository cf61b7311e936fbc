"""Every stored layer is one graph for the compiler: between pieces nothing is fused or rewritten."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from harness.errors import NotApplicable
from harness.kernels.bench_layers import SCHEMES, make_input
from harness.nn.fp8 import Fp8Linear
from harness.nn.quantized import Int8Linear, QuantizedLinear
from harness.nn.quantizer import quantize_weight

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
        ],
    ),
]
OURS = [name for name, scheme in SCHEMES.items() if scheme.peer_of is None and name != "bf16"]
# Beside the choice by rows on CUDA there is one path.
SIZES = {"cpu": (64, 256, (3,)), "cuda": (4096, 4096, (1, 8, 40, 512, 4096))}


def made(name: str, weight: torch.Tensor) -> nn.Module:
    if name in OTHERS:
        return OTHERS[name](weight)
    try:
        return SCHEMES[name].make(weight)
    except NotApplicable as error:
        pytest.skip(str(error))


OTHERS = {
    "fp8 per tensor": lambda w: Fp8Linear.from_float(w, per_tensor=True, a_gran="per-tensor-dynamic"),
    "fp8 e5m2": lambda w: Fp8Linear.from_float(w, fmt="e5m2"),
    "w8a8 per tensor": lambda w: Int8Linear.from_weight(
        quantize_weight(w, bits=8, sym=True, per_tensor=True, group_size=-1), a_gran="per-tensor-dynamic"
    ),
    "w4a16 per channel": lambda w: QuantizedLinear.from_weight(quantize_weight(w, bits=4, sym=False)),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", [*OURS, *OTHERS])
def test_a_stored_layer_is_one_graph(name, device):
    out, columns, all_rows = SIZES[device]
    generator = torch.Generator(device).manual_seed(0)
    layer = made(name, torch.randn(out, columns, device=device, generator=generator) / columns**0.5)
    scheme = SCHEMES.get(name, SCHEMES["w8a8"])
    for rows in all_rows:
        x = make_input(scheme, rows, columns, torch.device(device), generator)
        torch._dynamo.reset()
        with torch.inference_mode():
            # `fullgraph` raises where the compiler cannot follow.
            y = torch.compile(layer, backend="eager", fullgraph=True, dynamic=False)(x)
            expected = layer(x)
        assert float((y.float() - expected.float()).norm() / expected.float().norm()) < 2e-2
