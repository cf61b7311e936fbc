"""Measuring on a GPU: graphs, events, the allocator."""

from __future__ import annotations

import gc
import time

import pytest
import torch
from harness_plugins.quantization.rtn import METHOD as RTN
from torch import nn

from harness.measure import graphs
from harness.measure.bundled import register_meters
from harness.measure.clock import DeviceClock
from harness.measure.effect import measure_effect, snapshot
from harness.measure.fingerprint import checksums
from harness.measure.generation import Generation, decode_logits_match, forward_only, random_prompt
from harness.measure.graphs import CAPTURES, prepare_call, prepare_forward, prepare_generation
from harness.measure.machine import device_name, gpu_state, manifest, resolve_device
from harness.measure.memory import PeakMemory
from harness.measure.meter import Measured
from harness.measure.scenario import measure_scenario
from harness.models.info import info_from_config
from harness.records import Scenario
from harness.testing import make_context
from tests.measure.models import tiny_grouped, tiny_mistral, vivid

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda")
MIB = 1024 * 1024


@pytest.fixture(autouse=True)
def full_precision():
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = allowed


@pytest.fixture(params=["tiny_llama", "tiny_opt", "tiny_gpt2", "grouped", "mistral"])
def decoder(request):
    if request.param == "grouped":
        return tiny_grouped(2).to(CUDA)
    if request.param == "mistral":
        return tiny_mistral(8).to(CUDA)
    return vivid(request.getfixturevalue(request.param)).to(CUDA)


def prompt_of(length: int = 12, batch: int = 2) -> torch.Tensor:
    return random_prompt(256, batch, length, 5, CUDA)


def measured_of(model: nn.Module, scenario: Scenario) -> Measured:
    return Measured(
        model=model,
        info=info_from_config(model.config, "tiny"),
        scenario=scenario,
        device=CUDA,
        dtype=torch.float32,
        seed=0,
        shared={},
    )


def test_prefill_and_step_are_compiled_and_captured(decoder):
    prefill, step = prepare_generation(Generation(decoder, prompt_of(), 4))
    assert (prefill.mode, prefill.note) == ("compiled", None)
    assert (step.mode, step.note) == ("compiled", None)
    assert all(module._compiled_call_impl is None for module in decoder.modules())


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("length", [1, 8, 12])
def test_replayed_steps_equal_plain_forward_passes(decoder, length, batch):
    decode_logits_match(decoder, prompt_of(length, batch), 18, tolerance=5e-3)


@pytest.mark.parametrize("written", [{"bits": 4, "group_size": 32}, {"bits": 8, "a_bits": 8}], ids=str)
def test_a_quantized_model_is_compiled_around_its_kernels(tiny_llama, written):
    model = tiny_llama.to(CUDA)
    model = RTN.transform(model, RTN.options.model_validate(written), make_context(model)).eval()
    generation = Generation(model, prompt_of(8, 1), 6)
    prefill, step = prepare_generation(generation)
    assert (prefill.mode, step.mode) == ("compiled", "compiled"), (prefill.note, step.note)
    decode_logits_match(model, prompt_of(8, 1), 6, tolerance=5e-2)


def test_a_compiler_that_fails_leaves_a_graph_and_the_reason(decoder, monkeypatch):
    def broken(_module, _inputs):
        raise ValueError("no such instruction")

    monkeypatch.setattr("harness.measure.compiling._rewritten_inductor", broken)
    prefill, step = prepare_generation(Generation(decoder, prompt_of(), 4))
    assert (prefill.mode, step.mode) == ("graph", "graph")
    assert step.note.startswith("compilation failed: ")
    assert "no such instruction" in step.note


def test_replays_can_start_over(decoder):
    generation = Generation(decoder, prompt_of(), 4)
    prefill, step = prepare_generation(generation)
    runs = []
    for _ in range(3):
        generation.reset()
        logits = [prefill.run().clone(), *(step.run().clone() for _ in range(4))]
        runs.append(torch.cat(logits))
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])


def test_what_is_compared_is_captured_several_times(decoder):
    asked = []

    def more(taken_bytes: int) -> bool:
        asked.append(taken_bytes)
        return True

    generation = Generation(decoder, prompt_of(), 4)
    prefill, step = prepare_generation(generation, more)
    assert (prefill.mode, step.mode) == ("compiled", "compiled")
    assert (prefill.captures, step.captures) == (CAPTURES, CAPTURES)
    assert len(asked) == 2 * (CAPTURES - 1)
    runs, places = [], set()
    for capture in range(CAPTURES):
        generation.reset()
        first = prefill.run_capture(capture)
        places.add(first.data_ptr())
        logits = [first.clone(), *(step.run_capture(capture).clone() for _ in range(4))]
        runs.append(torch.cat(logits))
    assert len(places) == CAPTURES, "each has buffers of its own"
    assert all(torch.equal(runs[0], run) for run in runs[1:])


def test_the_step_is_captured_before_the_prefill_is_captured_again(decoder, monkeypatch):
    order, capture = [], graphs._capture

    def noting(function, before, stream):
        order.append(function.__name__)
        return capture(function, before, stream)

    monkeypatch.setattr(graphs, "_capture", noting)
    prepare_generation(Generation(decoder, prompt_of(), 4), lambda taken: True)
    assert order[:3] == ["prefill", "step", "prefill"]
    assert order.count("step") == CAPTURES


def test_a_capture_is_weighed_without_what_earlier_calls_left_behind():
    tensor, left = torch.ones(1 << 20, device=CUDA), torch.empty(1 << 28, device=CUDA)
    del left  # cached, and given back when the capture begins
    call = prepare_call(lambda: tensor * 2, CUDA)
    assert call.taken_bytes >= tensor.nbytes


def test_without_room_one_capture_is_enough(decoder):
    prefill, step = prepare_generation(Generation(decoder, prompt_of(), 4), lambda taken: False)
    assert (prefill.captures, step.captures) == (1, 1)


def test_a_further_capture_that_runs_out_of_memory_is_left_out():
    tensor, calls = torch.ones(4, device=CUDA), []

    def doubled() -> torch.Tensor:
        calls.append(None)
        twice = tensor * 2
        if len(calls) > 6:  # three to warm up, one to see whether it asks the host, two captures
            raise torch.OutOfMemoryError("no room")
        return twice

    call = prepare_call(doubled, CUDA, more=lambda taken: True)
    assert call.mode == "graph"
    assert call.captures == 2
    for capture in range(3):
        assert torch.equal(call.run_capture(capture), tensor * 2)
    torch.randn(3, device=CUDA)


def test_an_encoder_is_captured(tiny_bert):
    tiny_bert.to(CUDA)
    tokens = prompt_of()
    call = prepare_forward(tiny_bert, tokens)
    assert (call.mode, call.note) == ("compiled", None)
    torch.testing.assert_close(call.run(), forward_only(tiny_bert, tokens), atol=1e-4, rtol=0)


class Asking(nn.Module):
    """Asks the host in every forward pass."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        output = self.inner(*args, **kwargs)
        if float(output.abs().max()) < 0:
            raise AssertionError
        return output


def test_what_asks_the_host_is_run_eagerly_with_the_reason(decoder):
    decoder.lm_head = Asking(decoder.lm_head)
    generation = Generation(decoder, prompt_of(), 3)
    prefill, step = prepare_generation(generation)
    assert prefill.mode == step.mode == "eager"
    assert step.note.startswith("cannot be captured: ")
    assert "\n" not in step.note
    decode_logits_match(decoder, prompt_of(), 3, tolerance=5e-3)


def test_a_capture_that_fails_leaves_the_process_usable(monkeypatch):
    # What the dry run overlooks must not break what comes after the failed capture.
    monkeypatch.setattr("harness.measure.graphs._asks_the_host", lambda _function, _before: None)
    tensor = torch.ones(4, device=CUDA)

    def asks() -> torch.Tensor:
        return tensor * float(tensor.sum())

    call = prepare_call(asks, CUDA)
    assert call.mode == "eager"
    assert call.note.startswith("capture failed: ")
    assert torch.equal(call.run(), tensor * 4)
    torch.randn(3, device=CUDA)  # the generator must not believe that it is still captured
    torch.manual_seed(0)
    assert prepare_call(lambda: tensor * 2, CUDA).mode == "graph"
    assert torch.cuda.get_sync_debug_mode() == 0


def test_events_time_the_device_and_not_the_host():
    clock = DeviceClock(CUDA)
    cycles = 20_000_000
    torch.cuda._sleep(cycles)
    clock.start()
    marks = [clock.mark()]
    torch.cuda._sleep(cycles)
    marks.append(clock.mark())
    torch.cuda._sleep(cycles)
    marks.append(clock.mark())
    first, second, whole = clock.seconds(marks)
    assert first == pytest.approx(second, rel=0.2)
    assert whole == pytest.approx(first + second, rel=0.05)
    assert 0.005 < first < 0.1


def test_every_quantity_is_measured_on_compiled_graphs(tiny_llama):
    model = tiny_llama.to(CUDA)
    measured = measured_of(model, Scenario(2, 16, 8))
    records = {record.metric: record for record in measure_scenario(measured, register_meters())}
    for metric in ("prefill_latency", "decode_latency", "end_to_end_latency"):
        assert records[metric].mode == "compiled"
        assert records[metric].value > 0
    steps = records["decode_latency"].value * 8
    whole = records["prefill_latency"].value + steps
    assert records["end_to_end_latency"].value == pytest.approx(whole, rel=0.5)
    assert records["prefill_peak_bytes"].value >= records["weight_bytes"].value
    assert records["prefill_reserved_bytes"].value >= records["prefill_peak_bytes"].value
    assert records["decode_peak_bytes"].mode == "cuda_allocator"


def test_timing_gives_its_memory_back(tiny_llama):
    model = tiny_llama.to(CUDA)
    measured = measured_of(model, Scenario(2, 16, 8))
    before = torch.cuda.memory_allocated()
    measure_scenario(measured, register_meters())
    assert torch.cuda.memory_allocated() - before < 16 * MIB


def test_peak_memory_is_the_allocators():
    gc.collect()  # what tests before this one left behind
    before = torch.cuda.memory_allocated()
    held = torch.ones(64 * MIB // 4, device=CUDA)
    with PeakMemory(CUDA) as memory:
        more = torch.ones(32 * MIB // 4, device=CUDA)
        del more
    assert 96 * MIB <= memory.peak_bytes - before < 200 * MIB
    assert memory.reserved_bytes >= memory.peak_bytes
    del held


def test_checksums_do_not_depend_on_the_device():
    tensors = {
        "float": torch.randn(1000, 37),
        "bf16": torch.randn(77).to(torch.bfloat16),
        "int8": torch.arange(-5, 6).to(torch.int8),
    }
    on_device = {name: tensor.to(CUDA) for name, tensor in tensors.items()}
    assert checksums(on_device) == checksums(tensors)


def test_a_snapshot_of_billions_of_parameters_is_quick_and_copies_nothing():
    model = nn.Sequential(
        *(nn.Linear(8192, 8192, bias=False, device=CUDA, dtype=torch.bfloat16) for _ in range(30))
    )
    snapshot(model[:1])
    with PeakMemory(CUDA) as memory:
        before = torch.cuda.memory_allocated()
        torch.cuda.synchronize()
        started = time.perf_counter()
        taken = snapshot(model)
        seconds = time.perf_counter() - started
    assert seconds < 1.0  # 2 billion parameters
    assert memory.peak_bytes - before < 512 * MIB
    assert not measure_effect(taken, model).changed
    with torch.no_grad():
        model[29].weight[8191, 8191] += 1
    assert measure_effect(taken, model).changed


def test_the_gpu_is_described():
    assert resolve_device("auto") == "cuda"
    found = manifest("cuda")
    assert found["device_name"] == device_name("cuda") == torch.cuda.get_device_name()
    state = gpu_state("cuda")
    assert found["gpu"] is not None
    assert state["memory_bytes"] >= torch.cuda.get_device_properties(0).total_memory
    assert state["sm_clock_mhz"] > 0
    assert isinstance(state["throttle_reasons"], list)
