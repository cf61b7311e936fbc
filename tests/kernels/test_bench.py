"""The benchmark: what it is asked for, the numbers of what it times, and what it says of them."""

from __future__ import annotations

import contextlib
import copy
import csv
import functools
import importlib.util
import io
import itertools
import json

import pytest
import torch
from torch.nn import functional

from harness.errors import ConfigError, NotApplicable, NumericalFailure
from harness.kernels import bench, bench_layers
from harness.kernels.bench import Case, Timing
from harness.kernels.bench_layers import COMPILED, SCHEMES

SHAPE, OTHER = (1, 4096, 4096), (16, 4096, 11008)
EAGER = [name for name in SCHEMES if not name.endswith(COMPILED)]
OURS = [name for name, scheme in SCHEMES.items() if scheme.peer_of is None]
needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao")


def timed(scheme: str, us: float, shape=SHAPE, kernel: str = "some kernel") -> Case:
    return Case(scheme, shape, Timing(float(us), us * 0.9, us * 1.25, kernel))


def test_by_default_everything_runs_that_is_not_compiled():
    assert bench.parse_schemes("") == EAGER
    assert bench.parse_schemes("", with_compiled=True) == list(SCHEMES)
    assert len(SCHEMES) == len(EAGER) + 4


def test_schemes_are_run_after_what_they_are_measured_against():
    assert bench.parse_schemes("tinygemm, w4a16-g128,tinygemm") == ["w4a16-g128", "tinygemm"]
    for name, scheme in SCHEMES.items():
        assert scheme.peer_of is None or scheme.peer_of in OURS[: list(SCHEMES).index(name)]


def test_names_of_schemes():
    found = bench.parse_schemes("torchao int4,fp8", with_compiled=True)
    assert found == ["fp8", "torchao-int4", "torchao-int4-compiled"]
    assert bench.parse_schemes("torchao-float8-compiled") == ["torchao-float8-compiled"]
    with pytest.raises(ConfigError, match=r"unknown schemes.*tinygem'"):
        bench.parse_schemes("tinygem")


def test_shapes():
    assert bench.parse_shapes("") == list(bench.SHAPES)
    assert {(128, 4096, 11008), (2048, 11008, 4096)} <= set(bench.SHAPES)
    assert {rows for rows, *_ in bench.parse_shapes("", "1, 16")} == {1, 16}
    assert bench.parse_shapes("3x64x128,5x8x9") == [(3, 64, 128), (5, 8, 9)]
    assert bench.parse_shapes("3x64x128,5x8x9", "5") == [(5, 8, 9)]


def test_what_is_no_shape():
    for shapes, rows in [("3x64", ""), ("axbxc", ""), ("0x8x8", ""), ("", "7"), ("", "x"), ("1x2x3x4", "")]:
        with pytest.raises(ConfigError, match="shape"):
            bench.parse_shapes(shapes, rows)


@pytest.mark.parametrize("wrong", [["--schemes", "none"], ["--shapes", "4096"], ["--rows", "7"]])
def test_a_wrong_command_line_ends_with_2(wrong):
    with pytest.raises(SystemExit, match=r"^2$"):
        bench.main(wrong)


def test_a_reason_is_one_short_line():
    assert bench_layers.one_line(NotApplicable("not here")) == "not here"
    assert bench_layers.one_line(RuntimeError("\n  first \nsecond")) == "RuntimeError: first"
    assert bench_layers.one_line(AssertionError()) == "AssertionError: no message"
    assert bench_layers.one_line(NotApplicable("x" * 500)) == "x" * 119 + "…"


CASES = [
    timed("bf16", 30), timed("w4a16-g128", 10), timed("w8a8", 20), timed("tinygemm", 12.5),
    timed("int_mm", 15), Case("torchao-int4", SHAPE, problem="refused"), timed("torchao-int8-dynamic", 20),
    timed("torchao-float8", 1),  # nothing to compare it with
    timed("bf16", 30, OTHER), timed("w4a16-g128", 10, OTHER), timed("tinygemm", 5, OTHER),
]  # fmt: skip


def test_peers_are_compared_at_their_own_shape():
    found = [(each.peer, each.ours, each.shape, each.ratio) for each in bench.comparisons(CASES)]
    assert found == [
        ("tinygemm", "w4a16-g128", SHAPE, 1.25),
        ("int_mm", "w8a8", SHAPE, 0.75),
        ("torchao-int8-dynamic", "w8a8", SHAPE, 1.0),
        ("tinygemm", "w4a16-g128", OTHER, 0.5),
    ]


def test_peers_that_are_ahead_are_listed_the_furthest_first():
    title, first, second = bench.summary(CASES)
    assert title == "A peer is ahead of ours in 2 of 4 comparisons (microseconds):"
    assert " ".join(first.split()) == "tinygemm (16, 4096, 11008) 5.0, w4a16-g128 10.0, ratio 0.50"
    assert second.endswith("15.0, w8a8 20.0, ratio 0.75 (without rounding and scales)")


def test_where_no_peer_is_ahead_it_is_said():
    assert bench.summary(CASES[:4]) == ["A peer is ahead of ours: in none of 1 comparisons."]
    assert bench.summary(CASES[:3]) == ["No peer was compared with ours."]


def test_what_was_left_out_and_what_failed_is_listed():
    cases = [
        Case("bf16", SHAPE, problem="broken", failed=True),
        Case("int_mm", SHAPE, problem="broken", failed=True),  # a peer's failure is its own
        *(Case(scheme, OTHER, problem=bench.LEFT_OUT) for scheme in ("bf16", "fp8")),
    ]
    failed, left_out, _ = bench.summary(cases)
    assert failed == f"Failed: bf16 at {SHAPE}: broken"
    assert left_out == f"{bench.LEFT_OUT}: {OTHER} bf16, fp8"


def test_lines_of_the_table():
    assert bench.text_line(timed("bf16", 30), 30, None).split() == ["bf16", "30.0", "some", "kernel"]
    ours = bench.text_line(timed("w8a8", 20), 30, None)
    assert ours.split() == ["w8a8", "20.0", "(1.50x)", "some", "kernel"]
    peer = bench.text_line(timed("int_mm", 15), 30, 20)
    assert peer.endswith("(2.00x)  some kernel; 0.75 of the time of w8a8 (without rounding and scales)")
    assert "of the time" not in bench.text_line(timed("tinygemm", 15), None, None)
    assert bench.text_line(Case("tinygemm", SHAPE, problem="why"), 30, 20).split() == ["tinygemm", "why"]


def test_comma_separated_values():
    kernel = "unpack, triton w8a8"
    lines = [",".join(bench.COLUMNS), bench.csv_line(bench.record(timed("w4a8", 20, kernel=kernel), 30.0))]
    lines.append(bench.csv_line(bench.record(timed("tinygemm", 20), None)))
    ours, peer = csv.DictReader(io.StringIO("\n".join(lines)))
    assert ours == {
        "scheme": "w4a8", "rows": "1", "in": "4096", "out": "4096", "median_us": "20.00", "p10_us": "18.00",
        "p90_us": "25.00", "speed_up": "1.50", "kernel": kernel, "peer_of": "",
    }  # fmt: skip
    assert (peer["peer_of"], peer["speed_up"]) == ("w4a16-g128", "")


def test_the_run_begins_with_bf16_and_leaves_out_what_comes_too_late(monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(bench.time, "monotonic", lambda: float(next(clock)))
    run = bench.run([SHAPE, OTHER], ["w8a8", "bf16"], lambda scheme, shape: timed(scheme, 1, shape), 3)
    cases = list(run)
    found = [(case.scheme, case.shape) for case in cases]
    assert found == [(scheme, shape) for shape in (SHAPE, OTHER) for scheme in ("bf16", "w8a8")]
    assert [case.problem for case in cases] == [None, None, bench.LEFT_OUT, bench.LEFT_OUT]


def without_a_device(monkeypatch, measured):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a stand-in")
    monkeypatch.setattr(bench, "measured", measured)


def test_a_whole_run_is_printed_and_written(monkeypatch, capsys, tmp_path):
    us = {"bf16": 30.0, "w4a16-g128": 10.0, "tinygemm": 5.0}

    def measured(scheme, shape, device):
        return timed(scheme, us[scheme], shape) if scheme in us else Case(scheme, shape, problem="refused")

    without_a_device(monkeypatch, measured)
    path = tmp_path / "found.json"
    chosen = ["--schemes", "w4a16-g128,tinygemm,torchao-int4", "--shapes", "2x128x64", "--json", str(path)]
    bench.main(chosen)
    out = capsys.readouterr().out
    assert out.startswith("device a stand-in, torch ")
    assert "(2, 128, 64)         bf16" in out
    assert "0.50 of the time of w4a16-g128" in out
    assert "A peer is ahead of ours in 1 of 1 comparisons" in out
    found = json.loads(path.read_text())
    assert (found["device"], found["torch"]) == ("a stand-in", torch.__version__)
    _, _, tinygemm, int4 = found["cases"]
    assert tinygemm == {
        "scheme": "tinygemm", "rows": 2, "in": 128, "out": 64, "median_us": 5.0, "p10_us": 4.5,
        "p90_us": 6.25, "speed_up": 6.0, "kernel": "some kernel", "peer_of": "w4a16-g128", "problem": None,
    }  # fmt: skip
    assert (int4["median_us"], int4["kernel"], int4["problem"]) == (None, None, "refused")
    bench.main([*chosen, "--csv"])
    out, err = capsys.readouterr()
    assert [line.split(",")[0] for line in out.splitlines()[1:]] == ["scheme", "w4a16-g128", "tinygemm"]
    assert "torchao-int4 at (2, 128, 64): refused" in err
    assert "A peer is ahead" in err


def test_a_lost_device_ends_the_run_with_what_there_is(monkeypatch, capsys, tmp_path):
    def measured(scheme, shape, device):
        if scheme == "w8a16":
            raise bench.DeviceLost("the device no longer works after w8a16")
        return timed(scheme, 1.0, shape)

    without_a_device(monkeypatch, measured)
    path = tmp_path / "found.json"
    with pytest.raises(SystemExit, match="no longer works after w8a16"):
        bench.main(["--shapes", "2x128x64", "--json", str(path)])
    assert "No peer was compared" in capsys.readouterr().out
    assert [case["scheme"] for case in json.loads(path.read_text())["cases"]][-1] == "nf4-g64"


@pytest.mark.parametrize(("failing", "status"), [("tinygemm", None), ("w8a8", 1)])
def test_one_of_ours_that_fails_is_the_exit_status(failing, status, monkeypatch):
    def measured(scheme, shape, device):
        return Case(scheme, shape, problem="wrong", failed=scheme == failing)

    without_a_device(monkeypatch, measured)
    with pytest.raises(SystemExit, match=r"^1$") if status else contextlib.nullcontext():
        bench.main(["--shapes", "2x128x64"])


@pytest.mark.parametrize("error", [RuntimeError("first\nsecond"), NotApplicable("no"), NumericalFailure("x")])
def test_whatever_a_case_raises_is_its_problem(error, monkeypatch):
    problem, failed = bench_layers.one_line(error), not isinstance(error, NotApplicable)

    def time_linear(*_):
        raise error

    monkeypatch.setattr(bench, "time_linear", time_linear)
    monkeypatch.setattr(bench, "_works", lambda device: True)
    device = torch.device("cpu")
    assert bench.measured("w8a8", SHAPE, device) == Case("w8a8", SHAPE, None, problem, failed)
    monkeypatch.setattr(bench, "_works", lambda device: False)
    with pytest.raises(bench.DeviceLost, match=f"after w8a8 .*{problem}"):
        bench.measured("w8a8", SHAPE, device)


# What rounding loses of a Gaussian weight, relative; a wrong grid loses more.
LOST = {
    "bf16": 0.002, "w4a16-g128": 0.12, "w4a16-g64": 0.11, "w3a16-g128": 0.25, "w2a16-g64": 0.6,
    "nf4-g64": 0.1, "w8a16": 0.011, "w8a8": 0.011, "w4a8": 0.2, "llm-int8": 0.011, "fp8": 0.04,
    "tinygemm": 0.12, "int_mm": 0.011, "scaled_mm": 0.04, "torchao-int8-weight-only": 0.011,
    "torchao-int8-dynamic": 0.011,
}  # fmt: skip


def made(scheme: str, rows: int = 20, out: int = 192, columns: int = 1024):
    """A layer, an input, the matrix it is compared with and the weight it was made of, on the CPU."""
    if scheme.startswith("torchao"):
        pytest.importorskip("torchao")
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out, columns, generator=generator) / columns**0.5
    layer = SCHEMES[scheme].make(weight)
    x = bench_layers.make_input(SCHEMES[scheme], rows, columns, torch.device("cpu"), generator)
    return layer, x, SCHEMES[scheme].reference(layer, weight), weight


@torch.no_grad()
@pytest.mark.parametrize("scheme", LOST)
def test_layers_multiply_with_the_matrix_they_are_compared_with(scheme):
    layer, x, dense, weight = made(scheme)
    assert 1e-4 < float((dense.float() - weight).norm() / weight.norm()) < LOST[scheme]
    bench_layers.check(scheme, layer, x, dense)
    # And nothing else: a matrix with two rows exchanged is noticed.
    with pytest.raises(NumericalFailure, match=f"{scheme} at"):
        bench_layers.check(scheme, layer, x, dense.roll(1, 0))


@torch.no_grad()
@pytest.mark.parametrize("scheme", LOST)
def test_copies_have_weights_of_their_own(scheme):
    def places(tensors):
        for each in tensors:
            inside = each.__tensor_flatten__()[0] if hasattr(each, "__tensor_flatten__") else ()
            yield from [getattr(each, name).data_ptr() for name in inside] or [each.data_ptr()]

    layer, x, *_ = made(scheme)
    twin = copy.deepcopy(layer)
    inputs = bench_layers.arguments(layer, x)
    assert torch.equal(layer(*inputs), twin(*inputs))
    tensors, others = ([*each.parameters(), *each.buffers()] for each in (layer, twin))
    assert not set(places(tensors)) & set(places(others))


def test_every_scheme_that_a_cpu_can_make_is_among_them():
    rest = set(EAGER) - {"torchao-int4", "torchao-float8"}
    assert set(LOST) == {name for name in rest if not name.startswith("2:4")}


def test_outliers_are_in_the_input_of_one_scheme():
    peaks = made("llm-int8")[1].abs().amax(0)
    assert (peaks > 5).nonzero()[:, 0].tolist() == [0, 1000]
    assert [name for name, scheme in SCHEMES.items() if scheme.has_outliers] == ["llm-int8"]


@needs_torchao
def test_the_4_bit_grid_is_that_of_torchao():
    from torchao.quantization import quant_primitives

    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    weight[3, :128] = 0.0  # a group without a range
    codes, scales, zeros = bench_layers.int4_grid(weight)
    dense, block = weight.bfloat16(), (1, 128)
    theirs = quant_primitives._choose_qparams_affine_tinygemm(
        dense, quant_primitives.MappingType.ASYMMETRIC, block, torch.int32, 0, 15,
        scale_dtype=torch.bfloat16, zero_point_dtype=torch.bfloat16,
    )  # fmt: skip
    assert torch.equal(scales, theirs[0].reshape(64, -1))
    assert torch.equal(zeros, theirs[1].reshape(64, -1))
    rounded = quant_primitives._quantize_affine_tinygemm(dense, block, *theirs, torch.int32, 0, 15)
    assert torch.equal(codes.int(), rounded)


def test_groups_that_do_not_divide_are_refused():
    with pytest.raises(NotApplicable, match="groups of 128 do not divide 192"):
        SCHEMES["tinygemm"].make(torch.randn(64, 192))


@needs_torchao
@pytest.mark.parametrize("name", ["int8-weight-only", "int8-dynamic", "int4", "float8"])
def test_torchao_is_configured_as_the_plugin_does(name, monkeypatch):
    from harness_plugins.external import torchao as plugin
    from torchao import quantization

    given = []
    monkeypatch.setattr(quantization, "quantize_", lambda model, config: given.append(config))
    expected, _ = plugin.configuration(plugin.TorchaoOptions(scheme=name))
    with pytest.raises(NotApplicable, match="leaves a weight"):  # nothing was quantized here
        bench_layers.TorchaoLinear(name, torch.randn(32, 128), compiled=False)
    assert given == [expected]


@needs_torchao
def test_what_torchao_makes_on_a_gpu_alone_is_refused_elsewhere():
    for name in ("int4", "float8"):
        with pytest.raises(NotApplicable, match="needs a CUDA device"):
            SCHEMES[f"torchao-{name}"].make(torch.randn(64, 256))


def test_an_absent_torchao_is_a_reason(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NotApplicable, match="torchao is not installed"):
        SCHEMES["torchao-int8-dynamic"].make(torch.randn(64, 256))


@needs_torchao
def test_the_bytes_of_a_wrapping_tensor_are_those_inside():
    layer, *_ = made("torchao-int8-weight-only")
    codes = 192 * 1024
    assert codes <= bench_layers.held_bytes(layer) < 1.02 * codes
    assert bench_layers.held_bytes(made("bf16")[0]) == 2 * codes


@needs_torchao
@torch.no_grad()
@pytest.mark.parametrize("name", ["int8-weight-only", "int8-dynamic"])
def test_copies_of_a_compiled_layer_share_what_is_compiled(name, monkeypatch):
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    scheme = f"torchao-{name}{COMPILED}"
    layer, x, dense, _ = made(scheme)
    bench_layers.check(scheme, layer, x, dense)
    for _ in range(12):  # more than the compiler's limit
        assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert len(compiled) == 1
    assert layer.kernel_for(1, x.dtype) == f"torchao {name} compiled"


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_is_timed_or_says_why_not(scheme):
    case = bench.measured(scheme, (32, 1024, 1024), torch.device("cuda"))
    if scheme in OURS:
        assert not case.failed, case.problem
    assert (case.timing is None) == bool(case.problem)
    if case.timing is not None:
        assert 0 < case.timing.low_us <= case.timing.median_us <= case.timing.high_us


class Hostile(bench_layers._Peer):
    """Waits for the device, or raises in a capture alone."""

    def __init__(self, weight, *, waits):
        super().__init__(weight, "hostile")
        self.register_buffer("dense", weight.bfloat16())
        self.waits = waits

    def forward(self, x):
        if self.waits:
            x = x * float(x[0, 0] / x[0, 0])
        elif torch.cuda.is_current_stream_capturing():
            raise RuntimeError("not in a graph")
        return functional.linear(x, self.dense)

    def dequantize(self):
        return self.dense


@pytest.mark.gpu
@pytest.mark.parametrize("waits", [True, False])
@pytest.mark.parametrize("peer_of", ["w8a8", None])  # guarded, and straight into the capture
def test_a_layer_that_cannot_be_captured_spoils_nothing(peer_of, waits, monkeypatch):
    scheme = bench_layers.Scheme(functools.partial(Hostile, waits=waits), peer_of)
    monkeypatch.setitem(SCHEMES, "hostile", scheme)
    device, shape, stream = torch.device("cuda"), (32, 1024, 1024), torch.cuda.current_stream()
    assert "captured: " in (bench.measured("hostile", shape, device).problem or "")
    assert torch.cuda.current_stream() == stream
    for after in ("bf16", "w8a8", "w4a16-g128"):
        assert bench.measured(after, shape, device).timing is not None
