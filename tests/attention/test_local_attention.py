"""The gathered form and the dispatch against a dense float64 oracle."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from harness.errors import NotApplicable
from harness.nn.attention import PositionMask, attend_in_band
from harness.nn.local_attention import flex_attention_in_band, gathered_attention
from harness.nn.masks import Band, band_block_mask

from .oracle import attention, pattern

B = 8
BANDS = [
    Band("sliding", 1),
    Band("sliding", 5),
    Band("sliding", B),
    Band("sliding", 40),
    Band("block", B),
    Band("block", B, 1),
    Band("block", 3, 2),
    Band("block", 40, 1),
    Band("sliding", 6, causal=False),
    Band("sliding", 7, causal=False),
    Band("block", B, causal=False),
    Band("block", B, 1, causal=False),
]
LENGTHS = (1, 2, 7, B - 1, B, B + 1, 3 * B + 5, 131)


def _name(band: Band) -> str:
    return f"{band.kind}{band.size}-{band.lookback}-{'causal' if band.causal else 'both'}"


def _qkv(length: int, *, kv_heads: int = 2, seed: int = 0, dtype=torch.float32, batch: int = 2):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, 4, length, 8), (batch, kv_heads, length, 8), (batch, kv_heads, length, 8)]
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


@pytest.mark.parametrize("band", BANDS, ids=_name)
def test_visible_is_the_written_definition(band):
    i, j = torch.arange(50)[:, None], torch.arange(50)
    assert torch.equal(band.visible(i, j), pattern(band, 50))
    first, last = band.first(torch.arange(50)), band.last(torch.arange(50))
    assert (first.diff() >= 0).all()
    assert (last.diff() >= 0).all()
    if band.causal:
        assert int(pattern(band, 130).sum(1).max()) == band.reach


@pytest.mark.parametrize("band", BANDS, ids=_name)
@pytest.mark.parametrize("length", LENGTHS)
def test_gathered_and_dispatched_match_the_oracle(band, length):
    query, key, value = _qkv(length)
    padding = torch.ones(2, length, dtype=torch.bool)
    padding[1, length - length // 3 :] = False
    mask = pattern(band, length)
    expected = attention(query, key, value, mask)
    padded = attention(query, key, value, mask, padding)
    for compute in (gathered_attention, lambda q, k, v, b: attend_in_band(q, k, v, None, b)):
        assert (compute(query, key, value, band) - expected).abs().max() <= 1e-5
    for result in (
        gathered_attention(query, key, value, band, padding=padding),
        attend_in_band(query, key, value, PositionMask(0, padding, None), band),
    ):
        assert torch.isfinite(result).all()
        assert (result - padded)[padding].abs().max() <= 1e-5


@pytest.mark.parametrize("band", [BANDS[1], BANDS[5], BANDS[8], BANDS[11]], ids=_name)
def test_gradients_match_the_oracle(band):
    tensors = _qkv(3 * B + 5)
    weight = torch.randn(2, 3 * B + 5, 4, 8, generator=torch.Generator().manual_seed(9))
    ours = [tensor.clone().requires_grad_() for tensor in tensors]
    (gathered_attention(*ours, band) * weight).sum().backward()
    theirs = [tensor.double().requires_grad_() for tensor in tensors]
    (attention(*theirs, pattern(band, 3 * B + 5)) * weight).sum().backward()
    for mine, reference in zip(ours, theirs, strict=True):
        assert (mine.grad - reference.grad).abs().max() <= 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("band", [Band("sliding", 90), Band("block", 90), Band("block", 30, 3)], ids=_name)
def test_a_band_that_covers_everything_is_dense_attention(band, dtype):
    query, key, value = _qkv(90, kv_heads=4, dtype=dtype)
    dense = F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)
    bound = 1e-10 if dtype is torch.float64 else 1e-5
    assert (gathered_attention(query, key, value, band) - dense).abs().max() <= bound
    assert torch.equal(attend_in_band(query, key, value, None, band), dense)


def test_a_wide_two_sided_band_is_bidirectional_attention():
    query, key, value = _qkv(40, kv_heads=4)
    dense = F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
    result = attend_in_band(query, key, value, None, Band("sliding", 80, causal=False))
    assert torch.equal(result, dense)


@pytest.mark.parametrize("band", [b for b in BANDS if b.causal], ids=_name)
def test_nothing_leaks_from_the_future(band):
    length = 3 * B + 5
    query, key, value = _qkv(length)
    before = gathered_attention(query, key, value, band)
    for t in (0, B - 1, B, length // 2, length - 2):
        noise = _qkv(length, seed=t + 1)
        later = torch.arange(length)[:, None] > t
        changed = [torch.where(later, new, old) for new, old in zip(noise, (query, key, value), strict=True)]
        after = gathered_attention(*changed, band)
        assert (after - before)[:, : t + 1].abs().max() <= 1e-6
        for tensor in changed:
            tensor.requires_grad_()
        gathered_attention(*changed, band)[:, t].sum().backward()
        for tensor in changed:
            assert tensor.grad[:, :, t + 1 :].abs().max() == 0


def test_bfloat16_is_close_to_float64():
    query, key, value = _qkv(131, dtype=torch.bfloat16)
    band = Band("sliding", 16)
    exact = attention(query, key, value, pattern(band, 131))
    result = gathered_attention(query, key, value, band).double()
    assert (result - exact).norm() / exact.norm() <= 1e-2


@pytest.mark.parametrize("band", BANDS, ids=_name)
def test_rows_padded_on_the_left_are_computed_as_if_they_were_alone(band):
    length, pad = 3 * B + 5, 5
    query, key, value = _qkv(length, batch=2)
    padding = torch.ones(2, length, dtype=torch.bool)
    padding[1, :pad] = False
    result = attend_in_band(query, key, value, PositionMask(0, padding, None), band)
    alone = attend_in_band(*(x[1:, :, pad:] for x in (query, key, value)), None, band)
    assert (result[1:, pad:] - alone).abs().max() <= 1e-5


def test_a_prepared_mask_is_refused():
    query, key, value = _qkv(4)
    prepared = torch.ones(2, 1, 4, 4, dtype=torch.bool)
    with pytest.raises(NotApplicable, match="2-D mask"):
        attend_in_band(query, key, value, prepared, Band("sliding", 2))


@pytest.mark.parametrize("band", BANDS, ids=_name)
@pytest.mark.parametrize("length", [64, 128, 300, 512])
def test_flex_tiles_cover_the_pattern_and_nothing_else(band, length):
    """Every tile that has a visible pair is listed, empty ones are not, full ones are marked full."""
    tiles = band_block_mask(band, length, torch.device("cpu"))
    count = -(-length // 128)
    padded = torch.zeros(count * 128, count * 128, dtype=torch.bool)
    padded[:length, :length] = band.visible(torch.arange(length)[:, None], torch.arange(length))
    real = padded.unflatten(0, (count, 128)).unflatten(2, (count, 128)).transpose(1, 2)
    touched, full = real.any((-1, -2)), real.all((-1, -2))
    listed = [torch.zeros(count, count, dtype=torch.bool) for _ in range(2)]
    lists = (
        (tiles.kv_num_blocks, tiles.kv_indices),
        (tiles.full_kv_num_blocks, tiles.full_kv_indices),
    )
    for table, (numbers, indices) in zip(listed, lists, strict=True):
        for row in range(count):
            table[row, indices[0, 0, row, : numbers[0, 0, row]].long()] = True
    assert torch.equal(listed[0] | listed[1], touched)
    assert torch.equal(listed[1], full)
    assert not (listed[0] & listed[1]).any()


def test_tiles_do_not_grow_with_the_length():
    executed = [
        float(
            (mask := band_block_mask(Band("sliding", 256), n, torch.device("cpu"))).kv_num_blocks.sum()
            + mask.full_kv_num_blocks.sum()
        )
        / n
        for n in (4096, 16384)
    ]
    assert executed[1] == pytest.approx(executed[0], rel=0.05)


def test_flex_eager_matches_the_oracle():
    """The block mask drives FlexAttention to the right answer (uncompiled here, on the CPU)."""
    from torch.nn.attention.flex_attention import flex_attention

    band = Band("sliding", 40)
    query, key, value = _qkv(200, kv_heads=4)
    mask = band_block_mask(band, 200, torch.device("cpu"))
    with pytest.warns(UserWarning, match="without torch.compile"):
        result = flex_attention(query, key, value, block_mask=mask).transpose(1, 2)
    assert (result - attention(query, key, value, pattern(band, 200))).abs().max() <= 1e-5


@pytest.mark.slow
def test_time_grows_linearly_on_the_cpu():
    """Least-squares slope of log time on log length: at most 1.25, dense at least 1.75."""
    import math
    import time

    lengths = (2048, 4096, 8192, 16384)

    def slope(compute) -> float:
        times = []
        for length in lengths:
            q, k, v = (torch.randn(1, 2, length, 64) for _ in range(3))
            best = math.inf
            for _ in range(5):
                start = time.perf_counter()
                compute(q, k, v)
                best = min(best, time.perf_counter() - start)
            times.append(best)
        x = torch.tensor(lengths).log2().double()
        y = torch.tensor(times).log2().double()
        x, y = x - x.mean(), y - y.mean()
        return float((x * y).sum() / (x * x).sum())

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        band = Band("sliding", 128)
        dense = slope(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True))
        local = slope(lambda q, k, v: gathered_attention(q, k, v, band))
    finally:
        torch.set_num_threads(threads)
    assert dense >= 1.75, "the machine is too noisy for this measurement"
    assert local <= 1.25


# torch's own compiler still calls what torch deprecates
compiles = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("band", [Band("sliding", 256), Band("block", 100, 2)], ids=_name)
def test_flex_compiled_on_the_cpu_matches_gathered(band):
    for length in (1024, 1500):
        query, key, value = _qkv(length)
        with torch.no_grad():
            flex = flex_attention_in_band(query, key, value, band)
        assert (flex - gathered_attention(query, key, value, band)).abs().max() <= 1e-5


# --- on a GPU -------------------------------------------------------------------------------------

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@compiles
@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("band", [Band("sliding", 256), Band("block", 128), Band("block", 100, 2)], ids=_name)
def test_compiled_flex_matches_gathered(band, kv_heads):
    for length in (1024, 1500):
        generator = torch.Generator("cuda").manual_seed(0)
        make = {"generator": generator, "device": "cuda", "dtype": torch.bfloat16}
        query = torch.randn(2, 4, length, 64, **make)
        key, value = (torch.randn(2, kv_heads, length, 64, **make) for _ in range(2))
        flex = flex_attention_in_band(query, key, value, band).double()
        exact = gathered_attention(query.double(), key.double(), value.double(), band)
        assert (flex - exact).norm() / exact.norm() <= 1e-2


@compiles
@pytest.mark.gpu
@needs_cuda
def test_a_long_prefill_is_linear_and_beats_dense_on_cuda():
    """C6 and the 8x of C6's H100 bar, with events, 32 heads of 128, bfloat16."""
    from triton.testing import do_bench

    band, times = Band("sliding", 256), {}
    for length in (8192, 16384, 32768):
        q, k, v = (torch.randn(1, 32, length, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        flex_attention_in_band(q, k, v, band)
        times[length] = do_bench(lambda: flex_attention_in_band(q, k, v, band))  # noqa: B023
    slope = (torch.tensor(times[32768] / times[8192]).log2() / 2).item()
    dense = do_bench(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True))
    assert slope <= 1.15
    assert dense / times[32768] >= 8


@compiles
@pytest.mark.gpu
@needs_cuda
def test_memory_at_32k_is_far_below_materialised_scores():
    q, k, v = (torch.randn(1, 4, 32768, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    flex_attention_in_band(q, k, v, Band("sliding", 256))  # compiles, builds the block mask
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    flex_attention_in_band(q, k, v, Band("sliding", 256))
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - base
    assert peak <= 0.02 * 4 * 32768**2 * 2 * 2
