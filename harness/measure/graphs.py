"""Capturing a call into a CUDA graph, or saying why it cannot be.

A graph replays the kernels of a call without the host: what remains is the time of the kernels, which
is what a method changes. Where a call asks the host something (`.item()`, a copy from the host, a
Python branch on a tensor) it cannot be captured, and is timed eagerly with the reason in the record.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from harness.measure.generation import Generation

__all__ = ["Call", "masks_known_on_host", "prepare_call", "prepare_generation"]

WARM_UP_CALLS = 3  # autotuning, compilation, workspaces of libraries


@dataclass(frozen=True, slots=True)
class Call:
    """A call that is ready to be timed: `mode` is ``graph``, ``eager`` or ``cpu``, `note` why."""

    run: Callable[[], torch.Tensor]
    mode: str
    note: str | None = None


def prepare_generation(generation: Generation) -> tuple[Call, Call]:
    """Prefill and decode step of a generation, warmed up and captured where possible.

    Leaves the generation in need of a `reset`. A CUDA out-of-memory error is not caught.
    """
    device, problem = generation.prompt.device, generation.capture_problem
    prefill = prepare_call(generation.prefill, device, generation.reset, problem)
    step = prepare_call(generation.step, device, generation.rewind, problem)
    if prefill.mode == "graph":
        replay = prefill.run

        def replayed_prefill() -> torch.Tensor:
            logits = replay()
            generation.prefill_was_replayed()
            return logits

        prefill = replace(prefill, run=replayed_prefill)
    return prefill, step


def prepare_call(
    function: Callable[[], torch.Tensor],
    device: torch.device,
    before: Callable[[], None] = lambda: None,
    problem: str | None = None,
) -> Call:
    """A function without arguments as a `Call`: warmed up, and captured on CUDA where possible.

    Args:
        function: reads and writes tensors of fixed address only, the same ones in every call.
        before: brings the state back to where the function can run; called before each run here.
        problem: a known reason why it cannot be captured.
    """
    if device.type != "cuda":
        before()
        function()
        return Call(function, "cpu")
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_CALLS):
                before()
                function()
        torch.cuda.current_stream().wait_stream(stream)
        problem = problem or _asks_the_host(function, before)
        if problem is not None:
            return Call(function, "eager", problem)
        return _captured(function, before, stream)


def _asks_the_host(function: Callable[[], Any], before: Callable[[], None]) -> str | None:
    """Run once with synchronisation forbidden: finds nearly all that would break a capture.

    A failed capture leaves the allocator and the random generators of the process in doubt, so it is
    better not begun.
    """
    before()
    torch.cuda.synchronize()
    mode = torch.cuda.get_sync_debug_mode()
    try:
        with warnings.catch_warnings(), masks_known_on_host():
            warnings.simplefilter("ignore")  # "prototype feature"
            torch.cuda.set_sync_debug_mode("error")
            function()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        return f"cannot be captured: {_first_line(error)}"
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    return None


def _captured(
    function: Callable[[], torch.Tensor], before: Callable[[], None], stream: torch.cuda.Stream
) -> Call:
    before()
    gc.collect()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        # The outer stream context restores the stream even where ending the capture fails.
        with torch.cuda.stream(stream), masks_known_on_host(), torch.cuda.graph(graph, stream=stream):
            output = function()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        _settle_after_failed_capture()
        return Call(function, "eager", f"capture failed: {_first_line(_root(error))}")

    def replay() -> torch.Tensor:
        graph.replay()
        return output

    return Call(replay, "graph")


def _settle_after_failed_capture() -> None:
    # The default generator still believes that it is being captured and would refuse to draw; a
    # capture that succeeds ends that state.
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    scratch = torch.zeros(1, device="cuda")
    with torch.cuda.graph(graph):
        scratch.add_(1)
    torch.cuda.synchronize()


@contextmanager
def masks_known_on_host() -> Iterator[None]:
    """Let transformers leave out attention masks without reading them, because nothing is padded.

    transformers drops the mask where it hides nothing, so that attention takes its fast causal path.
    To know that, it reads the padding mask, which a capture forbids; and while a stream is captured
    it keeps every mask. Timed batches have no padding: the answer is known without looking.
    """
    from transformers import masking_utils

    answers: dict[str, Callable[..., bool]] = {
        "_ignore_causal_mask_sdpa": _causal_mask_hides_nothing,
        "_ignore_bidirectional_mask_sdpa": _bidirectional_mask_hides_nothing,
    }
    originals = {name: getattr(masking_utils, name, None) for name in answers}
    known = {name: original for name, original in originals.items() if original is not None}
    try:
        for name in known:
            setattr(masking_utils, name, answers[name])
        yield
    finally:
        for name, original in known.items():
            setattr(masking_utils, name, original)


def _causal_mask_hides_nothing(
    _padding_mask: Any,
    q_length: int,
    kv_length: int,
    q_offset: Any,
    _kv_offset: Any = 0,
    local_attention_size: int | None = None,
) -> bool:
    if local_attention_size is not None and kv_length >= local_attention_size:
        return False
    empty_cache = isinstance(q_offset, int) and q_offset == 0
    return q_length == 1 or kv_length == q_length or empty_cache


def _bidirectional_mask_hides_nothing(
    _padding_mask: Any, kv_length: int, local_attention_size: int | None = None
) -> bool:
    return local_attention_size is None or kv_length < local_attention_size


def _root(error: BaseException) -> BaseException:
    """The first error of a chain: ending a broken capture raises a second one."""
    while error.__context__ is not None:
        error = error.__context__
    return error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__
