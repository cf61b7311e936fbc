"""The meters that every sweep runs."""

from __future__ import annotations

from harness.hookspecs import hookimpl
from harness.measure.meter import Meter

__all__ = ["register_meters"]

_DECODER = ("decoder",)


@hookimpl
def register_meters() -> list[Meter]:
    """Memory first: it is measured before any CUDA graph exists. What explains comes after the times."""
    from harness.measure import explaining, footprint, latency

    return [
        Meter("weight_bytes", footprint.stored_weights),
        Meter("prefill_peak_bytes", footprint.prefill_peak),
        Meter("decode_peak_bytes", footprint.decode_peak, kinds=_DECODER),
        Meter("kv_cache_bytes_per_token", footprint.cache_per_token, kinds=_DECODER),
        Meter("prefill_latency", latency.prefill_latency),
        Meter("prefill_throughput", latency.prefill_throughput, better="higher"),
        Meter("decode_latency", latency.decode_latency, kinds=_DECODER),
        Meter("decode_throughput", latency.decode_throughput, kinds=_DECODER, better="higher"),
        Meter("end_to_end_latency", latency.end_to_end_latency, kinds=_DECODER),
        Meter("speedups", latency.speedups, better="higher"),
        Meter("control_latency", latency.control_latency),
        Meter("prefill_kernels", explaining.prefill_kernels),
        Meter("decode_kernels", explaining.decode_kernels, kinds=_DECODER),
        Meter("prefill_mfu", explaining.prefill_roofline, better="higher"),
        Meter("decode_mbu", explaining.decode_roofline, kinds=_DECODER, better="higher"),
        Meter("prefill_energy", explaining.prefill_energy),
        Meter("decode_energy", explaining.decode_energy, kinds=_DECODER),
    ]
