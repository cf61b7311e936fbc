"""What `harness.kernels.bench` times: one linear layer for each scheme, ours and those of the libraries.

A peer is a layer of PyTorch's own kernels or of torchao, measured against one of ours. Some do less than
ours: `Scheme.lacks` says what, and `arguments` does it for them before the clock starts.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn import functional

from harness.errors import ConfigError, HarnessError, MissingExtra, NotApplicable, NumericalFailure
from harness.kernels import fp8
from harness.nn.codebook import CodebookLinear
from harness.nn.fp8 import Fp8Linear
from harness.nn.n_of_m import keep_n_of_m
from harness.nn.outlier_int8 import OutlierInt8Linear
from harness.nn.quantized import Int8Linear, QuantizedLinear
from harness.nn.quantizer import quantize_activation, quantize_weight
from harness.nn.semi_structured import SemiStructuredLinear
from harness.nn.sparse_8_bit import SparseFp8Linear, SparseInt8Linear

__all__ = ["SCHEMES", "Scheme", "arguments", "check", "held_bytes", "make_input", "one_line", "parse_schemes"]

COMPILED = "-compiled"
"""How the name of a scheme ends that is another one under `torch.compile`."""
_MOST_CHARACTERS = 120  # of a reason
_GROUP = 128  # input columns, of the 4-bit peers
_OUTLIER_STEP, _OUTLIER, _REGULAR = 1000, 40.0, 5.0

_Make = Callable[[torch.Tensor], nn.Module]


def _stored(layer: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """The matrix that the layer itself says it holds."""
    if isinstance(layer, CodebookLinear):
        return layer.codebook_weight.dequantize()
    dense: torch.Tensor = layer.weight if isinstance(layer, nn.Linear) else layer.dequantize()  # type: ignore[operator]
    return dense


def _pruned(layer: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    return prune_2_of_4(weight)


def _on_int4_grid(layer: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """What the 4-bit peers hold, in an order that only their kernel reads."""
    codes, scales, zeros = int4_grid(weight)
    grouped = codes.float().unflatten(1, (-1, _GROUP)) - 8
    values: torch.Tensor = grouped * scales.float()[..., None] + zeros.float()[..., None]
    return values.flatten(1)


@dataclass(frozen=True, slots=True)
class Scheme:
    """One kind of layer.

    Args:
        make: the layer of a float32 weight [out, in]; NotApplicable where the device, a size or an absent
            package does not allow it.
        peer_of: the scheme of ours that a peer is measured against; None for ours.
        tolerance: most relative error of its products.
        reference: from layer and weight, the matrix [out, in] that the products are compared with.
        has_outliers: the input has outlier columns.
        lacks: what a peer leaves out of what ours does.
    """

    make: _Make
    peer_of: str | None = None
    tolerance: float = 1e-2
    reference: Callable[[nn.Module, torch.Tensor], torch.Tensor] = _stored
    has_outliers: bool = False
    lacks: str = ""


def _dense(weight: torch.Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.bfloat16(), requires_grad=False)
    return layer


def _weight_only(bits: int, group_size: int, *, sym: bool) -> _Make:
    def make(weight: torch.Tensor) -> nn.Module:
        quantized = quantize_weight(weight, bits=bits, group_size=group_size, sym=sym)
        return QuantizedLinear.from_weight(quantized)

    return make


def _integers(bits: int) -> _Make:
    return lambda weight: Int8Linear.from_weight(quantize_weight(weight, bits=bits, sym=True))


def _nf4(weight: torch.Tensor) -> nn.Module:
    # NF4 is a plugin's: imported where it is made, so that the rest needs no plugins.
    from harness_plugins.quantization.nf4 import nf4_quantize

    return CodebookLinear.from_weight(nf4_quantize(weight, group_size=64))


def prune_2_of_4(weight: torch.Tensor) -> torch.Tensor:
    """A matrix [out, in] with the two smallest magnitudes of every four along the inputs set to zero."""
    return weight.detach().where(keep_n_of_m(weight.abs(), 2, 4), 0.0)


def _sparse(store: Callable[[torch.Tensor], SemiStructuredLinear]) -> _Make:
    def make(weight: torch.Tensor) -> nn.Module:
        layer = store(prune_2_of_4(weight))
        if layer.packed is None:
            raise NotApplicable(f"cuSPARSELt does not multiply {layer.dtype} on this device")
        return layer

    return make


def _sparse_16_bit(*, tuned: bool) -> _Make:
    return _sparse(lambda weight: SemiStructuredLinear.from_dense(weight.bfloat16(), tuned=tuned))


def _sparse_int8(weight: torch.Tensor) -> SparseInt8Linear:
    return SparseInt8Linear.from_weight(quantize_weight(weight, bits=8, sym=True))


class _Peer(nn.Module):
    """A layer of a library: its sizes and the name of its kernel."""

    def __init__(self, weight: torch.Tensor, kernel: str) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.kernel = kernel

    def kernel_for(self, rows: int, dtype: torch.dtype) -> str:
        return self.kernel


def int4_grid(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Round a weight [out, in] to ``value = (code - 8) * scale + zero``, as torchao does for tinygemm.

    The arithmetic is that of bfloat16, step by step: only so are the codes torchao's.

    Returns:
        Codes uint8 [out, in]; scales and zeros bfloat16 [out, in / 128].

    Raises:
        NotApplicable: 128 does not divide the input columns.
    """
    if weight.shape[1] % _GROUP:
        raise NotApplicable(f"groups of {_GROUP} do not divide {weight.shape[1]} input columns")
    grouped = weight.bfloat16().unflatten(1, (-1, _GROUP))
    least = grouped.amin(-1)
    scales = ((grouped.amax(-1) - least) / 15.0).clamp(min=torch.finfo(torch.bfloat16).smallest_normal)
    zeros = least + scales * 8.0
    codes = ((grouped - (zeros - scales * 8.0)[..., None]) / scales[..., None]).round().clamp(0, 15)
    return codes.to(torch.uint8).flatten(1), scales, zeros


class TinygemmLinear(_Peer):
    """PyTorch's 4-bit product, on the grid of `int4_grid`.

    Attributes:
        packed: the codes in the order of the kernel: on the CPU in that of its counterpart there.
        scales_and_zeros: bfloat16 [in / 128, out, 2].
    """

    packed: torch.Tensor
    scales_and_zeros: torch.Tensor

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__(weight, "tinygemm")
        codes, scales, zeros = int4_grid(weight)
        self.register_buffer("scales_and_zeros", torch.stack((scales.t(), zeros.t()), -1).contiguous())
        if weight.is_cuda:
            # Two codes a byte, the first in the high bits; eight tiles of 16 columns lie together.
            pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).contiguous()
            packed = torch.ops.aten._convert_weight_to_int4pack(pairs, 8)
        else:
            packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 8)
        self.register_buffer("packed", packed)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y bfloat16 [rows, out] for x bfloat16 [rows, in]."""
        aten = torch.ops.aten
        product = aten._weight_int4pack_mm if x.is_cuda else aten._weight_int4pack_mm_for_cpu
        y: torch.Tensor = product(x, self.packed, _GROUP, self.scales_and_zeros)
        return y


class Int8Product(_Peer):
    """`torch._int_mm` alone: tokens come rounded, and the int32 sums are not scaled."""

    codes: torch.Tensor
    scales: torch.Tensor

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__(weight, "_int_mm")
        quantized = quantize_weight(weight, bits=8, sym=True)
        self.register_buffer("codes", (quantized.codes.to(torch.int16) - 128).to(torch.int8).contiguous())
        self.register_buffer("scales", quantized.scale[:, 0].float())

    def arguments(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (quantize_activation(x)[0],)

    def result(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return y.float() * quantize_activation(x)[1] * self.scales

    def dequantize(self) -> torch.Tensor:
        return self.codes.float() * self.scales[:, None]

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        """Sums int32 [rows, out] for codes int8 [rows, in]."""
        return torch._int_mm(codes, self.codes.t())


class Float8Product(_Peer):
    """`torch._scaled_mm` alone: tokens come rounded, with a scale for each."""

    codes: torch.Tensor
    scales: torch.Tensor

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__(weight, "_scaled_mm")
        codes, scales = fp8.quantize(weight, torch.float8_e4m3fn, per_row=True)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales.view(1, -1))

    def arguments(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return fp8.quantize(x, torch.float8_e4m3fn, per_row=True)

    def dequantize(self) -> torch.Tensor:
        return self.codes.float() * self.scales.view(-1, 1)

    def forward(self, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """y bfloat16 [rows, out] for codes E4M3 [rows, in] and scale float32 [rows, 1]."""
        weight, out = self.codes.t(), torch.bfloat16
        return torch._scaled_mm(
            codes, weight, scale_a=scale, scale_b=self.scales, out_dtype=out, use_fast_accum=True
        )


def _product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return functional.linear(x, weight)


class TorchaoLinear(_Peer):
    """A linear layer whose weight torchao made, run eagerly or (`compiled`) through `torch.compile`."""

    def __init__(self, name: str, weight: torch.Tensor, *, compiled: bool) -> None:
        super().__init__(weight, f"torchao {name}{' compiled' if compiled else ''}")
        self.model = nn.Sequential(_dense(weight))
        # As the plugin that wraps torchao makes it; imported here, so that the rest needs no plugins.
        from harness_plugins.external.torchao import TorchaoOptions, configuration

        config, _ = configuration(TorchaoOptions(scheme=name))
        importlib.import_module("torchao.quantization").quantize_(self.model, config)
        if type(self.model[0].weight) is nn.Parameter:  # torchao only logs what it does not take
            raise NotApplicable(f"torchao leaves a weight {tuple(weight.shape)} as it is")
        # The weight is an argument, so one compiled function serves all copies of the layer.
        self._compiled: Callable[..., torch.Tensor] | None = None
        if compiled:
            torch.compiler.reset()  # else what other shapes compiled would count against the limit
            # The whole graph or an error: beyond the limit of recompiling it would run eagerly, unsaid.
            self._compiled = torch.compile(_product, dynamic=False, fullgraph=True)

    def dequantize(self) -> torch.Tensor:
        dense: torch.Tensor = self.model[0].weight.dequantize()  # type: ignore[operator]
        return dense

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y bfloat16 [rows, out] for x bfloat16 [rows, in]."""
        if self._compiled is not None:
            return self._compiled(x, self.model[0].weight)
        y: torch.Tensor = self.model(x)
        return y


def _torchao(name: str, *, compiled: bool = False) -> _Make:
    def make(weight: torch.Tensor) -> nn.Module:
        if importlib.util.find_spec("torchao") is None:
            raise NotApplicable(str(MissingExtra("torchao", "peers")))
        if name in ("int4", "float8") and not weight.is_cuda:
            raise NotApplicable(f"torchao's {name} needs a CUDA device")
        if name == "int4":
            int4_grid(weight[:1])  # refuses what torchao would leave as it is
        return TorchaoLinear(name, weight, compiled=compiled)

    return make


_OURS = {
    "bf16": Scheme(_dense),
    "w4a16-g128": Scheme(_weight_only(4, 128, sym=False)),
    "w4a16-g64": Scheme(_weight_only(4, 64, sym=False)),
    "w3a16-g128": Scheme(_weight_only(3, 128, sym=False)),
    "w2a16-g64": Scheme(_weight_only(2, 64, sym=False)),
    "nf4-g64": Scheme(_nf4),
    "w8a16": Scheme(_weight_only(8, -1, sym=True)),
    # Beside bfloat16 results these round the activations, to int8 or to a mantissa of three bits.
    "w8a8": Scheme(_integers(8), tolerance=2e-2),
    "w4a8": Scheme(_integers(4), tolerance=2e-2),
    "llm-int8": Scheme(OutlierInt8Linear.from_float, tolerance=2e-2, has_outliers=True),
    "fp8": Scheme(Fp8Linear.from_float, tolerance=5e-2),
    # With the algorithm that is found to be the fastest, and with the library's first.
    "2:4-bf16": Scheme(_sparse_16_bit(tuned=True), reference=_pruned),
    "2:4-bf16-default": Scheme(_sparse_16_bit(tuned=False), reference=_pruned),
    "2:4-int8": Scheme(_sparse(_sparse_int8), tolerance=2e-2, reference=_pruned),
    "2:4-fp8": Scheme(_sparse(SparseFp8Linear.from_float), tolerance=5e-2, reference=_pruned),
}
_PEERS = {
    "tinygemm": Scheme(TinygemmLinear, "w4a16-g128", reference=_on_int4_grid),
    "int_mm": Scheme(Int8Product, "w8a8", tolerance=2e-2, lacks="rounding and scales"),
    "scaled_mm": Scheme(Float8Product, "fp8", tolerance=5e-2, lacks="rounding"),
}
_TORCHAO = {
    "int8-weight-only": Scheme(_torchao("int8-weight-only"), "w8a16"),
    "int8-dynamic": Scheme(_torchao("int8-dynamic"), "w8a8", tolerance=3e-2),
    "int4": Scheme(_torchao("int4"), "w4a16-g128", reference=_on_int4_grid),
    "float8": Scheme(_torchao("float8"), "fp8", tolerance=5e-2),
}
SCHEMES: dict[str, Scheme] = {
    **_OURS,
    **_PEERS,
    **{f"torchao-{name}": scheme for name, scheme in _TORCHAO.items()},
    **{
        f"torchao-{name}{COMPILED}": replace(scheme, make=_torchao(name, compiled=True))
        for name, scheme in _TORCHAO.items()
    },
}
"""What can be timed: ours, then the peers, each after the scheme that it is measured against."""


def parse_schemes(text: str, *, with_compiled: bool = False) -> list[str]:
    """Names in the order of `SCHEMES`, of a comma-separated list; an empty one is all that run eagerly.

    Args:
        with_compiled: what has a compiled form is run in that as well.

    Raises:
        ConfigError: a name that is none.
    """
    chosen = {name.strip().replace(" ", "-") for name in text.split(",") if name.strip()}
    if unknown := chosen - set(SCHEMES):
        raise ConfigError(f"unknown schemes {sorted(unknown)}; known: {', '.join(SCHEMES)}")
    chosen = chosen or {name for name in SCHEMES if not name.endswith(COMPILED)}
    if with_compiled:
        chosen |= {name + COMPILED for name in chosen} & set(SCHEMES)
    return [name for name in SCHEMES if name in chosen]


def one_line(error: BaseException) -> str:
    """The first line of an error, shortened; of one that the harness did not raise, its type before it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else "no message"
    text = text if isinstance(error, HarnessError) else f"{type(error).__name__}: {text}"
    return text if len(text) <= _MOST_CHARACTERS else text[: _MOST_CHARACTERS - 1] + "…"


def make_input(
    scheme: Scheme, rows: int, in_features: int, device: torch.device, generator: torch.Generator
) -> torch.Tensor:
    """A bfloat16 input [rows, in]: Gaussian, for outlier schemes with columns beyond all the others."""
    x = torch.randn(rows, in_features, device=device, generator=generator).bfloat16()
    if scheme.has_outliers:
        x = x.clamp_(-_REGULAR, _REGULAR)
        x[:, ::_OUTLIER_STEP] = _OUTLIER
    return x


def arguments(layer: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What the forward pass of a layer takes for an input x [rows, in]: for some peers its codes."""
    prepared: tuple[torch.Tensor, ...] = layer.arguments(x) if hasattr(layer, "arguments") else (x,)  # type: ignore[operator]
    return prepared


def check(scheme: str, layer: nn.Module, x: torch.Tensor, weight: torch.Tensor) -> None:
    """Compare a layer's product for x [rows, in] with that of a matrix [out, in] in float32.

    Raises:
        NumericalFailure: they differ by more than the scheme's tolerance.
    """
    y: torch.Tensor = layer(*arguments(layer, x))
    y = layer.result(y, x) if hasattr(layer, "result") else y  # type: ignore[operator]
    expected = functional.linear(x.float(), weight.float())
    error = float((y.float() - expected).norm() / expected.norm())
    if not error <= SCHEMES[scheme].tolerance:
        raise NumericalFailure(f"{scheme} at {tuple(x.shape)}: relative error {error:.2e}")


def held_bytes(layer: nn.Module) -> int:
    """Bytes of parameters and buffers; of a tensor that wraps others, theirs (its own type is a façade)."""
    return sum(map(_plain_bytes, [*layer.parameters(), *layer.buffers()]))


def _plain_bytes(tensor: torch.Tensor) -> int:
    if hasattr(tensor, "__tensor_flatten__"):
        names: list[str] = tensor.__tensor_flatten__()[0]
        return sum(_plain_bytes(getattr(tensor, name)) for name in names)
    return tensor.numel() * tensor.element_size()
