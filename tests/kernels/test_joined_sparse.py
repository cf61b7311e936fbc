"""Products of a few rows with 2:4 weights that read the same x: joined in a traced model, in one launch."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import fx, nn
from torch.nn import functional

from harness.kernels import semi_structured as kernel
from harness.kernels import sparse_rows
from harness.kernels.rewriting_sparse import join_sparse
from harness.kernels.traced import same_values, value_read
from harness.nn.quantizer import quantize_weight
from harness.nn.semi_structured import SemiStructuredLinear
from harness.nn.sparse_8_bit import SparseFp8Linear, SparseInt8Linear
from tests.kernels.joining import Beside, products_of_calls
from tests.kernels.test_sparse_rows import TYPES, encoded, matrix, needs_library, readable, rel_error
from tests.nn.test_semi_structured import two_of_four

OF_16_BITS = torch.ops.harness.semi_structured_linears.default
OF_8_BITS = torch.ops.harness.semi_structured_few_8_bit_several.default
ALONE = (
    torch.ops.harness.semi_structured_linear.default,
    torch.ops.harness.semi_structured_few_8_bit.default,
)
KINDS = pytest.mark.parametrize("kind", ["bf16", "int8", "fp8"])


def prepare_several(x, packed, biases, out_features, launch, *, scales=None, dtype=None):
    """What one launch gives, in plain torch."""
    outputs = []
    for place, (held, out) in enumerate(zip(packed, out_features, strict=True)):
        y = functional.linear(x.float(), sparse_rows.unpack(held, out, x.shape[1]).float())
        y = y if scales is None else y * scales[0] * scales[1][place]
        outputs.append((y + biases[place] if biases else y).to(dtype or x.dtype))
    return SimpleNamespace(run=lambda: outputs[0]), outputs


@pytest.fixture
def library(monkeypatch):
    """A stand-in for cuSPARSELt's form on the CPU, and for the kernel that reads it."""
    monkeypatch.setattr(torch, "_cslt_compress", encoded)
    monkeypatch.setattr(kernel, "is_available", lambda device, dtype: device.type == "cpu")
    monkeypatch.setattr(sparse_rows, "is_available", lambda device, dtype: device.type == "cpu")
    monkeypatch.setattr(sparse_rows, "prepare_several", prepare_several)


def layer(kind: str, out: int, *, bias: bool = False) -> SemiStructuredLinear:
    weight = two_of_four(out, 128, seed=out)
    own = torch.randn(out, generator=torch.Generator().manual_seed(out)).bfloat16() if bias else None
    if kind == "int8":
        weight_8_bit = quantize_weight(weight, bits=8, sym=True)
        return SparseInt8Linear.from_weight(weight_8_bit, own, tuned=False)
    if kind == "fp8":
        return SparseFp8Linear.from_float(weight, own, tuned=False)
    return SemiStructuredLinear.from_dense(weight.bfloat16(), own, tuned=False)


def calls_of(module: nn.Module, x: torch.Tensor) -> list[int]:
    return products_of_calls(module, x, join_sparse, (OF_16_BITS, OF_8_BITS), 1, ALONE)


def rows_of_x(rows: int) -> torch.Tensor:
    return torch.randn(1, rows, 128, generator=torch.Generator().manual_seed(rows)).bfloat16()


# --- in a traced model --------------------------------------------------------------------------------


@pytest.mark.usefixtures("library")
@KINDS
@pytest.mark.parametrize(
    ("outs", "biases", "calls"),
    [
        ((128, 64, 64), (), [3]),  # query, and fewer heads of keys and values
        ((128, 64), (128, 64), [2]),
        ((64, 64, 64, 64, 64), (), [3, 2]),
        ((128, 64), (64,), [1, 1]),
        ((64,), (), [1]),
    ],
    ids=["heads", "biases", "five", "one bias", "alone"],
)
def test_what_is_joined(kind, outs, biases, calls):
    module = Beside(*(layer(kind, out, bias=out in biases) for out in outs))
    assert calls_of(module, rows_of_x(1)) == calls


@pytest.mark.usefixtures("library")
@KINDS
def test_up_to_eight_rows_are_joined(kind, monkeypatch):
    module = Beside(layer(kind, 128), layer(kind, 64))
    assert calls_of(module, rows_of_x(sparse_rows.MOST_ROWS)) == [2]

    def product(packed, x, out_features, *, bias=None, out_dtype=None, tuned=False):
        assert x.shape[0] == 9
        return functional.linear(x.float(), sparse_rows.unpack(packed, out_features, 128).float()).bfloat16()

    monkeypatch.setattr(kernel, "product", product)
    if kind == "bf16":  # the library's products of 8 bits have another operator
        assert calls_of(module, rows_of_x(9)) == [1, 1]
    else:
        assert calls_of(module, rows_of_x(9)) == []


@pytest.mark.usefixtures("library")
def test_a_matrix_that_only_the_library_reads_stays_apart(monkeypatch):
    module = Beside(layer("bf16", 128), layer("bf16", 64))
    monkeypatch.setattr(
        kernel,
        "product",
        lambda packed, x, out, **_: functional.linear(x, sparse_rows.unpack(packed, out, x.shape[1])),
    )
    for each in module.layers:
        each.reads_rows = False
    assert calls_of(module, rows_of_x(1)) == [1, 1]


@pytest.mark.usefixtures("library")
@KINDS
def test_the_launch_is_that_of_all_rows_together(kind, monkeypatch):
    asked: list[int] = []
    right = sparse_rows.launch_for

    def counted(rows, out, dtype):
        asked.append(out)
        return right(rows, out, dtype)

    monkeypatch.setattr(sparse_rows, "launch_for", counted)
    module = Beside(layer(kind, 128), layer(kind, 64))
    assert calls_of(module, rows_of_x(8)) == [2]
    assert 192 in asked


@pytest.mark.usefixtures("library")
@KINDS
def test_products_one_after_the_other_stay_apart(kind):
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = layer(kind, 128), layer(kind, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x))

    assert calls_of(Chain(), rows_of_x(1)) == [1, 1]


@pytest.mark.usefixtures("library")
@KINDS
def test_an_input_that_is_changed_in_between_is_another(kind):
    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = layer(kind, 128), layer(kind, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            kept = x * 2
            y = self.first(kept)
            kept += 1
            return torch.cat([y, self.second(kept)], -1)

    assert calls_of(Changing(), rows_of_x(1)) == [1, 1]


def test_without_cuda_nothing_is_joined():
    assert calls_of(Beside(layer("bf16", 128), layer("bf16", 64)), rows_of_x(1)) == []


# --- what the same value is ---------------------------------------------------------------------------


def rounded(graph: fx.Graph, x: fx.Node, levels: float = 127) -> fx.Node:
    peak = graph.call_method("amax", (graph.call_method("abs", (x,)), -1), {"keepdim": True})
    scale = graph.call_function(torch.full_like, (peak, levels))
    return graph.call_method("clamp_", (graph.call_function(torch.round, (scale,)), -127, 127))


def same(graph: fx.Graph, one: fx.Node, other: fx.Node) -> bool:
    """Whether readers of both, after all that there is, find the same."""
    readers = [graph.call_function(torch.neg, (each,)) for each in (one, other)]
    values = same_values(graph)
    return value_read(values, one, readers[0]) == value_read(values, other, readers[1])


def test_the_same_arithmetic_of_the_same_value_is_the_same():
    graph = fx.Graph()
    x, other = graph.placeholder("x"), graph.placeholder("other")
    first = rounded(graph, x)
    assert same(graph, first, rounded(graph, x))
    assert not same(graph, first, rounded(graph, other))
    assert not same(graph, first, rounded(graph, x, 127.0))
    assert not same(graph, x, other)
    assert not same(
        graph, graph.call_function(torch.rand_like, (x,)), graph.call_function(torch.rand_like, (x,))
    )


def test_a_change_makes_another_value():
    graph = fx.Graph()
    x = graph.placeholder("x")
    first, second = rounded(graph, x), rounded(graph, x)
    assert same(graph, first, second)
    graph.call_method("add_", (second, 1))
    assert not same(graph, first, second)
    assert not same(graph, first, rounded(graph, x))
    assert same(graph, rounded(graph, x), rounded(graph, x))


# --- the operators ------------------------------------------------------------------------------------


def inputs(dtype: torch.dtype, outs: tuple[int, ...], *, with_bias: bool):
    x = (torch.randn(2, 128) * 20).round().to(dtype)
    held = [encoded(matrix(out, 128, dtype, seed=out)) for out in outs]
    out_dtype = torch.bfloat16 if dtype.itemsize == 1 else dtype
    biases = [torch.randn(out).to(out_dtype) for out in outs] if with_bias else []
    if dtype.itemsize == 2:
        return OF_16_BITS, (x, held, biases, list(outs))
    scales = torch.rand(2, 1), [torch.rand(out) for out in outs]
    return OF_8_BITS, (x, held, *scales, biases, out_dtype)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.int8], ids=str
)  # float8 has no products to check with
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_operators_pass_torchs_own_checks(dtype, with_bias):
    operator, given = inputs(dtype, (128, 64), with_bias=with_bias)
    torch.library.opcheck(operator, given)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("outs", [(128, 64, 64), (64,) * 4, (8192, 64)], ids=str)
def test_what_one_launch_cannot_take_is_multiplied_one_by_one(dtype, outs, monkeypatch):
    launches: list[int] = []

    def counted(x, packed, *rest, **options):
        launches.append(len(packed))
        return prepare_several(x, packed, *rest, **options)

    monkeypatch.setattr(sparse_rows, "prepare_several", counted)
    operator, given = inputs(dtype, (128, 64), with_bias=True)
    x, held, *rest = given
    held = [
        held[1] if out == 64 else torch.zeros(out * 64 + out * 16 // dtype.itemsize, dtype=dtype)
        for out in outs
    ]
    if dtype.itemsize == 2:
        given = (x, held, [torch.randn(out).to(dtype) for out in outs], list(outs))
    else:
        columns = [torch.rand(out) for out in outs]
        given = (x, held, rest[0], columns, [torch.randn(out) for out in outs], torch.bfloat16)
    found = operator(*given)
    assert launches == ([len(outs)] if len(outs) <= 3 else [1] * len(outs))
    for place, (y, out) in enumerate(zip(found, outs, strict=True)):
        assert y.shape == (2, out)
        bias = given[-2][place] if dtype.itemsize == 1 else given[2][place]
        if dtype.itemsize == 2:
            expected = sparse_rows.multiply(x, held[place], bias, out)
        else:
            expected = sparse_rows.multiply_8_bit(
                x, held[place], rest[0], columns[place], bias, torch.bfloat16
            )
        assert torch.equal(y, expected)


# --- on CUDA ------------------------------------------------------------------------------------------


@pytest.mark.gpu
@needs_library
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("outs", [(4096, 4096, 4096), (4096, 1024, 1024), (11008, 8192), (192, 64)], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_one_launch_gives_what_each_alone_gives(rows, outs, dtype):
    held = [readable(out, 4096, dtype)[1] for out in outs]
    x = torch.randn(rows, 4096, device="cuda") * (30 if dtype.itemsize == 1 else 1)
    x = x.round().to(dtype) if dtype == torch.int8 else x.to(dtype)
    row_scales = torch.rand(rows, 1, device="cuda") + 0.5
    columns = [torch.rand(out, device="cuda") + 0.5 for out in outs]
    out_dtype = torch.bfloat16 if dtype.itemsize == 1 else dtype
    own = [torch.randn(out, device="cuda").to(out_dtype) for out in outs]
    for biases in ([], own):
        if dtype.itemsize == 2:
            found = sparse_rows.multiply_several(x, held, biases, list(outs))
        else:
            found = sparse_rows.multiply_several_8_bit(x, held, row_scales, columns, biases, out_dtype)
        launch = sparse_rows.launch_for(rows, sum(outs), dtype)
        for place, y in enumerate(found):
            scales = (row_scales, columns[place]) if dtype.itemsize == 1 else None
            alone = sparse_rows.prepare(
                x,
                held[place],
                biases[place] if biases else None,
                outs[place],
                launch,
                scales=scales,
                dtype=None if scales is None else out_dtype,
            ).run()
            assert y.shape == (rows, outs[place])
            assert torch.equal(y, alone)


@pytest.mark.gpu
@needs_library
@KINDS
@pytest.mark.parametrize("rows", [1, 8])
def test_layers_of_a_compiled_block_share_a_launch(rows, kind):
    module = Beside(layer(kind, 128), layer(kind, 64)).cuda()
    assert all(each.reads_rows for each in module.layers)
    assert calls_of(module, rows_of_x(rows).cuda()) == [2]


@pytest.mark.gpu
@needs_library
@KINDS
def test_a_compiled_block_runs_one_launch(kind, monkeypatch):
    from harness.measure.compiling import _rewritten_inductor

    launches: list[int] = []
    right = sparse_rows.prepare_several

    def counted(x, packed, *rest, **options):
        launches.append(len(packed))
        return right(x, packed, *rest, **options)

    monkeypatch.setattr(sparse_rows, "prepare_several", counted)
    module = Beside(*(layer(kind, out) for out in (128, 64, 64))).cuda()
    x = rows_of_x(1).cuda()
    torch._dynamo.reset()
    with torch.no_grad():
        run = torch.compile(module, backend=_rewritten_inductor, dynamic=False)
        run(x)
        launches.clear()
        y = run(x)
        assert launches == [3]
        assert rel_error(y, module(x)) <= 2e-2  # a compiler may round x in another way
