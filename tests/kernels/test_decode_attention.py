"""Attention of a decode step against plain torch, and how it gets into a traced model.

Without a CUDA device the kernels run in Triton's interpreter:
``TRITON_INTERPRET=1 python -m pytest tests/kernels/test_decode_attention.py``.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from harness.kernels import decode_attention as kernel
from harness.kernels.rewriting_attention import rewrite_decode_attention
from tests.kernels.interpreting import DEVICES, DTYPES, OLD_NUMPY

# batch, heads, queries, keys, width, value width
SHAPES = [
    (1, 4, 1, 528, 128, 128),
    (2, 3, 1, 65, 64, 64),
    (1, 2, 1, 33, 80, 48),  # widths that no block has
    (3, 1, 1, 1000, 16, 16),
    (1, 600, 1, 70, 32, 32),  # heads enough: one part
    (2, 2, 4, 528, 64, 64),
    (1, 1, 32, 400, 128, 128),
    (1, 2, 17, 77, 40, 24),
]
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 2e-6}


def inputs(shape, dtype=torch.float32, device="cpu"):
    batch, heads, queries, keys, width, values = shape
    generator = torch.Generator().manual_seed(sum(shape))
    sizes = ((queries, width), (keys, width), (keys, values))
    return [torch.randn(batch, heads, *size, generator=generator).to(device, dtype) for size in sizes]


def masks(shape, dtype, device):
    """None, and every kind that models make: of a cache that is not full, of padding, of a query, added."""
    batch, heads, queries, keys = shape[:4]
    generator = torch.Generator().manual_seed(keys)
    seen = torch.rand(batch, heads, queries, keys, generator=generator) < 0.7
    seen[..., 0] = True
    added = torch.randn(heads, 1, keys, generator=generator).masked_fill(~seen[0, :, :1], -math.inf)
    least = torch.zeros(1, keys).masked_fill(torch.arange(keys) > keys // 2, torch.finfo(dtype).min)
    found = [
        (torch.arange(keys) <= keys // 3)[None, None, None],
        seen[:, :1, :1],
        seen,
        added.to(dtype),
        least.to(dtype),
    ]
    return [None, *(each.to(device) for each in found)]


def in_float64(query, key, value, mask, scale):
    scores = scale * query.double() @ key.double().mT
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.double()
    return scores.softmax(-1) @ value.double()


def rel_error(value, expected):
    assert value.isfinite().all()
    return float((value.double() - expected).norm() / expected.norm())


@OLD_NUMPY
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernels_compute_attention(shape, dtype, device):
    from harness.kernels.triton_decode_attention import decode_attention

    if device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter has no products of bfloat16")
    query, key, value = inputs(shape, dtype, device)
    for mask in masks(shape, dtype, device):
        y = decode_attention(query, key, value, mask, 0.3)
        assert y.dtype == dtype
        assert y.is_contiguous()
        assert rel_error(y, in_float64(query, key, value, mask, 0.3)) <= TOLERANCE[dtype]
        assert torch.equal(decode_attention(query, key, value, mask, 0.3), y), "the same bits every time"


@OLD_NUMPY
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("queries", [1, 3])
def test_the_kernels_read_slices_of_larger_tensors(queries, device):
    """As a projection gives them: heads beside each other in a row, keys in a cache with room."""
    from harness.kernels.triton_decode_attention import decode_attention

    query = torch.randn(2, queries, 3, 64, device=device).transpose(1, 2)
    key, value = torch.randn(2, 2, 5, 200, 64, device=device)[:, :, 1:4, 20:170].unbind()
    y = decode_attention(query, key, value, None, 0.125)
    assert rel_error(y, in_float64(query, key, value, None, 0.125)) <= 2e-6


@OLD_NUMPY
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("queries", [1, 2])
@pytest.mark.parametrize("kind", [torch.bool, torch.float32], ids=str)
def test_a_query_that_sees_nothing_gives_zeros(queries, kind, device):
    """And keys that are not seen may hold anything that is a number."""
    from harness.kernels.triton_decode_attention import decode_attention

    query, key, value = inputs((2, 1, queries, 300, 32, 32), device=device)
    seen = torch.ones(2, 1, 1, 300, dtype=torch.bool, device=device)
    seen[0] = False
    seen[1, ..., 100:] = False  # whole parts
    value[1, :, 100:] = 1e30
    mask = (
        seen if kind == torch.bool else torch.zeros(seen.shape, device=device).masked_fill(~seen, -math.inf)
    )
    y = decode_attention(query, key, value, mask, 0.2)
    assert not y[0].any()
    expected = in_float64(query[1:], key[1:, :, :100], value[1:, :, :100], None, 0.2)
    assert rel_error(y[1:], expected) <= 2e-6


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_without_cuda_the_operator_is_torchs_attention(shape):
    query, key, value = inputs(shape)
    for mask in masks(shape, torch.float32, "cpu"):
        y = torch.ops.harness.decode_attention(query, key, value, mask, 0.3)
        expected = functional.scaled_dot_product_attention(query, key, value, mask, scale=0.3)
        assert torch.equal(y, expected)


def test_the_operator_passes_torchs_own_checks():
    query, key, value = inputs((2, 2, 1, 9, 16, 8))
    for mask in (None, torch.ones(2, 1, 1, 9, dtype=torch.bool)):
        torch.library.opcheck(torch.ops.harness.decode_attention.default, (query, key, value, mask, 0.25))


@pytest.mark.parametrize(
    ("pairs", "keys", "expected"),
    [
        (32, 528, (17, 32)),  # no part below 32 keys
        (32, 2064, (17, 128)),
        (2048, 2064, (1, 2080)),  # heads enough
        (1, 100_000, (125, 800)),
        (1, 5, (1, 32)),
    ],
)
def test_keys_are_cut_so_that_the_device_is_full(pairs, keys, expected):
    parts_of = pytest.importorskip("harness.kernels.triton_decode_attention").parts_of
    parts, part = parts_of(pairs, keys, 32)
    assert (parts, part) == expected
    assert parts * part >= keys > (parts - 1) * part


# --- in a traced model --------------------------------------------------------------------------------


@pytest.fixture
def with_triton(monkeypatch):
    """As on a CUDA machine: graphs are rewritten; the operator still runs in plain torch."""
    monkeypatch.setattr(kernel, "has_triton", lambda device: True)
    monkeypatch.setattr(kernel, "_runs", lambda *_: False)


def traced(function, *inputs):
    """The operators that remain of a call, and the queries that each is given, and the call's result."""
    found = []

    def backend(module, _inputs):
        count = rewrite_decode_attention(module)
        calls = [
            node for node in module.graph.nodes if node.target is torch.ops.harness.decode_attention.default
        ]
        assert len(calls) == count
        found.extend(calls)
        return module.forward

    torch._dynamo.reset()
    return found, torch.compile(function, backend=backend, dynamic=False)(*inputs)


def repeat_kv(x, repeats):
    """As transformers copies shared heads."""
    batch, heads, length, width = x.shape
    x = x[:, :, None, :, :].expand(batch, heads, repeats, length, width)
    return x.reshape(batch, heads * repeats, length, width)


@pytest.mark.usefixtures("with_triton")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("how", ["own", "copied", "grouped"])
def test_every_form_of_heads_becomes_one_call_without_copies(how, masked):
    query = torch.randn(2, 6, 1, 16)
    key, value = torch.randn(2, 2, 6 if how == "own" else 2, 40, 16).unbind()
    mask = torch.rand(2, 1, 1, 40) < 0.8 if masked else None

    def run(query, key, value, mask):
        if how == "copied":
            key, value = repeat_kv(key, 3), repeat_kv(value, 3)
        grouped = {"enable_gqa": True} if how == "grouped" else {}
        y = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.2, **grouped)
        return y.transpose(1, 2).contiguous()

    [call], y = traced(run, query, key, value, mask)
    torch.testing.assert_close(y, run(query, key, value, mask))
    _, keys, values, _, scale = call.args
    assert keys.op == values.op == "placeholder"
    assert scale == 0.2


@pytest.mark.usefixtures("with_triton")
def test_the_scale_of_torch_is_the_scale():
    query, key, value = inputs((1, 2, 1, 30, 9, 9))
    [call], y = traced(functional.scaled_dot_product_attention, query, key, value)
    assert call.args[4] == 1 / 3
    torch.testing.assert_close(y, functional.scaled_dot_product_attention(query, key, value))


@pytest.mark.usefixtures("with_triton")
def test_heads_with_masks_of_their_own_are_read_from_the_copies():
    query = torch.randn(1, 4, 1, 16)
    key, value = torch.randn(2, 1, 2, 20, 16).unbind()
    mask = torch.rand(1, 4, 1, 20) < 0.8

    def run(query, key, value, mask):
        key, value = repeat_kv(key, 2), repeat_kv(value, 2)
        return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)

    [call], y = traced(run, query, key, value, mask)
    assert call.args[1].op == "call_method"
    torch.testing.assert_close(y, run(query, key, value, mask))


@pytest.mark.usefixtures("with_triton")
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((1, 2, 1, 30, 16, 16), {"is_causal": True}),  # a single query would see the first key alone
        ((1, 2, 12, 12, 16, 16), {}),  # no decode step
        ((1, 2, 65, 300, 16, 16), {}),
        ((1, 2, 1, 30, 300, 16), {}),  # wider than a program holds
    ],
    ids=["causal", "as many queries as keys", "many queries", "wide"],
)
def test_what_the_kernel_cannot_run_stays(shape, options):
    tensors = inputs(shape)

    def run(query, key, value):
        return functional.scaled_dot_product_attention(query, key, value, **options)

    calls, y = traced(run, *tensors)
    assert not calls
    torch.testing.assert_close(y, run(*tensors))


@pytest.mark.usefixtures("with_triton")
def test_heads_that_fill_a_device_are_the_librarys_unless_they_share_keys():
    query, key, value = inputs((5, 26, 1, 40, 16, 16))  # 130 heads
    assert not traced(functional.scaled_dot_product_attention, query, key, value)[0]
    assert traced(functional.scaled_dot_product_attention, query[:4], key[:4], value[:4])[0]

    def run(query, key, value):
        return functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)

    [_], y = traced(run, query, key[:, :13], value[:, :13])
    torch.testing.assert_close(y, run(query, key[:, :13], value[:, :13]))


@pytest.mark.usefixtures("with_triton")
def test_float64_stays():
    tensors = [each.double() for each in inputs((1, 2, 1, 30, 16, 16))]
    assert not traced(functional.scaled_dot_product_attention, *tensors)[0]


@pytest.mark.usefixtures("with_triton")
def test_attention_under_autocast_stays():
    def run(*inputs):
        with torch.autocast("cpu", torch.bfloat16):
            return functional.scaled_dot_product_attention(*inputs)

    calls, y = traced(run, *inputs((1, 2, 1, 30, 16, 16)))
    assert not calls
    assert y.dtype == torch.bfloat16


def test_without_triton_nothing_is_rewritten():
    assert not traced(functional.scaled_dot_product_attention, *inputs((1, 2, 1, 30, 16, 16)))[0]
