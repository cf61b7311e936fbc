"""From facts to sentences: each cause where the facts say so, and only there."""

from __future__ import annotations

import pytest

from harness.measure.ceilings import Ceilings
from harness.measure.verdict import judge
from harness.measure.verdict_facts import CellFacts, Ratio, VariantFacts, time_ratio
from harness.records import KernelUse, ModuleEffect, Record

CEILINGS = Ceilings(
    "a GPU", 1, {"matmul_bfloat16": 800e12, "read": 3e12, "launch": 5e-6, "graph_launch": 1.2e-6}
)
NVJET, FLASH = "nvjet_tst_64x8_64x16", "flash_fwd_splitkv_kernel"


def latency(value, mode="graph", note=None, phase="decode"):
    return Record(
        f"{phase}_latency", value, "s", lower=value * 0.99, upper=value * 1.01, mode=mode, note=note
    )


def cell(decode_s=1e-3, kernels=(("gemm", NVJET, 100, 0.9e-3),), *, mode="graph", note=None, phase="decode",
         **values):  # fmt: skip
    records = {f"{phase}_latency": latency(decode_s, mode, note, phase), "weight_bytes": 1000.0, **values}
    total = sum(seconds for *_, seconds in kernels)
    return CellFacts(
        {
            name: value if isinstance(value, Record) else Record(name, value, "1")
            for name, value in records.items()
        },
        tuple(
            KernelUse(phase, name, family, calls, seconds, seconds / total)
            for family, name, calls, seconds in kernels
        ),
    )


def module(**changes):
    values = {
        "module": "layers.0.q", "kind": "QuantizedLinear", "changed": True, "dtype": "uint8",
        "parameters": 4096, "bytes_before": 8192, "bytes_after": 2176, "stored_bits_per_weight": 4.25,
        "kernel": None,
    }  # fmt: skip
    return ModuleEffect(**{**values, **changes})


def facts(*effects, simulated=False, **records):
    named = {name: Record(name, value, "1") for name, value in records.items()}
    return VariantFacts(effects, named, simulated, "bfloat16", "b1-p512-g64")


def words(variant, baseline, about, ceilings=CEILINGS):
    return judge(variant, baseline, about, ceilings)


def test_what_is_faster_and_smaller_needs_no_words():
    found = words(cell(0.5e-3, weight_bytes=300.0), cell(), facts(module()))
    assert (found.slower, found.no_smaller, found.text) == ((), False, "")


def test_dequantizing_is_named_with_its_share():
    kernels = [("dequantize", "_dequantize_kernel", 224, 3e-3), ("gemm", NVJET, 224, 1e-3)]
    found = words(cell(4.1e-3, kernels, weight_bytes=300.0), cell(), facts(module()))
    assert found.slower == ("decode",)
    assert found.text.startswith("Decode takes 4.1× [")
    assert "dequantizes, then multiplies: 75% of the time in _dequantize_kernel" in found.text


def test_dequantizing_by_ordinary_operators_is_found_by_what_the_baseline_does_not_need():
    ours = [
        ("copy", "aten::copy_", 50, 4e-3),
        ("elementwise", "aten::mul", 50, 3e-3),
        ("gemm", "aten::mm", 15, 1e-3),
    ]
    theirs = [("copy", "aten::copy_", 10, 1e-3), ("gemm", "aten::mm", 15, 1e-3)]
    about = facts(module(kernel="dequantize+matmul"))
    found = words(cell(8e-3, ours, mode="cpu", weight_bytes=300.0), cell(2e-3, theirs, mode="cpu"), about)
    assert "dequantizes, then multiplies: 75% of the time in what only that needs" in found.text
    assert "unquantized" not in found.text
    about = facts(module(kernel="decompress+matmul"))
    found = words(cell(8e-3, ours, mode="cpu", weight_bytes=300.0), cell(2e-3, theirs, mode="cpu"), about)
    assert "decompresses, then multiplies: 75% of the time in what only that needs" in found.text


def test_weights_stored_small_and_multiplied_as_floats():
    found = words(cell(1.5e-3, weight_bytes=300.0), cell(), facts(module(kind="StoredOnly")))
    assert (
        f"unquantized kernel: stored in 4.25 bits, multiplied in bfloat16 by {NVJET} (100% of" in found.text
    )


@pytest.mark.parametrize("name", ["marlin_gemm", "cutlass_i8816gemm_s8", "aten::_int_mm", "nvjet_e4m3_tn"])
def test_kernels_that_read_codes_are_not_called_unquantized(name):
    found = words(cell(1.5e-3, [("gemm", name, 9, 1e-3)], weight_bytes=300.0), cell(), facts(module()))
    assert "unquantized" not in found.text


def test_a_layer_that_names_its_kernel_is_not_called_unquantized():
    about = facts(module(kernel="triton w4a16 gemv"))
    assert "unquantized" not in words(cell(1.5e-3, weight_bytes=300.0), cell(), about).text


def test_eager_calls_wait_for_launches():
    slow = cell(10e-3, [("gemm", NVJET, 800, 2e-3)], mode="eager", note="cannot be captured: .item()")
    found = words(slow, cell(), facts(module(kernel="k")))
    assert "it ran eager while the baseline ran graph (cannot be captured: .item())" in found.text
    assert (
        "launch-bound: eager, 800 launches of 5.0 µs each, the device is busy 20% of the time" in found.text
    )


def test_a_variant_that_was_compiled_in_pieces():
    pieces = "compiled in pieces: dynamo broke off 4 times, first at: a wall"
    slow, base = cell(2e-3, mode="compiled", note=pieces), cell(mode="compiled")
    assert f"its blocks were {pieces}" in words(slow, base, facts(module())).text
    # The baseline's own breaks are no reason, nor is a mode that both have without compiling.
    broken = cell(mode="compiled", note=pieces)
    assert "in pieces" not in words(slow, broken, facts(module())).text
    assert "in pieces" not in words(cell(2e-3, note=pieces), cell(), facts(module())).text


def test_tiny_kernels_are_launch_bound_even_in_a_graph():
    tiny = cell(1.2e-3, [("elementwise", "k", 500, 0.8e-3)], weight_bytes=300.0)
    found = words(tiny, cell(1e-3), facts(module(kernel="k")))
    assert "launch-bound even in a graph: 500 kernels of 1.6 µs on average" in found.text


def test_on_the_cpu_nothing_is_launch_bound():
    slow = cell(10e-3, [("gemm", "aten::mm", 800, 2e-3)], mode="cpu")
    assert "launch" not in words(slow, cell(mode="cpu"), facts(module(kernel="k"))).text


def test_a_mask_saves_nothing():
    masked = module(kind="Linear", bytes_after=8192, stored_bits_per_weight=16.0, sparsity=0.5)
    about = facts(masked, theoretical_compression_ratio=1.6, parameters_changed_share=0.8)
    found = words(cell(1.2e-3), cell(), about)
    assert found.no_smaller
    assert "sparsity is only a mask: 50% of the weights are zero and stored densely" in found.text
    assert "the dense kernel takes the dense kernel's time" in found.text
    assert "The weights take as many bytes as the baseline's" in found.text
    assert "on paper it would be 1.6× smaller" in found.text
    assert "covers only" not in found.text, "nothing of it became smaller"


def test_what_is_left_out_is_named():
    about = facts(module(), parameters_changed_share=0.3)
    found = words(cell(1e-3, weight_bytes=985.0), cell(), about)
    assert found.no_smaller
    assert found.slower == ()
    assert "covers only 30% of the parameters: the rest (embeddings, head, norms) stays" in found.text
    assert "0.985× the bytes of the baseline's" in found.text


def test_arithmetic_that_takes_longer_than_reading_bounds_what_weights_can_save():
    def prefill(seconds, size, **values):
        return cell(seconds, phase="prefill", weight_bytes=size, **values)

    slow = prefill(20e-3, 4e9, prefill_flops=8e12)  # 10 ms of arithmetic
    found = words(slow, prefill(15e-3, 13e9), facts(module()))  # 4.3 ms of reading
    assert "compute-bound at b1-p512-g64: the arithmetic takes 10 ms" in found.text
    assert "reading the baseline's weights 4.33 ms" in found.text
    decode = words(cell(20e-3, decode_flops=1e9, weight_bytes=4e9), cell(weight_bytes=13e9), facts(module()))
    assert "compute-bound" not in decode.text


def test_simulated_methods_are_called_so_first():
    kernels = [("quantize", "fake_quant", 9, 1e-3), ("gemm", NVJET, 9, 3e-3)]
    found = words(cell(4e-3, kernels), cell(), facts(module(simulated=True), simulated=True))
    slow = found.sentences[0]
    assert slow.partition(": ")[2].startswith("simulated: dense arithmetic stands in")
    assert "25% of the time goes into quantizing activations (fake_quant)" in slow


def test_causes_come_by_the_share_that_they_explain():
    kernels = [("dequantize", "d", 9, 1e-3), ("quantize", "q", 9, 6e-3), ("gemm", "imma", 9, 3e-3)]
    text = words(cell(10e-3, kernels, weight_bytes=300.0), cell(), facts(module())).text
    assert text.index("60% of the time goes into quantizing") < text.index(
        "dequantizes, then multiplies: 10%"
    )


def test_other_kernels_that_take_longer_are_named_against_the_baselines():
    ours = [("attention", "eager_softmax", 64, 3e-3), ("gemm", NVJET, 100, 1e-3)]
    theirs = [("attention", FLASH, 32, 1e-3), ("gemm", NVJET, 100, 1e-3)]
    about = facts(module(kind="LocalAttention", bytes_after=8192, stored_bits_per_weight=None))
    found = words(cell(4.2e-3, ours), cell(2.2e-3, theirs), about)
    assert (
        "100% of the added kernel time is in attention kernels (3 ms against 1 ms; eager_softmax)"
        in found.text
    )
    assert "what it changed is stored as before (LocalAttention)" in found.text


def test_without_kernels_the_verdict_says_why_it_knows_nothing():
    unseen = cell(
        2e-3, (), weight_bytes=300.0, decode_kernels=Record("decode_kernels", 0, "1", note="no CUPTI")
    )
    found = words(unseen, cell(), facts(module(kernel="k")))
    assert "its kernels are not known (no CUPTI)" in found.text


# --- slower or not ------------------------------------------------------------------------------------


def test_an_interval_that_holds_one_is_not_slower():
    def at(value, lower, upper):
        record = Record("decode_latency", value, "s", lower=lower, upper=upper, mode="graph")
        return CellFacts({"decode_latency": record})

    baseline = at(1.0, 0.9, 1.1)
    assert not time_ratio("decode", at(1.05, 1.0, 1.2), baseline).is_more
    assert time_ratio("decode", at(1.5, 1.4, 1.6), baseline).is_more
    assert time_ratio("decode", CellFacts({}), baseline) is None


def test_paired_rounds_decide_where_there_are_any():
    """Both latencies drifted, their intervals overlap; side by side the variant is slower in every round."""
    paired = Record("decode_speedup", 0.8, "x", lower=0.75, upper=0.85, mode="graph, paired")
    variant = cell(1e-3, decode_speedup=paired)
    ratio = time_ratio("decode", variant, cell(1e-3))
    assert (ratio.value, ratio.lower, ratio.upper) == (
        pytest.approx(1.25), pytest.approx(1 / 0.85), pytest.approx(1 / 0.75),
    )  # fmt: skip
    assert words(variant, cell(1e-3), facts(module(kernel="k"))).slower == ("decode",)


def test_a_single_reading_is_compared_as_it_is():
    single = CellFacts({"decode_latency": Record("decode_latency", 2.0, "s")})
    assert str(time_ratio("decode", single, CellFacts({"decode_latency": Record("x", 1.0, "s")}))) == "2×"


def test_simulated_modes_are_still_known():
    slow = cell(2e-3, mode="eager, simulated")
    assert "it ran eager while the baseline ran graph" in words(slow, cell(), facts(simulated=True)).text


def test_a_factor_near_1_is_not_called_1():
    assert str(Ratio(1.0004, 1.0003, 1.0005)) == "1.0004× [1.0003, 1.0005]"
    assert str(Ratio(1.0, 0.996, 1.004)) == "1× [0.996, 1.004]"
    assert str(Ratio(2.948)) == "2.95×"
