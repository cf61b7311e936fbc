"""The meters that say why: kernels, achieved against possible, energy.

They make records of what the timing left in `Measured.shared` and of the latencies measured before them,
and have nothing to say where there is neither.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from harness.errors import NotApplicable
from harness.measure.ceilings import Ceilings
from harness.measure.energy import EnergyReading
from harness.measure.inspecting import ENERGY, PROFILE, PhaseEnergy
from harness.measure.meter import Measured
from harness.measure.profile import GenerationProfile, PhaseProfile
from harness.measure.roofline import decode_records, prefill_records
from harness.measure.statistics import record_from_samples
from harness.measure.workload import work_of
from harness.records import Record

__all__ = [
    "CEILINGS",
    "RECORDS",
    "decode_energy",
    "decode_kernels",
    "decode_roofline",
    "prefill_energy",
    "prefill_kernels",
    "prefill_roofline",
]

CEILINGS, RECORDS = "ceilings", "records"
"""Names in `Measured.shared`: the ceilings as a manifest stores them, and the records so far by metric."""


def prefill_kernels(measured: Measured) -> list[Record]:
    """How many kernels one prefill launches, and their time together."""
    return _kernel_records("prefill", _profile(measured).prefill, measured)


def decode_kernels(measured: Measured) -> list[Record]:
    """How many kernels one step launches, and their time together."""
    profile = _profile(measured).decode
    if profile is None:
        raise NotApplicable("nothing is decoded")
    return _kernel_records("decode", profile, measured)


def prefill_roofline(measured: Measured) -> list[Record]:
    """Operations per second of the prefill, and the share of the ceiling (MFU)."""
    latency = _latency(measured, "prefill_latency")
    return prefill_records(work_of(measured).prefill, latency, _ceilings(measured), _dtype(measured))


def decode_roofline(measured: Measured) -> list[Record]:
    """Bytes and operations per second of a step, and the shares of the ceilings (MBU, MFU)."""
    latency, work = _latency(measured, "decode_latency"), work_of(measured).decode
    if work is None:
        raise NotApplicable("nothing is decoded")
    return decode_records(work, latency, _ceilings(measured), _dtype(measured))


def prefill_energy(measured: Measured) -> list[Record]:
    """Joules for each token of the prompts."""
    scenario = measured.scenario
    reading = _energy(measured).prefill
    return [_energy_record("prefill_energy", reading, scenario.batch_size * scenario.prompt_len)]


def decode_energy(measured: Measured) -> list[Record]:
    """Joules for each new token."""
    reading = _energy(measured).decode
    if reading is None:
        raise NotApplicable("nothing is decoded")
    return [_energy_record("decode_energy", reading, measured.scenario.batch_size)]


# --- records ------------------------------------------------------------------------------------------


def _kernel_records(phase: str, profile: PhaseProfile, measured: Measured) -> list[Record]:
    if profile.problem is not None:
        return [Record(f"{phase}_kernels", math.nan, "1", n=0, note=profile.problem)]
    what = "kernel launches" if measured.device.type == "cuda" else "operators of ATen"
    return [
        Record(f"{phase}_kernels", profile.calls, "1", note=what),
        Record(f"{phase}_kernel_time", profile.seconds, "s", note="all kernels of one call, as profiled"),
    ]


def _energy_record(metric: str, reading: EnergyReading, tokens: int) -> Record:
    if not reading.source:  # `harness doctor` says why
        raise NotApplicable(reading.problem or "no energy was measured")
    if not reading.joules:
        return Record(metric, math.nan, "J/token", n=0, mode=reading.source, note=reading.problem)
    idle = "" if reading.idle_w is None else f"; {reading.idle_w:.0f} W of it while idle"
    note = f"all that the device drew{idle}; {reading.calls} calls in {len(reading.joules)} windows"
    record = record_from_samples(metric, "J/token", reading.joules, scale=1 / tokens, mode=reading.source)
    return replace(record, note=note)


# --- what was left by others --------------------------------------------------------------------------


def _profile(measured: Measured) -> GenerationProfile:
    profile = measured.shared.get(PROFILE)
    if not isinstance(profile, GenerationProfile):
        raise NotApplicable("nothing was profiled")
    return profile


def _energy(measured: Measured) -> PhaseEnergy:
    energy = measured.shared.get(ENERGY)
    if not isinstance(energy, PhaseEnergy):
        raise NotApplicable("no energy was measured")
    return energy


def _latency(measured: Measured, metric: str) -> Record:
    records = measured.shared.get(RECORDS)
    record = records.get(metric) if isinstance(records, Mapping) else None
    if not isinstance(record, Record):
        raise NotApplicable(f"there is no {metric}")
    return record


def _ceilings(measured: Measured) -> Ceilings:
    return Ceilings.from_json(measured.shared.get(CEILINGS))


def _dtype(measured: Measured) -> str:
    return str(measured.dtype).removeprefix("torch.")
