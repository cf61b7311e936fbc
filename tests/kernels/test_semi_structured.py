"""The 2:4 kernels of cuSPARSELt: what is asked of the library (on any machine), and what it gives (on CUDA).

Without a GPU the library is a stand-in that keeps values and metadata in one tensor of the weights' type, as
the real one does, and multiplies them in plain torch.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

from harness.errors import NotApplicable, NumericalFailure
from harness.kernels import bench, bench_layers
from harness.kernels import semi_structured as kernel
from harness.kernels.bench_layers import prune_2_of_4
from harness.nn.semi_structured import SemiStructuredLinear, compress_2_of_4, decompress_2_of_4
from tests.nn.test_semi_structured import two_of_four


def rel_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    assert bool(torch.isfinite(value).all())
    return float((value.double() - expected.double()).norm() / expected.double().norm())


@pytest.fixture
def library(monkeypatch):
    """A stand-in for cuSPARSELt on the CPU that counts its calls."""
    calls = SimpleNamespace(products=[], searches=0)

    def compress(weight):
        values, meta = compress_2_of_4(weight.float())
        return torch.cat([values.to(weight.dtype).view(torch.uint8), meta], 1).view(weight.dtype)

    def product(packed, dense, bias=None, alpha=None, out_dtype=None, transpose_result=False, **algorithm):
        in_features, rows = dense.shape
        assert packed.dtype == dense.dtype
        assert rows % (8 if packed.element_size() == 2 else 16) == 0
        assert dense.t().is_contiguous()
        calls.products.append((rows, algorithm))
        values, meta = packed[:, : in_features // 2], packed[:, in_features // 2 :]
        weight = decompress_2_of_4(values.float(), meta.contiguous().view(torch.uint8))
        y = functional.linear(dense.t().float(), weight, None if bias is None else bias.float())
        return (y if transpose_result else y.t()).to(out_dtype or dense.dtype)

    def fastest(run, seconds):
        calls.searches += 1
        return kernel.Algorithm(7)

    monkeypatch.setattr(torch, "_cslt_compress", compress)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", product)
    monkeypatch.setattr(kernel, "fastest", fastest)
    monkeypatch.setattr(kernel, "is_available", lambda device, dtype: device.type == "cpu")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    kernel.forget_algorithms()
    yield calls
    kernel.forget_algorithms()


DEFAULT = {"alg_id": 0, "split_k": 1, "split_k_mode": -1}
TUNED = {**DEFAULT, "alg_id": 7}


@pytest.mark.parametrize("rows", [1, 8, 13])
def test_rows_are_padded_and_taken_off_again(library, rows):
    weight, bias = two_of_four(32, 64, torch.bfloat16), torch.randn(32).bfloat16()
    layer = SemiStructuredLinear.from_dense(weight, bias, tuned=False)
    x = torch.randn(rows, 64).bfloat16()
    library.products.clear()
    assert rel_error(layer(x), functional.linear(x, weight, bias)) <= 1e-2
    assert library.products == [(-(-rows // 8) * 8, DEFAULT)]
    assert layer.kernel_name == "cusparselt 2:4"
    assert layer.kernel_for(1, torch.float16) == "decompress+matmul"


def test_only_the_librarys_form_is_held_and_a_saved_one_is_the_plain_form(library):
    weight = two_of_four(32, 64, torch.bfloat16)
    layer = SemiStructuredLinear.from_dense(weight)
    held = [name for name, _ in layer.named_buffers()]
    assert held == ["packed"]
    assert layer.packed.numel() * 16 == weight.numel() * 9
    assert torch.equal(layer.dense_weight(), weight)
    state = layer.state_dict()
    values, meta = compress_2_of_4(weight)
    assert torch.equal(state["values"], values)
    assert torch.equal(state["meta"], meta)
    empty = SemiStructuredLinear(64, 32, dtype=torch.bfloat16)
    assert [name for name, _ in empty.named_buffers()] == ["packed"]
    empty.load_state_dict(state)
    assert torch.equal(empty.dense_weight(), weight)
    assert torch.equal(copy.deepcopy(layer).dense_weight(), weight)


def test_moving_and_casting_go_through_the_plain_form(library):
    weight = two_of_four(32, 64, torch.bfloat16)
    layer = SemiStructuredLinear.from_dense(weight)
    layer = layer.to(torch.float16)  # metadata in the library's form would be cast as if it were weights
    assert layer.packed.dtype == torch.float16
    assert torch.equal(layer.dense_weight(), weight.half())
    layer = layer.to(torch.float32)
    assert layer.packed is None  # no kernel for this type
    assert torch.equal(layer.dense_weight(), weight.float())


def test_shapes_and_types_without_a_kernel_stay_in_the_plain_form(library):
    for shape, dtype in (((24, 64), torch.bfloat16), ((32, 64), torch.float32)):
        layer = SemiStructuredLinear.from_dense(two_of_four(*shape, dtype))
        assert layer.packed is None
        assert layer.kernel_name == "decompress+matmul"


def test_an_algorithm_is_searched_once_for_a_number_of_rows(library):
    first, second = (
        SemiStructuredLinear.from_dense(two_of_four(32, 64, torch.bfloat16, seed)) for seed in (0, 1)
    )
    x = torch.randn(5, 64).bfloat16()
    library.products.clear()
    for layer in (first, second, first):
        layer(x)
    assert library.searches == 1  # 5 and 8 rows are the same problem, for every matrix of this shape
    first(torch.randn(8, 64).bfloat16())
    assert library.searches == 1
    first(torch.randn(9, 64).bfloat16())
    assert library.searches == 2
    assert [algorithm for _, algorithm in library.products] == [TUNED] * 5


def test_the_default_stays_the_default_beside_a_tuned_one(library):
    weight = two_of_four(32, 64, torch.bfloat16)
    tuned, default = (SemiStructuredLinear.from_dense(weight, tuned=tuned) for tuned in (True, False))
    x = torch.randn(8, 64).bfloat16()
    library.products.clear()
    tuned(x), default(x)
    assert library.products == [(8, TUNED), (8, DEFAULT)]


def test_nothing_is_searched_while_a_graph_is_captured(library, monkeypatch):
    layer = SemiStructuredLinear.from_dense(two_of_four(32, 64, torch.bfloat16))
    x = torch.randn(8, 64).bfloat16()
    library.products.clear()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    layer(x)
    assert (library.searches, library.products) == (0, [(8, DEFAULT)])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    layer(x)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    layer(x)
    assert (library.searches, library.products[-1]) == (1, (8, TUNED))


def test_searching_ends_after_so_many_numbers_of_rows(library):
    layer = SemiStructuredLinear.from_dense(two_of_four(32, 64, torch.bfloat16))
    for rows in range(8, 8 * 50, 8):
        layer(torch.zeros(rows, 64).bfloat16())
    assert library.searches == 32
    assert library.products[-1] == (8 * 49, DEFAULT)


def test_the_fastest_algorithm_is_the_quickest_that_the_library_has():
    times = [5.0, 2.0, 9.0, 2.0]
    tried = []

    def run(algorithm):
        if algorithm.number == len(times):
            raise RuntimeError("invalid value")
        tried.append(algorithm.number)

    def seconds(call):
        call()
        return times[tried[-1]]

    assert kernel.fastest(run, seconds) == kernel.Algorithm(1)
    assert tried == [0, 0, 1, 1, 2, 2, 3, 3]
    times.clear()
    assert kernel.fastest(run, seconds) == kernel.Algorithm()


def test_too_little_memory_for_a_search_is_no_end_of_the_algorithms():
    def run(algorithm):
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        kernel.fastest(run, lambda call: 0.0)


def test_a_compiler_sees_one_operator(library):
    layer = SemiStructuredLinear.from_dense(two_of_four(32, 64, torch.bfloat16), torch.randn(32))
    seen: list[str] = []

    def backend(module, inputs):
        seen.extend(str(node.target) for node in module.graph.nodes if node.op == "call_function")
        return module.forward

    x = torch.randn(5, 64).bfloat16()
    with torch.inference_mode():
        compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=False)
        assert torch.equal(compiled(x), layer(x))
    assert sum("semi_structured_linear" in name for name in seen) == 1


@pytest.mark.parametrize("scheme", ["2:4-bf16", "2:4-bf16-default", "2:4-int8", "2:4-fp8"])
def test_the_benchmark_times_only_what_is_right(library, scheme, monkeypatch):
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    x = torch.randn(9, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
    layer = bench.SCHEMES[scheme].make(weight)
    dense = prune_2_of_4(weight)
    assert (dense.view(64, -1, 4) != 0).sum(-1).eq(2).all()
    bench_layers.check(scheme, layer, x, dense)
    assert "cusparselt 2:4" in layer.kernel_for(9, x.dtype)
    right = torch._cslt_sparse_mm
    # As if the library mixed up two outputs: what it says of itself would not show it.
    monkeypatch.setattr(torch, "_cslt_sparse_mm", lambda *a, **k: right(*a, **k).roll(1, 1))
    with pytest.raises(NumericalFailure, match=f"{scheme} at"):
        bench_layers.check(scheme, layer, x, dense)


@pytest.mark.parametrize("scheme", ["2:4-bf16", "2:4-int8", "2:4-fp8"])
def test_the_benchmark_leaves_out_what_the_device_lacks(scheme):
    with pytest.raises(NotApplicable, match="cuSPARSELt does not multiply"):
        bench.SCHEMES[scheme].make(torch.randn(64, 256))


def test_without_cuda_there_is_no_kernel():
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.int8):
        assert kernel.choose(torch.device("cpu"), dtype) == "decompress+matmul"


@pytest.mark.parametrize(
    ("capability", "built", "dtype", "expected"),
    [
        ((9, 0), True, torch.bfloat16, True),
        ((8, 0), True, torch.float16, True),
        ((8, 0), True, torch.float8_e4m3fn, False),
        ((9, 0), True, torch.float8_e4m3fn, True),
        ((7, 5), True, torch.float16, False),
        ((9, 0), False, torch.bfloat16, False),
        ((9, 0), True, torch.float32, False),
    ],
)
def test_availability_follows_from_device_build_and_type(monkeypatch, capability, built, dtype, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: built)
    assert kernel.is_available(torch.device("cuda"), dtype) is expected


# --- on CUDA ------------------------------------------------------------------------------------------

needs_library = pytest.mark.skipif(
    not kernel.is_available(torch.device("cuda" if torch.cuda.is_available() else "cpu"), torch.bfloat16),
    reason="needs a CUDA device with cuSPARSELt",
)
SHAPES = [(4096, 4096), (256, 688), (16, 16), (48, 1024), (11008, 4096)]


@pytest.mark.gpu
@needs_library
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tuned", [False, True])
@pytest.mark.parametrize(("out", "width"), SHAPES)
def test_products_are_those_of_the_dense_matrix(out, width, tuned, dtype):
    weight = two_of_four(out, width, dtype).cuda()
    for bias in (None, torch.randn(out, device="cuda", dtype=dtype)):
        layer = SemiStructuredLinear.from_dense(weight, bias, tuned=tuned)
        assert layer.kernel_for(16, dtype) == "cusparselt 2:4"
        for rows in (1, 7, 16, 300):
            x = torch.randn(rows, width, device="cuda", dtype=dtype)
            y = layer(x)
            assert (y.shape, y.dtype) == ((rows, out), dtype)
            wide = None if bias is None else bias.double()
            assert rel_error(y, functional.linear(x.double(), weight.double(), wide)) <= 5e-3


@pytest.mark.gpu
@needs_library
def test_what_the_library_holds_is_exact_and_small():
    weight = two_of_four(1024, 2048, torch.bfloat16).cuda()
    layer = SemiStructuredLinear.from_dense(weight)
    assert torch.equal(layer.dense_weight(), weight)
    held = sum(t.untyped_storage().nbytes() for t in layer.buffers())
    assert held <= 0.6 * weight.numel() * 2
    back = SemiStructuredLinear(2048, 1024, dtype=torch.bfloat16)
    back.load_state_dict(layer.state_dict())
    assert torch.equal(back.dense_weight(), weight.cpu())
    assert torch.equal(back.cuda().dense_weight(), weight)
    assert torch.equal(layer.cpu().dense_weight(), weight.cpu())


@pytest.mark.gpu
@needs_library
@pytest.mark.parametrize("tuned", [False, True])
@pytest.mark.parametrize("rows", [1, 32])
def test_it_is_captured(rows, tuned):
    layer = SemiStructuredLinear.from_dense(
        two_of_four(512, 1024, torch.bfloat16).cuda(), torch.randn(512).bfloat16().cuda(), tuned=tuned
    )
    x = torch.randn(rows, 1024, device="cuda", dtype=torch.bfloat16)
    with torch.inference_mode():
        layer(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        for _ in range(2):
            x.copy_(torch.randn_like(x))
            graph.replay()
            assert torch.equal(y, layer(x))


@pytest.mark.gpu
@needs_library
def test_it_is_captured_without_a_call_before():
    layer = SemiStructuredLinear.from_dense(two_of_four(256, 512, torch.bfloat16).cuda())
    x = torch.randn(24, 512, device="cuda", dtype=torch.bfloat16)
    layer(torch.zeros(8, 512, device="cuda", dtype=torch.bfloat16))  # the library's own start
    with torch.inference_mode():
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        graph.replay()
    assert rel_error(y, x.double() @ layer.dense_weight().double().t()) <= 5e-3


@pytest.mark.gpu
@needs_library
def test_a_compiled_layer_is_captured_too():
    layer = SemiStructuredLinear.from_dense(two_of_four(256, 512, torch.bfloat16).cuda())
    x = torch.randn(4, 512, device="cuda", dtype=torch.bfloat16)
    with torch.inference_mode():
        compiled = torch.compile(layer, fullgraph=True, dynamic=False)
        assert rel_error(compiled(x), layer(x)) <= 1e-3


@pytest.mark.gpu
@needs_library
@pytest.mark.parametrize("scheme", ["2:4-bf16", "2:4-bf16-default", "2:4-int8", "2:4-fp8"])
def test_the_benchmark_times_every_scheme(scheme):
    timing = bench.time_linear(scheme, 64, 4096, 4096, torch.device("cuda"))
    assert 0 < timing.low_us <= timing.median_us <= timing.high_us
    assert timing.kernel.startswith("cusparselt 2:4")


@pytest.mark.gpu
@needs_library
def test_sparse_products_of_many_tokens_beat_the_dense_one():
    device = torch.device("cuda")
    dense, sparse = (
        bench.time_linear(scheme, 4096, 4096, 11008, device).median_us for scheme in ("bf16", "2:4-bf16")
    )
    assert dense / sparse >= 1.15
