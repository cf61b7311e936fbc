"""The choice of a kernel for packed weights and full-precision activations.

Integers on a grid here; places in a table in `harness.kernels.table`. Both choose by
`harness.kernels.selection` and run the same kernels.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch.nn import functional

from harness.kernels import reference
from harness.kernels.selection import MOST_MATRICES, SHARING, Launch, select
from harness.kernels.stored import Form, StoredMatrix, stored
from harness.nn.packing import PackedWeight

__all__ = [
    "choose",
    "dequantize",
    "fits_triton",
    "has_triton",
    "launch_for",
    "linear",
    "linears",
    "make_ready",
    "name_of",
    "runs_matrix",
    "runs_vector",
    "share_a_launch",
]

_FALLBACK = "dequantize+matmul"
_MANY = 1 << 20
"""Rows of a matrix: more than any kernel asks for."""
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_HAS_TRITON = importlib.util.find_spec("triton") is not None
"""Found once and not by a function: layers ask while they are traced, and dynamo breaks a graph in two where
it cannot follow the import system."""


def has_triton(device: torch.device) -> bool:
    """Whether Triton kernels can run on this device."""
    return device.type == "cuda" and _HAS_TRITON


def make_ready(device: torch.device) -> None:
    """Allocate what the kernels keep on this device: before a CUDA graph's own memory could hold it."""
    if has_triton(device):
        from harness.kernels import triton_weight_only

        triton_weight_only.numbers(device)


def fits_triton(form: Form, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether there are kernels for this matrix, type of activations and device."""
    return dtype in _FLOATS and form.fits and has_triton(device)


def launch_for(form: Form, rows: int, dtype: torch.dtype, device: torch.device) -> Launch | None:
    """The launch that multiplies so many rows of this type; None where the matrix is written out first."""
    if not fits_triton(form, dtype, device):
        return None
    bits = torch.finfo(dtype).bits
    return select(form, rows, bits, vector=runs_vector(device), matrix=runs_matrix(device))


def runs_vector(device: torch.device) -> bool:
    """Whether the kernels written in Gluon run on a CUDA device: NVIDIA's tensor cores since compute
    capability 8.0, and a Triton whose Gluon is the one they were written in."""
    return (
        torch.version.hip is None
        and _capability(device) >= (8, 0)
        and _has_gluon("gluon_few", "gluon_sparse_rows", "gluon_vector")
    )


def runs_matrix(device: torch.device) -> bool:
    """Whether the kernel with Hopper's own instructions runs, which no later device has."""
    return torch.version.hip is None and _capability(device)[0] == 9 and _has_gluon("gluon_matrix")


@functools.cache
def _has_gluon(*modules: str) -> bool:
    # An experimental part of Triton, of which another version may lack names or have others.
    try:
        for name in modules:
            importlib.import_module(f"harness.kernels.{name}")
    except ImportError:
        return False
    return True


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def name_of(form: Form, rows: int, dtype: torch.dtype, device: torch.device) -> str:
    """The name of the kernel that runs for so many rows of this type."""
    if not fits_triton(form, dtype, device):
        return _FALLBACK
    launch = launch_for(form, rows, dtype, device)
    if launch is None:
        return f"triton {_FALLBACK}"
    codes = "t" if form.is_table else "w"
    return f"triton {codes}{form.bits}a{torch.finfo(dtype).bits} {launch.kernel}"


def choose(weight: PackedWeight, rows: int, dtype: torch.dtype) -> str:
    """The name of the kernel that `linear` runs for so many rows of activations of this type."""
    return name_of(stored(weight).form, rows, dtype, weight.codes.device)


def dequantize(weight: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    """The matrix [out, in], computed in float32 and rounded to `dtype`."""
    matrix = stored(weight)
    if fits_triton(matrix.form, dtype, weight.codes.device):
        from harness.kernels import triton_weight_only

        return triton_weight_only.dequantize(matrix, dtype)
    return reference.dequantize(weight, dtype)


def linear(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x @ dequantize(weight).T + bias`` for x [rows, in] by the kernel that `choose` names.

    Where gradients flow to x, the matrix is dequantized: the fused kernels have no backward pass. For
    torch.compile the whole is one operator, ``torch.ops.harness.weight_only_linear``.
    """
    if torch.compiler.is_compiling() and not _needs_gradient(x):
        y: torch.Tensor = _operator(
            x, weight.codes, weight.scales, weight.zeros, bias,
            weight.bits, weight.group_size, weight.tile, weight.in_features,
        )  # fmt: skip
        return y
    return _linear(x, weight, bias)


@torch.library.custom_op("harness::weight_only_linear", mutates_args=())
def _operator(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
    group_size: int,
    tile: int,
    in_features: int,
) -> torch.Tensor:
    weight = PackedWeight(codes, scales, zeros, bits, group_size, tile, in_features, codes.shape[1])
    return _linear(x, weight, bias)


@_operator.register_fake
def _(x: torch.Tensor, codes: torch.Tensor, *_rest: object) -> torch.Tensor:
    return x.new_empty(x.shape[0], codes.shape[1])


def share_a_launch(form: Form, rows: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a launch can take such a matrix with others that read the same rows, if those of all are
    enough (`linears` knows them)."""
    launch = launch_for(replace(form, out_features=_MANY), rows, dtype, device)
    return launch is not None and launch.kernel in SHARING


@torch.library.custom_op("harness::weight_only_linears", mutates_args=())
def linears(
    x: torch.Tensor,
    codes: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor],
    zeros: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    bits: int,
    group_size: int,
    tile: int,
    in_features: int,
) -> list[torch.Tensor]:
    """`linear` for packed weights that read the same rows x [rows, in], in one launch where it can be.

    Args:
        codes, scales: of each weight. zeros, biases: of each weight, or none at all.
    """
    absent: list[torch.Tensor | None] = [None] * len(codes)
    weights = [
        PackedWeight(each, scale, zero, bits, group_size, tile, in_features, each.shape[1])
        for each, scale, zero in zip(codes, scales, zeros or absent, strict=True)
    ]
    matrices = [stored(weight) for weight in weights]
    launch = _launch_together(x, matrices)
    if launch is not None:
        from harness.kernels import triton_weight_only

        return triton_weight_only.multiply_several(x, matrices, biases, launch)
    return [_linear(x, weight, bias) for weight, bias in zip(weights, biases or absent, strict=True)]


def _launch_together(x: torch.Tensor, matrices: Sequence[StoredMatrix]) -> Launch | None:
    """The launch for the rows of all matrices, which are stored alike; None: each has its own."""
    form = replace(matrices[0].form, out_features=sum(matrix.out_features for matrix in matrices))
    launch = launch_for(form, x.shape[0], x.dtype, x.device)
    shared = launch is not None and launch.kernel in SHARING and len(matrices) <= MOST_MATRICES
    return launch if shared else None


@linears.register_fake
def _(x: torch.Tensor, codes: Sequence[torch.Tensor], *_rest: object) -> list[torch.Tensor]:
    return [x.new_empty(x.shape[0], each.shape[1]) for each in codes]


def _needs_gradient(x: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad


def _linear(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    matrix = stored(weight)
    launch = None if _needs_gradient(x) else launch_for(matrix.form, x.shape[0], x.dtype, x.device)
    if launch is not None:
        from harness.kernels import triton_weight_only

        return triton_weight_only.multiply(x, matrix, bias, launch)
    return functional.linear(x, dequantize(weight, x.dtype), bias)
