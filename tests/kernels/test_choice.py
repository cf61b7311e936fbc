"""Which kernel runs where, and that what runs without CUDA is the reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from harness.errors import NotApplicable
from harness.kernels import bench, fp8, int8, reference, selection, weight_only
from harness.kernels.selection import (
    RULES,
    Launch,
    Rule,
    rows_per_program,
    select,
    split_blocks,
    takes_matrix,
    takes_vector,
    tiles_abreast,
    tiles_per_step,
)
from harness.kernels.stored import Form
from harness.nn.codebook import CodebookLinear
from harness.nn.fp8 import Fp8Linear
from harness.nn.packing import pack_weight
from harness.nn.quantized import QuantizedLinear
from harness.nn.quantizer import quantize_activation, quantize_weight


def packed(bits: int = 4, shape: tuple[int, int] = (64, 256), **options):
    return pack_weight(quantize_weight(torch.randn(shape), bits=bits, sym=bits == 8, **options))


@pytest.fixture
def with_triton(monkeypatch):
    """As on a CUDA machine: only the choice is made, nothing runs."""
    monkeypatch.setattr(weight_only, "has_triton", lambda device: True)
    monkeypatch.setattr(weight_only, "runs_vector", lambda device: True)
    monkeypatch.setattr(weight_only, "runs_matrix", lambda device: True)
    monkeypatch.setattr(int8, "has_triton", lambda device: True)


def test_without_cuda_weights_are_dequantized():
    weight = packed(group_size=128)
    assert weight_only.choose(weight, 1, torch.float32) == "dequantize+matmul"
    x, bias = torch.randn(3, 256), torch.randn(64)
    expected = reference.weight_only_linear(x, weight, bias)
    assert torch.equal(weight_only.linear(x, weight, bias), expected)
    assert torch.equal(weight_only.dequantize(weight, torch.float32), reference.dequantize(weight))


@pytest.mark.usefixtures("with_triton")
@pytest.mark.parametrize(
    ("bits", "rows", "kernel"),
    [
        (4, 1, "triton w4a16 vector"),
        (4, 2, "triton w4a16 few"),
        (4, 9, "triton w4a16 fused"),
        (4, 128, "triton w4a16 fused"),
        (4, 129, "triton dequantize+matmul"),
        (8, 1, "triton w8a16 wide"),
        (8, 16, "triton w8a16 fused"),
        (3, 1, "triton w3a16 vector"),
        (3, 2, "triton w3a16 fused"),
        (3, 129, "triton dequantize+matmul"),
        (2, 16, "triton w2a16 fused"),
    ],
)
def test_the_kernel_follows_from_bits_and_rows(bits, rows, kernel):
    options = {} if bits == 8 else {"group_size": 128}
    assert weight_only.choose(packed(bits, **options), rows, torch.bfloat16) == kernel


@pytest.mark.usefixtures("with_triton")
def test_layouts_that_triton_cannot_read_fall_back():
    # A 3-bit tile of 16 columns has no whole word of its upper plane.
    narrow = packed(3, (8, 48), group_size=16)
    assert weight_only.choose(narrow, 1, torch.bfloat16) == "dequantize+matmul"
    # Groups of 12 columns straddle the tiles.
    assert weight_only.choose(packed(4, (8, 48), group_size=12), 1, torch.bfloat16) == "dequantize+matmul"
    assert weight_only.choose(packed(group_size=128), 1, torch.float64) == "dequantize+matmul"


@pytest.mark.usefixtures("with_triton")
def test_zero_points_that_are_no_whole_numbers_run_the_same_kernels():
    free = replace(packed(4, group_size=128), zeros=torch.zeros(2, 64, dtype=torch.float16))
    names = [weight_only.choose(free, rows, torch.bfloat16) for rows in (1, 16, 512)]
    assert names == ["triton w4a16 wide", "triton w4a16 fused", "triton dequantize+matmul"]
    # The kernel for float32 takes whole ones.
    assert weight_only.choose(free, 16, torch.float32) == "triton dequantize+matmul"
    assert weight_only.choose(packed(4, group_size=128), 16, torch.float32) == "triton w4a32 small"


def codebook(outliers: int = 0, **options) -> CodebookLinear:
    return CodebookLinear(256, 64, bits=4, outliers=outliers, **options)


@pytest.mark.usefixtures("with_triton")
@pytest.mark.parametrize(
    ("layer", "rows", "kernel"),
    [
        (codebook(group_size=64), 1, "triton t4a16 gemv"),
        (codebook(group_size=64), 16, "triton t4a16 fused"),
        (codebook(group_size=64), 17, "triton dequantize+matmul"),
        (codebook(outliers=3), 1, "triton t4a16 gemv"),
        (codebook(outliers=3), 2, "triton dequantize+matmul"),
        (codebook(group_size=12), 1, "gather+matmul"),
    ],
)
def test_places_in_a_table(layer, rows, kernel):
    assert layer.kernel_for(rows, torch.bfloat16) == kernel


def test_without_cuda_places_in_a_table_are_gathered():
    assert codebook(group_size=64).kernel_for(1, torch.float32) == "gather+matmul"


def form_of(bits: int = 4, group: int = 128, **options) -> Form:
    plain = {"is_table": False, "has_float_zeros": False, "has_outliers": False}
    return Form(
        bits, tile=min(128, group), group_columns=group, columns=4096, out_features=11008, **plain | options
    )


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_rules_are_launches_that_a_kernel_takes(rule):
    launch = rule.launch
    sizes = [launch.block_n, launch.block_m, launch.words, launch.warps]
    assert all(size > 0 and size & (size - 1) == 0 for size in sizes)
    if launch.kernel in ("gemv", "wide", "vector"):
        assert launch.block_m == 1
    elif launch.kernel == "few":  # a program's warps share its rows, sixteen of the matrix at once
        assert launch.block_n % 16 == 0
        assert rule.up_to <= launch.block_m <= 32
    else:  # what tensor cores multiply at once: 64 rows for every four warps
        assert launch.block_m >= 16
        assert launch.block_n * 4 % (64 * launch.warps) == 0
    if launch.kernel == "small":
        assert 3 not in rule.bits
        assert not rule.table


@pytest.mark.parametrize(
    ("form", "takes"),
    [
        (form_of(), True),
        (form_of(2), True),
        (form_of(group=64), True),
        (form_of(2, group=64), False),  # four words of a tile: half an operand
        (form_of(group=32), False),
        (form_of(8), False),  # not exact on top of 128
        (form_of(3), True),
        (form_of(is_table=True), False),
        (form_of(has_float_zeros=True), False),
        (form_of(is_table=True, has_outliers=True), False),
        (replace(form_of(), columns=1 << 16), False),
    ],
    ids=str,
)
def test_what_the_kernel_for_vectors_takes(form, takes):
    assert takes_vector(form) == takes
    launch = select(form, 1, 16)
    assert (launch is not None and launch.kernel == "vector") == takes
    without = select(form, 1, 16, vector=False)
    assert without is not None
    assert without.kernel == ("gemv" if form.is_table else "wide")
    assert select(form, 1, 32) == without, "float32 has no exact tensor cores"


def test_one_row_of_many_outputs_has_fewer_words_on_their_way():
    few, many = (replace(form_of(), out_features=size) for size in (8191, 8192))
    assert [select(form, 1, 16).stages for form in (few, many)] == [4, 2]


def test_sixteen_rows_are_read_again_where_there_are_many_outputs():
    few, many = (replace(form_of(), out_features=size) for size in (8191, 8192))
    assert [select(form, 8, 16).kernel for form in (few, many)] == ["few", "few"]
    assert [select(form, 16, 16).kernel for form in (few, many)] == ["fused", "few"]
    assert select(many, 17, 16, matrix=False).kernel == "fused"
    assert select(many, 8, 16, vector=False).kernel == "fused"


def test_small_matrices_are_left_to_other_kernels():
    small, large = (replace(form_of(), columns=size, out_features=4096) for size in (2047, 2048))
    assert [select(small, rows, 16) and select(small, rows, 16).kernel for rows in (64, 512)] == [
        "fused",
        None,
    ]
    assert [select(large, rows, 16).kernel for rows in (64, 512)] == ["matrix", "matrix"]
    assert takes_matrix(small)


def test_the_blocks_of_hoppers_kernel_grow_with_the_rows():
    few, many, most = (replace(form_of(), out_features=size) for size in (8191, 8192, 16384))

    def blocks(form, rows):
        launch = select(form, rows, 16)
        assert launch.kernel == "matrix"
        return launch.block_n, launch.block_m

    assert [blocks(few, rows) for rows in (17, 33, 65, 129, 3072)] == [
        (128, 32), (128, 64), (128, 128), (128, 256), (128, 256)
    ]  # fmt: skip
    assert [blocks(many, rows) for rows in (17, 33, 65, 129, 4096)] == [
        (256, 32), (256, 64), (128, 128), (128, 256), (128, 256)
    ]  # fmt: skip
    assert [blocks(most, rows) for rows in (17, 33, 65)] == [(128, 32), (128, 64), (128, 128)]
    assert select(few, 3073, 16) is None
    assert select(many, 4097, 16) is None
    assert select(few, 16, 16).kernel == "fused"


@pytest.mark.parametrize(
    ("form", "takes"),
    [
        (form_of(), True),
        (form_of(group=256), True),
        (form_of(group=64), False),  # tiles of half the columns
        (form_of(2), False),
        (form_of(3), False),
        (form_of(8), False),
        (form_of(is_table=True), False),
        (form_of(has_float_zeros=True), False),
    ],
    ids=str,
)
def test_what_the_kernel_for_many_rows_takes(monkeypatch, form, takes):
    assert takes_matrix(form) == takes
    fused = Launch("fused", block_n=64, block_m=16)
    rules = (Rule((4,), 512, Launch("matrix", 256, 128, warps=8)), Rule((2, 3, 4, 8), 512, fused))
    monkeypatch.setattr(selection, "RULES", (*rules, Rule((2, 3, 4, 8), 512, fused, table=True)))
    assert (select(form, 512, 16).kernel == "matrix") == takes
    assert select(form, 512, 16, matrix=False).kernel == "fused"


@pytest.mark.parametrize(
    ("blocks", "tiles", "expected"),
    [
        (132, 32, (132, 1)),
        (264, 32, (264, 1)),
        (64, 32, (0, 2)),
        (43, 32, (0, 3)),
        (172, 32, (132, 3)),  # forty of the second turn fill it in three parts
        (131, 32, (131, 1)),
        (86, 32, (86, 1)),  # two turns of a third take longer
        (688, 32, (660, 4)),
        (16, 1, (16, 1)),  # nothing to share
    ],
)
def test_blocks_that_fill_a_device(blocks, tiles, expected):
    assert split_blocks(blocks, tiles, 132) == expected


@pytest.mark.parametrize("missing", [None, "gluon_few", "gluon_sparse_rows", "gluon_vector"])
def test_a_triton_without_gluon_has_other_kernels(monkeypatch, missing):
    """It is an experimental part: what is imported may be gone in another version."""

    def found(name):
        if name.endswith(f".{missing}"):
            raise ImportError("cannot import name 'mma_v2'")

    monkeypatch.setattr(weight_only, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(weight_only.importlib, "import_module", found)
    weight_only._has_gluon.cache_clear()
    try:
        assert weight_only.runs_vector(torch.device("cuda")) == (missing is None)
    finally:
        weight_only._has_gluon.cache_clear()


@pytest.mark.parametrize(("capability", "runs"), [((8, 9), False), ((9, 0), True), ((10, 0), False)])
def test_instructions_that_one_generation_has(monkeypatch, capability, runs):
    monkeypatch.setattr(weight_only, "_capability", lambda device: capability)
    monkeypatch.setattr(weight_only, "_has_gluon", lambda *modules: True)
    assert weight_only.runs_matrix(torch.device("cuda")) == runs


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("is_table", [False, True])
def test_one_choice_for_all_rows(bits, is_table):
    """The first rule that reaches so far; from some number of rows on none does."""
    form = form_of(bits, is_table=is_table)
    launches = [select(form, rows, 16) for rows in (*range(1, 300), 4096, 4097)]
    assert launches[0] is not None
    assert launches[0].kernel == ("gemv" if is_table else "vector" if bits < 8 else "wide")
    assert launches[-1] is None
    written_out = [launch is None for launch in launches]
    assert written_out == sorted(written_out), "never back to a kernel"
    for rows, launch in enumerate(launches, 1):
        assert launch is None or launch.kernel != "fused" or rows <= launch.block_m
    others = [select(form, rows, 16, matrix=False) for rows in (128, 129)]
    assert [launch is not None for launch in others] == [not is_table, False]


@pytest.mark.parametrize(
    ("bits", "group", "words", "least", "tiles"),
    [
        (4, 128, 16, 1, 1),
        (4, 64, 16, 1, 1),  # stays inside its group
        (4, 64, 16, 16, 2),  # a product takes no fewer words
        (4, 4096, 32, 1, 2),
        (3, 4096, 16, 1, 1),
        (3, 128, 16, 16, 2),
        (2, 128, 16, 1, 1),
        (8, 128, 16, 16, 1),
        (4, 384, 64, 1, 1),  # three tiles a group: no power of two of them
    ],
)
def test_tiles_of_a_step(bits, group, words, least, tiles):
    assert tiles_per_step(form_of(bits, group), words, least) == tiles


def test_narrow_steps_take_more_rows():
    launch = Launch("gemv", block_n=64, words=16)
    assert rows_per_program(form_of(4, 128), launch, 1) == 64
    assert rows_per_program(form_of(4, 32), launch, 1) == 256
    assert rows_per_program(form_of(8, 128), launch, 1) == 64


def test_a_layer_says_where_it_has_come_to(monkeypatch):
    devices: list[torch.device] = []
    monkeypatch.setattr(weight_only, "make_ready", devices.append)
    quantized = quantize_weight(torch.randn(64, 256), bits=4, sym=False, group_size=128)
    QuantizedLinear.from_weight(quantized).to("meta")
    codebook(group_size=64).to("meta")
    assert [device.type for device in devices] == ["cpu", "meta", "meta"]


@pytest.mark.usefixtures("with_triton")
def test_the_name_gives_the_width_of_the_activations():
    assert weight_only.choose(packed(group_size=128), 1, torch.float32) == "triton w4a32 wide"
    assert int8.choose(torch.device("cuda")) == "triton w8a8"


def test_int8_without_cuda_is_the_reference():
    weight = torch.randint(-127, 128, (40, 64), dtype=torch.int8)
    scale, bias, x = torch.rand(40), torch.randn(40), torch.randn(5, 64)
    codes, x_scale = quantize_activation(x)
    expected = reference.int8_linear(codes, x_scale, weight, scale, bias, x.dtype)
    assert torch.equal(int8.linear(x, weight, scale, bias), expected)
    assert int8.choose(x.device) == "_int_mm"


def test_the_benchmark_knows_its_schemes():
    weight = torch.randn(128, 256)
    for name, scheme in bench.SCHEMES.items():
        try:
            layer = scheme.make(weight)
        except NotApplicable:  # what only a device can build, or an absent package
            assert name.startswith(("2:4", "torchao"))
            continue
        assert (layer.in_features, layer.out_features) == (256, 128), name
    assert "bf16" in bench.SCHEMES


def test_steps_of_many_tiles_are_no_wider_than_the_matrix():
    assert tiles_abreast(form_of(4), 256) == 16
    assert tiles_abreast(form_of(4, 64), 256) == 32
    assert tiles_abreast(form_of(8), 256) == 8
    narrow = replace(form_of(4), columns=384)
    assert tiles_abreast(narrow, 256) == 4
    assert tiles_abreast(form_of(8), 16) == 1


def test_float8_products_are_named_for_their_rows(monkeypatch):
    layer = Fp8Linear(4096, 16)
    assert layer.kernel_for(8192, torch.bfloat16) == layer.kernel_name != "triton float8"
    monkeypatch.setattr(fp8, "runs_own", lambda device, dtype, rows, columns: rows >= 4096)
    monkeypatch.setattr(fp8, "choose", lambda device, dtype: "_scaled_mm")
    assert layer.kernel_for(8192, torch.bfloat16) == "triton float8"
    assert layer.kernel_for(512, torch.bfloat16) == "_scaled_mm"
    one_scale = Fp8Linear(4096, 16, a_gran="per-tensor-dynamic")
    assert one_scale.kernel_for(8192, torch.bfloat16) == "_scaled_mm"
    monkeypatch.setattr(fp8, "runs_own", lambda device, dtype, rows, columns: rows == 1)
    assert layer.kernel_name == one_scale.kernel_name == "triton float8"
