"""The meters of time: prefill, decode, end to end, what they make in tokens per second, and speed-ups.

Throughput counts tokens, not samples: a prefill of a batch handles batch x prompt_len tokens, a step
makes one token for every sequence of the batch.
"""

from __future__ import annotations

from harness.errors import NotApplicable
from harness.measure.meter import Measured
from harness.measure.scenario_timing import scenario_times
from harness.measure.statistics import record_from_samples
from harness.measure.timing import Timed
from harness.records import Record

__all__ = [
    "control_latency",
    "decode_latency",
    "decode_throughput",
    "end_to_end_latency",
    "prefill_latency",
    "prefill_throughput",
    "speedups",
    "tokens_per_second",
]


def prefill_latency(measured: Measured) -> list[Record]:
    """Seconds from the prompt to the logits of its last position, the cache filled (TTFT)."""
    return [_record("prefill_latency", scenario_times(measured).own.prefill)]


def prefill_throughput(measured: Measured) -> list[Record]:
    """Prompt tokens of the whole batch per second."""
    scenario = measured.scenario
    tokens = scenario.batch_size * scenario.prompt_len
    return [_throughput("prefill_throughput", scenario_times(measured).own.prefill, tokens)]


def decode_latency(measured: Measured) -> list[Record]:
    """Seconds of one step, which makes one token for each sequence (TPOT)."""
    return [_record("decode_latency", _decode(measured))]


def decode_throughput(measured: Measured) -> list[Record]:
    """New tokens of the whole batch per second."""
    return [_throughput("decode_throughput", _decode(measured), measured.scenario.batch_size)]


def end_to_end_latency(measured: Measured) -> list[Record]:
    """Seconds from the prompt to the last new token, measured as one run."""
    _decode(measured)
    return [_record("end_to_end_latency", scenario_times(measured).own.end_to_end)]


def speedups(measured: Measured) -> list[Record]:
    """Baseline time over variant time, round by round in one process; above 1 is faster.

    Nothing for the baseline itself, and where the two do not fit into memory together: then the record
    of the control says so.
    """
    pair = scenario_times(measured).pair
    if pair is None:
        raise NotApplicable("nothing was timed in turn with this")
    return [
        Record(
            f"{phase}_speedup",
            ratio.value,
            "x",
            ratio.lower,
            ratio.upper,
            len(ratio.samples),
            ratio.samples,
            f"{pair.modes[phase]}, paired",
            pair.notes[phase],
        )
        for phase, ratio in pair.speedups.items()
    ]


def control_latency(measured: Measured) -> list[Record]:
    """Seconds of a fixed workload that was timed in the same rounds."""
    times = scenario_times(measured)
    note = times.control.note if times.alone is None else f"{times.control.note}; {times.alone}"
    mode = times.control.mode
    return [record_from_samples("control_latency", "s", times.control.samples_s, mode=mode, note=note)]


def tokens_per_second(latency_s: float, tokens: int) -> float:
    """Throughput of a call that handles so many tokens, over the whole batch.

    >>> tokens_per_second(0.5, tokens=8 * 128)
    2048.0
    """
    return tokens / latency_s


def _record(metric: str, timed: Timed) -> Record:
    return record_from_samples(metric, "s", timed.samples_s, mode=timed.mode, note=timed.note)


def _throughput(metric: str, timed: Timed, tokens: int) -> Record:
    samples = [tokens_per_second(second, tokens) for second in timed.samples_s]
    return record_from_samples(metric, "tokens/s", samples, mode=timed.mode, note=timed.note)


def _decode(measured: Measured) -> Timed:
    if measured.scenario.new_tokens == 0:
        raise NotApplicable(f"{measured.scenario.label} decodes nothing")
    timed = scenario_times(measured).own.decode
    assert timed is not None
    return timed
