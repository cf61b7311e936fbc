"""Energy from counters that are played by stand-ins: a GPU's that moves every 100 ms, a processor's."""

from __future__ import annotations

import math

import pytest
import torch

from harness.measure import energy as energy_module
from harness.measure.energy import (
    EnergyBudget,
    EnergyReading,
    NvmlCounter,
    RaplCounter,
    energy_problem,
    measure_energy,
)
from harness.measure.explaining import decode_energy, prefill_energy
from harness.measure.inspecting import ENERGY, PhaseEnergy
from harness.records import Scenario
from tests.measure.test_scenario import measured_of

CALL_S, BUSY_W, IDLE_W, TICK_S = 0.004, 300.0, 60.0, 0.1
BUDGET = EnergyBudget(windows=3, window_s=0.35, idle_s=0.2)


class Device:
    """A device with a clock of its own, whose counter shows the energy up to the last tick."""

    source = "stand-in"

    def __init__(self, tick_s=TICK_S):
        self.now = 7.03
        self.tick_s = tick_s
        self.true_j = self.shown_j = 1000.0
        self.calls = 0

    def __enter__(self):
        return self

    def __exit__(self, *_error):
        pass

    def _spend(self, seconds, watts):
        until = self.now + seconds
        while True:
            tick = (math.floor(self.now / self.tick_s + 1e-9) + 1) * self.tick_s
            step = min(tick, until) - self.now
            self.true_j += watts * step
            self.now += step
            if self.now >= tick - 1e-12:
                self.shown_j = self.true_j
            if self.now >= until - 1e-12:
                return

    def run(self):
        self.calls += 1
        self._spend(CALL_S, BUSY_W)

    def sleep(self, seconds):
        self._spend(seconds, IDLE_W)

    def read_j(self):
        return self.shown_j

    def clock(self):
        return self.now


def measure(device, budget=BUDGET, **options):
    return measure_energy(
        device.run, device, lambda: None, budget, clock=device.clock, sleep=device.sleep, **options
    )


def test_windows_end_where_the_counter_moves():
    device = Device()
    found = measure(device)
    assert len(found.joules) == 3
    for joules in found.joules:
        assert joules == pytest.approx(CALL_S * BUSY_W, rel=0.02)  # one tick in a window is 25 %
    assert found.idle_w == pytest.approx(IDLE_W, rel=0.05)
    assert found.source == "stand-in"
    assert found.problem is None
    assert found.calls == pytest.approx(3 * 0.4 / CALL_S, abs=6)


def test_the_budget_bounds_the_time():
    device = Device()
    measure(device)
    assert device.now - 7.03 < 2.2


def test_calls_in_batches_count_each():
    device = Device()
    batched = Device()

    def five():
        for _ in range(5):
            batched.run()

    alone = measure(device)
    found = measure_energy(
        five, batched, lambda: None, BUDGET, batch=5, clock=batched.clock, sleep=batched.sleep
    )
    assert found.joules[0] == pytest.approx(alone.joules[0], rel=0.1)
    assert found.calls % 5 == 0


def test_a_counter_that_stands_still_is_a_problem_and_no_endless_loop():
    found = measure(Device(tick_s=1e9))
    assert found.joules == ()
    assert found.problem == "the energy counter stands still"


def test_a_call_longer_than_the_windows_is_measured_once():
    class Slow(Device):
        def run(self):
            self._spend(5.0, BUSY_W)

    found = measure(Slow())
    assert found.joules == (pytest.approx(5 * BUSY_W, rel=0.02),)


def test_a_counter_that_breaks_is_a_reason_and_no_error():
    class Breaking(Device):
        def read_j(self):
            raise OSError("NVML: GPU is lost")

    assert measure(Breaking()).problem == "NVML: GPU is lost"


# --- counters -----------------------------------------------------------------------------------------


class Nvml:
    class NVMLError(Exception):
        pass

    def __init__(self, supported=True):
        self.supported, self.open, self.uuid = supported, 0, None

    def nvmlInit(self):
        self.open += 1

    def nvmlShutdown(self):
        self.open -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid):
        self.uuid = uuid
        return "handle"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        assert handle == "handle"
        assert self.open
        if not self.supported:
            raise self.NVMLError("Not Supported")
        return 123_456


def test_nvml_counts_millijoules_of_the_device_with_this_uuid():
    nvml = Nvml()
    with NvmlCounter(torch.device("cuda"), nvml, uuid="0-1-2") as counter:
        assert counter.read_j() == pytest.approx(123.456)
    assert nvml.uuid == "GPU-0-1-2"
    assert nvml.open == 0
    counter = NvmlCounter(torch.device("cuda"), Nvml(supported=False), uuid="MIG-7")
    with counter, pytest.raises(OSError, match="NVML: Not Supported"):
        counter.read_j()


def zone(root, name, energy_uj, span=1_000_000):
    folder = root / name
    folder.mkdir(exist_ok=True)
    (folder / "energy_uj").write_text(f"{energy_uj}\n")
    (folder / "max_energy_range_uj").write_text(f"{span}\n")
    return folder


def test_rapl_adds_up_packages_and_unwraps_them(tmp_path):
    first = zone(tmp_path, "intel-rapl:0", 999_000)
    zone(tmp_path, "intel-rapl:1", 10)
    zone(tmp_path, "intel-rapl:0:0", 500)  # a part of the first
    with RaplCounter(tmp_path) as counter:
        assert counter.read_j() == 0
        zone(tmp_path, "intel-rapl:1", 210_010)
        assert counter.read_j() == pytest.approx(0.21)
        (first / "energy_uj").write_text("98999\n")  # beyond 1,000,000 and round again
        assert counter.read_j() == pytest.approx(0.21 + 0.1)


def test_rapl_leaves_out_the_whole_platform_which_holds_the_packages(tmp_path):
    (zone(tmp_path, "intel-rapl:0", 0) / "name").write_text("package-0\n")
    (zone(tmp_path, "intel-rapl:1", 0) / "name").write_text("psys\n")
    counter = RaplCounter(tmp_path)
    zone(tmp_path, "intel-rapl:0", 200_000)
    zone(tmp_path, "intel-rapl:1", 700_000)
    assert counter.read_j() == pytest.approx(0.2)


def test_where_there_is_no_counter_the_reason_is_known(tmp_path, monkeypatch):
    with pytest.raises(OSError, match="no RAPL counter under"):
        RaplCounter(tmp_path)
    monkeypatch.setattr(energy_module.RaplCounter.__init__, "__defaults__", (tmp_path,))
    assert "no RAPL counter under" in energy_problem("cpu")
    zone(tmp_path, "intel-rapl:0", 1)
    assert energy_problem("cpu") is None


# --- records ------------------------------------------------------------------------------------------


def records_of(model, energy):
    measured = measured_of(model, Scenario(4, 8, 2))
    measured.shared[ENERGY] = energy
    return prefill_energy(measured)[0], decode_energy(measured)[0]


def test_energy_is_told_for_each_token(tiny_llama):
    prefill = EnergyReading((3.2, 6.4, 3.2), 30, 75.4, "nvml")
    decode = EnergyReading((0.4, 0.8, 0.6), 90, None, "nvml")
    of_prefill, of_decode = records_of(tiny_llama, PhaseEnergy(prefill, decode))
    assert of_prefill.value == pytest.approx(3.2 / 32)  # 4 prompts of 8 tokens
    assert of_decode.value == pytest.approx(0.6 / 4)
    assert (of_decode.unit, of_decode.mode, of_decode.n) == ("J/token", "nvml", 3)
    assert of_decode.lower <= of_decode.value <= of_decode.upper
    assert "75 W of it while idle" in of_prefill.note


def test_what_a_counter_could_not_measure_is_said_in_the_record(tiny_llama):
    broken = EnergyReading(source="nvml", problem="the energy counter stands still")
    of_prefill, _ = records_of(tiny_llama, PhaseEnergy(broken, broken))
    assert math.isnan(of_prefill.value)
    assert of_prefill.note == "the energy counter stands still"
