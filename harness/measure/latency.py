"""The meters of time: prefill, decode, end to end, and what they make in tokens per second.

Throughput counts tokens, not samples: a prefill of a batch handles batch x prompt_len tokens, a step
makes one token for every sequence of the batch.
"""

from __future__ import annotations

from harness.errors import NotApplicable
from harness.measure.generation import random_prompt
from harness.measure.meter import Measured
from harness.measure.statistics import record_from_samples
from harness.measure.timing import GenerationTimes, Timed, time_forward, time_generation
from harness.records import Record

__all__ = [
    "decode_latency",
    "decode_throughput",
    "end_to_end_latency",
    "prefill_latency",
    "prefill_throughput",
    "tokens_per_second",
]

_SHARED = "generation_times"


def prefill_latency(measured: Measured) -> list[Record]:
    """Seconds from the prompt to the logits of its last position, the cache filled (TTFT)."""
    return [_record("prefill_latency", _prefill(measured))]


def prefill_throughput(measured: Measured) -> list[Record]:
    """Prompt tokens of the whole batch per second."""
    scenario = measured.scenario
    tokens = scenario.batch_size * scenario.prompt_len
    return [_throughput("prefill_throughput", _prefill(measured), tokens)]


def decode_latency(measured: Measured) -> list[Record]:
    """Seconds of one step, which makes one token for each sequence (TPOT)."""
    return [_record("decode_latency", _decode(measured))]


def decode_throughput(measured: Measured) -> list[Record]:
    """New tokens of the whole batch per second."""
    return [_throughput("decode_throughput", _decode(measured), measured.scenario.batch_size)]


def end_to_end_latency(measured: Measured) -> list[Record]:
    """Seconds from the prompt to the last new token, measured as one run."""
    _decode(measured)
    return [_record("end_to_end_latency", _times(measured).end_to_end)]


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


def _prefill(measured: Measured) -> Timed:
    return _times(measured).prefill


def _decode(measured: Measured) -> Timed:
    if measured.scenario.new_tokens == 0:
        raise NotApplicable(f"{measured.scenario.label} decodes nothing")
    timed = _times(measured).decode
    assert timed is not None
    return timed


def _times(measured: Measured) -> GenerationTimes:
    """Timed once a cell, whichever meter asks first."""
    if _SHARED not in measured.shared:
        measured.shared[_SHARED] = _time(measured)
    times = measured.shared[_SHARED]
    assert isinstance(times, GenerationTimes)
    return times


def _time(measured: Measured) -> GenerationTimes:
    scenario = measured.scenario
    prompt = random_prompt(
        measured.info.vocab_size,
        scenario.batch_size,
        scenario.prompt_len,
        measured.seed,
        measured.device,
    )
    model = measured.model.eval()
    if measured.info.kind == "encoder":
        forward = time_forward(model, prompt)
        return GenerationTimes(prefill=forward, decode=None, end_to_end=forward)
    return time_generation(model, prompt, scenario.new_tokens)
