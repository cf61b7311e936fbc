"""2:4 weights as they are stored: against the definition, read bit by bit, and as a layer."""

from __future__ import annotations

import copy
import io
import itertools

import pytest
import torch
from torch.nn import functional

from harness.errors import ConfigError
from harness.measure.storage import storage_bytes
from harness.nn.semi_structured import (
    SemiStructuredLinear,
    compress_2_of_4,
    decompress_2_of_4,
    misfit,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def two_of_four(out: int, width: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """A random 2:4 matrix; some of its groups have one weight or none."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, width // 4, 4, generator=generator)
    places = torch.rand(weight.shape, generator=generator).argsort(-1)
    weight[places >= 2] = 0
    weight[torch.rand(weight.shape, generator=generator) < 0.1] = 0
    return weight.view(out, width).to(dtype)


def decoded(values: torch.Tensor, meta: torch.Tensor) -> torch.Tensor:
    """The matrix, from the description: one value after the other."""
    out, half = values.shape
    dense = torch.zeros(out, 2 * half, dtype=values.dtype)
    for row, index in itertools.product(range(out), range(half)):
        place = int(meta[row, index // 4]) >> 2 * (index % 4) & 3
        dense[row, index // 2 * 4 + place] += values[row, index]
    return dense


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_stored_as_described_and_comes_back_exactly(dtype):
    weight = two_of_four(9, 48, dtype)
    values, meta = compress_2_of_4(weight)
    assert (values.shape, values.dtype) == ((9, 24), dtype)
    assert (meta.shape, meta.dtype) == ((9, 6), torch.uint8)
    assert torch.equal(decoded(values, meta), weight)
    assert torch.equal(decompress_2_of_4(values, meta), weight)


def test_every_pattern_of_a_group_comes_back():
    """All 11 patterns of at most two of four, in every place of a row."""
    patterns = [p for p in itertools.product([0, 1], repeat=4) if sum(p) <= 2]
    assert len(patterns) == 11
    for shift in range(len(patterns)):
        row = [patterns[(shift + place) % 11] for place in range(12)]
        weight = torch.tensor(row, dtype=torch.float32).view(1, 48) * torch.arange(1.0, 49.0)
        assert torch.equal(decompress_2_of_4(*compress_2_of_4(weight)), weight)


def test_the_two_places_of_a_group_differ_whatever_is_zero():
    _, meta = compress_2_of_4(torch.zeros(2, 32))
    places = [[int(byte) >> shift & 3 for byte in row for shift in range(0, 8, 2)] for row in meta]
    assert all(first < second for row in places for first, second in zip(row[::2], row[1::2], strict=True))


@pytest.mark.parametrize(
    ("weight", "words"),
    [
        (torch.ones(2, 16), "not 2:4"),
        (torch.zeros(2, 24), "16 divides, not 24"),
        (torch.zeros(2, 0), "16 divides, not 0"),
    ],
)
def test_what_is_no_such_matrix_is_refused(weight, words):
    with pytest.raises(ConfigError, match=words):
        compress_2_of_4(weight)


def test_nan_is_not_zero():
    weight = torch.zeros(1, 16)
    weight[0, 3] = float("nan")
    assert decompress_2_of_4(*compress_2_of_4(weight)).isnan().nonzero().tolist() == [[0, 3]]


# --- the layer ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(64,), (1, 64), (2, 3, 64), (0, 64), (2, 0, 64)])
def test_it_multiplies_like_the_dense_matrix(dtype, shape):
    generator = torch.Generator().manual_seed(0)
    weight, bias = two_of_four(48, 64, dtype), torch.randn(48, generator=generator).to(dtype)
    layer = SemiStructuredLinear.from_dense(weight, bias)
    x = torch.randn(shape, generator=generator).to(dtype)
    assert torch.equal(layer(x), functional.linear(x, weight, bias))
    assert torch.equal(layer.dense_weight(), weight)
    other = x.double()
    assert torch.equal(layer(other), functional.linear(other, weight.double(), bias.double()))


@pytest.mark.parametrize(("dtype", "ratio"), [(torch.bfloat16, 0.5625), (torch.float32, 0.53125)])
def test_bytes_follow_the_formula(dtype, ratio):
    layer = SemiStructuredLinear.from_dense(two_of_four(64, 256, dtype))
    dense = 64 * 256 * dtype.itemsize
    assert storage_bytes([*layer.parameters(), *layer.buffers()]) == ratio * dense
    assert sum(t.numel() * t.element_size() for t in layer.state_dict().values()) == ratio * dense


def test_a_saved_layer_gives_the_same_bits():
    layer = SemiStructuredLinear.from_dense(two_of_four(48, 64), torch.randn(48))
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    empty = SemiStructuredLinear(64, 48, bias=True)
    assert not empty.dense_weight().any()
    empty.load_state_dict(torch.load(file))
    x = torch.randn(5, 64)
    assert torch.equal(empty(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    with pytest.raises(RuntimeError, match="Missing key"):
        empty.load_state_dict({})


def test_a_model_of_another_type_keeps_the_places():
    weight = two_of_four(48, 64)
    layer = SemiStructuredLinear.from_dense(weight, torch.randn(48)).to(torch.bfloat16)
    assert (layer.dtype, layer.meta.dtype, layer.bias.dtype) == (torch.bfloat16, torch.uint8, torch.bfloat16)
    assert torch.equal(layer.dense_weight(), weight.bfloat16())


def test_gradients_reach_the_input():
    layer = SemiStructuredLinear.from_dense(two_of_four(48, 64))
    x = torch.randn(5, 64, requires_grad=True)
    layer(x).sum().backward()
    assert torch.allclose(x.grad, layer.dense_weight().sum(0).expand(5, -1), atol=1e-5)


def test_it_says_what_it_is_and_refuses_nonsense():
    layer = SemiStructuredLinear.from_dense(two_of_four(48, 64, torch.bfloat16))
    assert repr(layer) == "SemiStructuredLinear(64, 48, 2:4, dtype=bfloat16, bias=False)"
    assert layer.kernel_name == layer.kernel_for(7, torch.float16) == "decompress+matmul"
    assert (layer.simulated, layer.bits) == (False, 16.0)
    with pytest.raises(ConfigError, match="takes 64 features, not 32"):
        layer(torch.zeros(1, 32))
    with pytest.raises(ConfigError, match="16 divides, not 40"):
        SemiStructuredLinear(40, 48)
    assert misfit(48, 64) is None
    assert "multiples of 16" in misfit(40, 64)
    assert "[48, 40]" in misfit(48, 40)


def test_it_traces_as_one_graph():
    layer = SemiStructuredLinear.from_dense(two_of_four(48, 64))
    compiled = torch.compile(layer, backend="eager", fullgraph=True, dynamic=False)
    x = torch.randn(5, 64)
    with torch.inference_mode():
        assert torch.equal(compiled(x), layer(x))
