"""What `harness.kernels.tune_int8` times: operands, our candidates and those of the libraries."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

from harness.kernels import fp8, int8, int8_launches, packed_int8, reference
from harness.kernels.tune_int8 import Candidate, Case, launches, packed_launches
from harness.nn.outlier_int8 import OutlierInt8Linear
from harness.nn.packing import pack_weight
from harness.nn.quantizer import quantize_activation, quantize_weight

__all__ = ["PARTS"]

DEVICE, DTYPE = "cuda", torch.bfloat16

Made = tuple[Case, int]
_FEW_ROWS = 512  # up to here the time is that of reading weights, which no cache may hold
_ROTATION_BYTES = 256 << 20
_OUTLIER_SHARE = 1000  # one column in so many
_EPS = 1e-5


def _operands(
    rows: int, columns: int, out: int
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor], Candidate]:
    """x [rows, in] and weight [out, in] in `DTYPE`, copies of the weight, and the product with them."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    weight = torch.randn(out, columns, device=DEVICE, generator=generator) / columns**0.5
    x = torch.randn(rows, columns, device=DEVICE, generator=generator).to(DTYPE)
    copies = 2 if rows > _FEW_ROWS else -(-_ROTATION_BYTES // weight.numel())
    dense = [weight.to(DTYPE) for _ in range(copies)]
    bf16 = Candidate("cuBLAS", "bf16", lambda i: functional.linear(x, dense[i]), checked=False)
    return x, dense[0], dense, bf16


def _copies(tensor: torch.Tensor, count: int) -> list[torch.Tensor]:
    return [tensor, *(tensor.clone() for _ in range(count - 1))]


def w8a8(rows: int, columns: int, out: int, bits: int) -> Made:
    """The whole layer: tokens rounded, multiplied, scaled."""
    from harness.kernels import triton_int8, triton_int8_gemv

    x, weight, dense, bf16 = _operands(rows, columns, out)
    codes, scales = _int8_weight(weight)
    matrices = _copies(codes, len(dense))
    tokens, token_scales = quantize_activation(x)
    expected = reference.int8_linear(tokens, token_scales, codes, scales, None, x.dtype)

    def default(i: int) -> torch.Tensor:
        return int8.linear(x, matrices[i], scales, None)

    def before(launch: int8_launches.Launch) -> Callable[[int], torch.Tensor]:
        def run(i: int) -> torch.Tensor:
            rounded = triton_int8.quantize_tokens(x)
            return triton_int8.matmul(*rounded, matrices[i], scales, None, x.dtype, launch=launch)

        return run

    def ours(launch: int8_launches.Launch) -> Callable[[int], torch.Tensor]:
        if launch.kind == "gemv":
            return lambda i: triton_int8_gemv.gemv(x, None, matrices[i], scales, None, x.dtype, launch=launch)

        return before(launch)

    candidates = [bf16, Candidate("default", "default", default)]
    candidates += [
        Candidate(str(each), "ours", ours(each), each)
        for each in (*launches(rows, columns), *(launches(2, columns)[:4] if rows == 1 else ()))
    ]
    candidates += [
        Candidate(f"rounded before {each}", "ours", before(each), each)
        for each in launches(rows, columns)[:4]
        if each.kind == "gemv"
    ]
    candidates += _int8_peers(x, weight, matrices, tokens)
    return Case("w8a8", rows, columns, out, expected, candidates), len(dense)


def _int8_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    quantized = quantize_weight(weight.float(), bits=8, sym=True)
    codes = (quantized.codes.to(torch.int16) - 128).to(torch.int8).contiguous()
    return codes, quantized.scale[:, 0].float().contiguous()


def _int8_peers(
    x: torch.Tensor, weight: torch.Tensor, matrices: list[torch.Tensor], tokens: torch.Tensor
) -> list[Candidate]:
    peers = []
    if x.shape[0] > 16:
        peers.append(
            Candidate(
                "_int_mm alone", "peer", lambda i: torch._int_mm(tokens, matrices[i].t()), checked=False
            )
        )
    if importlib.util.find_spec("torchao") is not None:
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        layer.weight = nn.Parameter(weight, requires_grad=False)
        model = nn.Sequential(layer)
        is_made: list[bool] = []

        def dynamic(i: int) -> torch.Tensor:
            if not is_made:
                torchao = importlib.import_module("torchao.quantization")
                torchao.quantize_(model, torchao.Int8DynamicActivationInt8WeightConfig())
                is_made.append(True)
            y: torch.Tensor = model(x)
            return y

        # One copy of the weights, eager: small ones may lie in the cache, which is to its favour.
        peers.append(Candidate("torchao int8 dynamic, eager", "peer", dynamic, tolerance=0.03))
    return peers


def outliers(rows: int, columns: int, out: int, bits: int) -> Made:
    """LLM.int8() with one outlier column in a thousand."""
    from harness.kernels import triton_outlier_int8

    x, weight, dense, bf16 = _operands(rows, columns, out)
    x = x.clamp_(-5, 5)
    x[:, ::_OUTLIER_SHARE] = 40.0
    layer = OutlierInt8Linear.from_float(weight.float())
    matrices = _copies(layer.codes, len(dense))
    expected = layer.multiply(x.float(), fixed=True)

    def ours(launch: int8_launches.Launch | None) -> Callable[[int], torch.Tensor]:
        return lambda i: triton_outlier_int8.linear(
            x, matrices[i], layer.scales, None, layer.threshold, layer.capacity, None, None, False,
            layer.counters, launch=launch,
        )  # fmt: skip

    def plain(_: int) -> torch.Tensor:
        return layer.multiply(x, fixed=True)

    candidates = [
        bf16,
        Candidate("default", "default", lambda _: layer(x), tolerance=1e-2),
        Candidate("kernels, default launch", "ours", ours(None), tolerance=1e-2),
        Candidate("plain torch around w8a8", "peer", plain, tolerance=1e-2),
    ]
    tried = [each for each in launches(rows, columns) if each.kind != "tma" and each.split == 1]
    candidates += [Candidate(str(each), "ours", ours(each), each, 1e-2) for each in tried[:6]]
    return Case("outliers", rows, columns, out, expected, candidates), len(dense)


def float8(rows: int, columns: int, out: int, bits: int) -> Made:
    """Float8 with a scale per token and per output row."""
    from harness.kernels import triton_int8

    x, weight, dense, bf16 = _operands(rows, columns, out)
    codes, scales = fp8.quantize(weight, torch.float8_e4m3fn, per_row=True)
    matrices, scales = _copies(codes, len(dense)), scales.view(-1)
    x_codes, x_scales = fp8.quantize(x, torch.float8_e4m3fn, per_row=True)
    expected = functional.linear(x_codes.float(), codes.float()) * x_scales * scales

    def ours(launch: int8_launches.Launch) -> Callable[[int], torch.Tensor]:
        return lambda i: triton_int8.matmul(
            *fp8.quantize(x, torch.float8_e4m3fn, per_row=True), matrices[i], scales, None, x.dtype,
            launch=launch,
        )  # fmt: skip

    def alone(i: int) -> torch.Tensor:
        return fp8._scaled_mm(x_codes, x_scales, matrices[i], scales, x.dtype)

    candidates = [
        bf16,
        Candidate("default", "default", lambda i: fp8.linear(x, matrices[i], scales, None), tolerance=2e-2),
        Candidate("_scaled_mm alone", "peer", alone, tolerance=2e-2),
    ]
    tried = [each for each in launches(max(rows, 2048), columns) if each.kind == "tma"]
    candidates += [Candidate(str(each), "ours", ours(each), each, 2e-2) for each in tried]
    return Case("fp8", rows, columns, out, expected, candidates), len(dense)


def packed(rows: int, columns: int, out: int, bits: int) -> Made:
    """Packed weights with zero points; tokens rounded, weights unpacked in the product or before it."""
    from harness.kernels import triton_int8, triton_packed_int8

    x, _, dense, bf16 = _operands(rows, columns, out)
    stored = [pack_weight(quantize_weight(each.float(), bits=bits, sym=False)) for each in dense]
    tokens, token_scales = quantize_activation(x)
    expected = reference.packed_int8_linear(tokens, token_scales, stored[0], None, x.dtype)

    def ours(launch: int8_launches.Launch) -> Callable[[int], torch.Tensor]:
        run = triton_packed_int8.gemv if launch.kind == "gemv" else triton_packed_int8.small
        return lambda i: run(*triton_int8.quantize_tokens(x), stored[i], None, x.dtype, launch)

    def before(i: int) -> torch.Tensor:
        matrix, scales = triton_packed_int8.unpack(stored[i]), stored[i].scales.view(-1).float()
        return triton_int8.matmul(*triton_int8.quantize_tokens(x), matrix, scales, None, x.dtype)

    candidates = [
        bf16,
        Candidate("default", "default", lambda i: packed_int8.linear(x, stored[i], None)),
        Candidate("unpacked before the product", "ours", before, checked=bits < 8),
    ]
    candidates += [Candidate(str(each), "ours", ours(each), each) for each in packed_launches(rows)]
    return Case(f"w{bits}a8", rows, columns, out, expected, candidates), len(dense)


def norm(rows: int, columns: int, out: int, bits: int) -> Made:
    """RMSNorm and rounding in one launch, beside two; the shape's outputs play no part."""
    from harness.kernels import triton_rows

    x = torch.randn(rows, columns, device=DEVICE).to(DTYPE)
    weight = torch.randn(columns, device=DEVICE).to(DTYPE)
    definition = reference.normalize(x, weight, None, eps=_EPS, kind="rms")
    expected = quantize_activation(definition)[0]

    def two(_: int) -> torch.Tensor:
        return triton_rows.quantize(functional.rms_norm(x, (columns,), weight, _EPS))[0]

    def one(_: int) -> torch.Tensor:
        return int8.normalize_quantize(x, weight, None, eps=_EPS, kind="rms")[0]

    candidates = [
        Candidate("rms_norm, then rows", "bf16", two, checked=False),
        Candidate("default", "default", one, tolerance=2e-2),
    ]
    return Case("norm", rows, columns, out, expected, candidates), 10


def row_codes(rows: int, columns: int, out: int, bits: int) -> Made:
    """Rows rounded to int8 and float8, beside a copy of them; the shape's outputs play no part."""
    from harness.kernels import triton_rows

    x = torch.randn(rows, columns, device=DEVICE).to(DTYPE)
    expected = quantize_activation(x)[0]
    candidates = [
        Candidate("copy", "bf16", lambda _: x.clone(), checked=False),
        Candidate("int8", "default", lambda _: triton_rows.quantize(x)[0]),
        Candidate("float8", "ours", lambda _: triton_rows.quantize(x, torch.float8_e4m3fn)[0], checked=False),
        Candidate("plain torch", "peer", lambda _: quantize_activation(x)[0]),
    ]
    return Case("rows", rows, columns, out, expected, candidates), 10


PARTS: dict[str, Callable[[int, int, int, int], Made]] = {
    "w8a8": w8a8,
    "outliers": outliers,
    "fp8": float8,
    "w4a8": packed,
    "rows": row_codes,
    "norm": norm,
}
"""Each makes a case and says how many copies of the weights it has, from rows, columns, outputs and bits."""
