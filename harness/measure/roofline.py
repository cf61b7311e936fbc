"""Achieved operations and bytes per second, and their share of what the device can do.

**MFU** (model FLOPs utilisation, Chowdhery et al. 2022, PaLM, arXiv:2204.02311, appendix B): the operations
that the model needs, over the time, over the ceiling of matrix products. **MBU** (model bandwidth
utilisation): the bytes that a step must read at least, over the time, over the bandwidth. Both ceilings were
measured on this device at the start of the sweep. `harness.measure.workload` says what is counted.

The ceiling of products is that of the model's own type for every variant, so that rows compare; a variant
that multiplies in int8 or FP8 may therefore exceed 1.
"""

from __future__ import annotations

from dataclasses import replace

from harness.measure.ceilings import Ceilings
from harness.measure.workload import PhaseWork
from harness.records import Record

__all__ = ["bound_seconds", "decode_records", "prefill_records", "rate"]


def prefill_records(work: PhaseWork, latency: Record, ceilings: Ceilings, dtype: str) -> list[Record]:
    """``prefill_flops``, ``prefill_flops_per_s`` and, with a ceiling, ``prefill_mfu``.

    Args:
        latency: the record of the time, in seconds; its interval carries over.
        dtype: the model's type, such as ``bfloat16``.
    """
    return [
        Record("prefill_flops", work.flops, "FLOP"),
        *_achieved(
            "prefill_flops_per_s", "FLOP/s", "prefill_mfu", work.flops, latency, _matmul(ceilings, dtype)
        ),
    ]


def decode_records(work: PhaseWork, latency: Record, ceilings: Ceilings, dtype: str) -> list[Record]:
    """The same for a step, and ``decode_read_bytes``, ``decode_bytes_per_s``, ``decode_mbu``."""
    note = f"{work.weight_bytes / 1e6:.4g} MB of weights, {work.cache_bytes / 1e6:.4g} MB of cache"
    return [
        Record("decode_flops", work.flops, "FLOP"),
        *_achieved(
            "decode_flops_per_s", "FLOP/s", "decode_mfu", work.flops, latency, _matmul(ceilings, dtype)
        ),
        Record("decode_read_bytes", work.read_bytes, "B", note=note),
        *_achieved("decode_bytes_per_s", "B/s", "decode_mbu", work.read_bytes, latency, _bandwidth(ceilings)),
    ]


def rate(metric: str, unit: str, amount: float, latency: Record) -> Record:
    """An amount over a time; the interval of the time, turned round."""
    return Record(
        metric,
        amount / latency.value,
        unit,
        lower=None if latency.upper is None else amount / latency.upper,
        upper=None if not latency.lower else amount / latency.lower,
        n=latency.n,
        mode=latency.mode,
    )


def bound_seconds(work: PhaseWork, ceilings: Ceilings, dtype: str) -> tuple[float | None, float | None]:
    """The time that the arithmetic and the reading take at their ceilings; None where unknown."""
    flops, bandwidth = ceilings.matmul_flops_per_s(dtype), ceilings.bytes_per_s
    return (
        work.flops / flops if flops else None,
        work.read_bytes / bandwidth if bandwidth else None,
    )


def _achieved(
    metric: str,
    unit: str,
    share: str,
    amount: float,
    latency: Record,
    ceiling: tuple[float | None, str],
) -> list[Record]:
    achieved = rate(metric, unit, amount, latency)
    value, name = ceiling
    if not value:
        return [replace(achieved, note=f"no ceiling to compare with: {name}")]
    used = rate(share, "1", amount / value, latency)
    return [achieved, replace(used, note=f"of {value / 1e12:.4g} T{unit} ({name})")]


def _matmul(ceilings: Ceilings, dtype: str) -> tuple[float | None, str]:
    return ceilings.matmul_flops_per_s(dtype), f"{dtype} matrix product"


def _bandwidth(ceilings: Ceilings) -> tuple[float | None, str]:
    return ceilings.bytes_per_s, "reading or copying memory"
