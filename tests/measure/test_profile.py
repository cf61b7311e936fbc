"""Kernels of one prefill and one step, from the profiler and from stand-ins for CUDA's."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from harness.measure import profile as profile_module
from harness.measure.generation import Generation, forward_only, random_prompt
from harness.measure.graphs import prepare_call, prepare_generation
from harness.measure.profile import KernelTime, kernel_uses, profile_forward, profile_generation
from tests.measure.models import tiny_mistral

CPU = torch.device("cpu")


def prepared(model, new_tokens=3):
    generation = Generation(model, random_prompt(256, 2, 8, 0, CPU), new_tokens)
    return generation, *prepare_generation(generation)


def test_shares_add_up_and_the_slowest_comes_first():
    times = [KernelTime("aten::mm", 3.0, 2), KernelTime("aten::mul", 1.0), KernelTime("aten::mm", 1.0)]
    first, second = kernel_uses("decode", times)
    assert (first.name, first.family, first.calls, first.seconds, first.share) == (
        "aten::mm",
        "gemm",
        3,
        4.0,
        0.8,
    )
    assert (second.name, second.share) == ("aten::mul", 0.2)
    assert kernel_uses("decode", []) == ()


def test_many_kernels_are_added_up_by_family():
    times = [KernelTime(f"triton_poi_fused_mul_{i}", 1.0 + i) for i in range(60)]
    rows = kernel_uses("prefill", times)
    assert len(rows) == profile_module.MAX_KERNELS + 1
    assert rows[-1].name == "(20 other elementwise kernels)"
    assert rows[-1].calls == 20
    assert rows[-1].seconds == sum(1.0 + i for i in range(20))
    assert sum(row.share for row in rows) == pytest.approx(1.0)


def test_the_products_of_a_model_are_all_seen(tiny_llama):
    found = profile_generation(*prepared(tiny_llama))
    for phase in (found.prefill, found.decode):
        assert phase.problem is None
        calls = {kernel.name: kernel.calls for kernel in phase.kernels}
        assert calls["aten::mm"] == 7 * 2 + 1  # 7 linear layers a block, 2 blocks, the head
        assert sum(kernel.share for kernel in phase.kernels) == pytest.approx(1.0)
        assert phase.seconds > 0
    assert {kernel.phase for kernel in found.kernels} == {"prefill", "decode"}


def test_on_the_cpu_the_quietest_run_counts(monkeypatch):
    runs = iter([[KernelTime("aten::mm", 3.0)], [KernelTime("aten::mm", 1.0)], [KernelTime("aten::mm", 2.0)]])
    monkeypatch.setattr(profile_module, "HOST_PROFILES", 3)
    monkeypatch.setattr(profile_module, "HOST_S", 60.0)
    monkeypatch.setattr(profile_module, "_host_operators", lambda _run: next(runs))
    prepared = []
    found = profile_module._profile("decode", lambda: None, CPU, lambda: prepared.append(1))
    assert found.seconds == 1.0
    assert len(prepared) == 3


def test_profiling_leaves_a_generation_that_still_works(tiny_llama):
    generation, prefill, step = prepared(tiny_llama)
    generation.reset()
    before = [prefill.run().clone(), step.run().clone()]
    profile_generation(generation, prefill, step)
    generation.reset()
    after = [prefill.run().clone(), step.run().clone()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_nothing_is_decoded_without_new_tokens_and_by_encoders(tiny_bert):
    assert profile_generation(*prepared(tiny_mistral(4), new_tokens=0)).decode is None
    tokens = random_prompt(256, 1, 8, 0, CPU)
    found = profile_forward(prepare_call(lambda: forward_only(tiny_bert, tokens), CPU), CPU)
    assert found.decode is None
    assert any(kernel.family == "attention" for kernel in found.kernels)


# --- CUDA, played by stand-ins ------------------------------------------------------------------------


def kernel(name, microseconds, kind="CUDA", annotation=False):
    return SimpleNamespace(
        name=name,
        device_type=SimpleNamespace(name=kind),
        time_range=SimpleNamespace(elapsed_us=lambda: microseconds),
        is_user_annotation=annotation,
    )


class Profiler:
    def __init__(self, events):
        self._events = events

    def __call__(self, **_options):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_error):
        return None

    def events(self):
        return self._events


@pytest.fixture
def cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _device: None)

    def profiled(events, run=lambda: None):
        monkeypatch.setattr(torch.profiler, "profile", Profiler(events))
        return profile_module._profile("decode", run, torch.device("cuda"))

    return profiled


def test_kernels_of_the_device_are_counted_and_nothing_else(cuda):
    found = cuda(
        [
            kernel("nvjet_tst_64x8", 30.0),
            kernel("nvjet_tst_64x8", 50.0),
            kernel("Memset (Device)", 20.0),
            kernel("cudaGraphLaunch", 500.0, kind="CPU"),
            kernel("step", 900.0, annotation=True),
        ]
    )
    assert [(k.name, k.calls, k.share) for k in found.kernels] == [
        ("nvjet_tst_64x8", 2, pytest.approx(0.8)),
        ("Memset (Device)", 1, pytest.approx(0.2)),
    ]
    assert found.seconds == pytest.approx(100e-6)


def test_a_profiler_that_sees_nothing_says_so(cuda):
    found = cuda([])
    assert found.kernels == ()
    assert "the profiler saw no kernel" in found.problem


def test_a_profiler_that_fails_is_a_reason_and_no_error(cuda):
    def refuse():
        raise RuntimeError("CUPTI_ERROR_INSUFFICIENT_PRIVILEGES\nand a long story")

    assert cuda([], refuse).problem == "not profiled: CUPTI_ERROR_INSUFFICIENT_PRIVILEGES"
