"""Compiling a call and capturing it into a CUDA graph, or saying why it cannot be.

A graph replays the kernels of a call without the host: what remains is the time of the kernels, which
is what a method changes. Where the buffers of a graph lie in memory moves its time by some tenths of a per
cent, for as long as the graph lives: a call that is to be compared is captured several times.

Compiled, a model runs fewer and better kernels: what separates two methods is
then what separates them in a serving engine, not what eager execution adds to both. Where a call asks
the host something (`.item()`, a copy from the host, a Python branch on a tensor) it cannot be captured,
and is timed eagerly with the reason in the record.
"""

from __future__ import annotations

import functools
import gc
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from harness.errors import NotApplicable, first_line
from harness.measure.agreement import Agreement
from harness.measure.generation import Generation, forward_only
from harness.measure.known_masks import masks_known_on_host

__all__ = [
    "CAPTURES",
    "Call",
    "More",
    "no_more",
    "prepare_call",
    "prepare_forward",
    "prepare_generation",
]

WARM_UP_CALLS = 3  # autotuning, compilation, workspaces of libraries
CAPTURES = 4
"""How often a call is captured that is to be compared."""

More = Callable[[int], bool]
"""Asked before each further capture, with the bytes that the last one took: whether there is room."""


def no_more(_taken_bytes: int) -> bool:
    """One capture is enough."""
    return False


@dataclass(frozen=True, slots=True)
class Call:
    """A call that is ready to be timed.

    Attributes:
        mode: ``compiled`` (torch.compile, captured into a CUDA graph), ``graph`` (captured), ``eager``
            or ``cpu``.
        note: why it is not ``compiled``, or that it is so in pieces and why.
        keeps: what a replay reads and writes: a CUDA graph knows addresses only, so it must not be freed.
        taken_bytes: what the first capture took of the device's memory.
        again: further captures of the same call, whose buffers lie elsewhere.
    """

    run: Callable[[], torch.Tensor]
    mode: str
    note: str | None = None
    keeps: Any = field(default=None, repr=False, compare=False)
    taken_bytes: int = field(default=0, compare=False)
    again: tuple[Callable[[], torch.Tensor], ...] = field(default=(), repr=False, compare=False)

    @property
    def captures(self) -> int:
        """How many captures there are; 1 where the call is none."""
        return 1 + len(self.again)

    def run_capture(self, index: int) -> torch.Tensor:
        """Run the capture of this number, counted round and round."""
        return (self.run, *self.again)[index % self.captures]()

    @property
    def is_captured(self) -> bool:
        """Whether `run` replays a CUDA graph."""
        return self.mode in ("compiled", "graph")


def prepare_generation(generation: Generation, more: More = no_more) -> tuple[Call, Call]:
    """Prefill and decode step of a generation: compiled and captured where possible, else captured
    where possible.

    Leaves the generation in need of a `reset`. A CUDA out-of-memory error is not caught.

    Args:
        more: whether to capture once more, up to `CAPTURES` times in all.
    """

    def outputs(calls: Sequence[Callable[[], torch.Tensor]]) -> list[torch.Tensor]:
        return _outputs(generation, *calls)

    prefill, step = _prepare(
        generation.model,
        generation.prompt.device,
        lambda: _prepare_pair(generation, more),
        (generation.prefill, generation.step),
        outputs,
        generation.capture_problem,
    )
    return prefill, step


def prepare_forward(model: nn.Module, tokens: torch.Tensor, more: More = no_more) -> Call:
    """One forward pass over `tokens` (int64 [batch, tokens]), as `prepare_generation`."""

    def forward() -> torch.Tensor:
        return forward_only(model, tokens)

    [call] = _prepare(
        model,
        tokens.device,
        lambda: (prepare_call(forward, tokens.device, more=more),),
        (forward,),
        lambda calls: [calls[0]().clone()],
        None,
    )
    return call


def _prepare(
    model: nn.Module,
    device: torch.device,
    prepare: Callable[[], tuple[Call, ...]],
    eager: Sequence[Callable[[], torch.Tensor]],
    outputs: Callable[[Sequence[Callable[[], torch.Tensor]]], list[torch.Tensor]],
    problem: str | None,
) -> tuple[Call, ...]:
    """The calls in the best mode there is for them.

    Args:
        prepare: warms the calls up and captures them.
        eager: the same calls as they are.
        outputs: what calls give, to be compared.
        problem: a known reason why they cannot be captured.
    """
    from harness.measure.compiling import compile_problem

    if device.type != "cuda":
        return prepare()
    problem = problem or compile_problem(model)
    if problem is None:
        with torch.cuda.device(device):
            check = Agreement(model, lambda: outputs(eager))
            calls, problem = _compiled_calls(
                model, prepare, lambda calls: check.problem(outputs([call.run for call in calls]))
            )
        if calls is not None:
            return calls
    return tuple(_noted(call, problem) for call in prepare())


def _compiled_calls(
    model: nn.Module,
    prepare: Callable[[], tuple[Call, ...]],
    disagreement: Callable[[tuple[Call, ...]], str | None],
) -> tuple[tuple[Call, ...] | None, str | None]:
    """The calls compiled and captured, or None with the reason."""
    from harness.measure.compiling import broken_graphs, compiled

    try:
        with masks_known_on_host(), compiled(model) as code:
            calls = prepare()
            pieces = broken_graphs()
    except torch.OutOfMemoryError:
        raise
    except NotApplicable as error:
        return None, str(error)
    except RuntimeError as error:  # the compiler's errors are RuntimeErrors
        return None, f"compilation failed: {first_line(getattr(error, 'inner_exception', error))}"
    failed = next((call for call in calls if not call.is_captured), None)
    problem = disagreement(calls) if failed is None else failed.note
    if problem is not None:
        return None, problem
    return tuple(
        replace(call, mode="compiled", note=pieces, keeps=(call.keeps, code)) for call in calls
    ), None


def _prepare_pair(generation: Generation, more: More) -> tuple[Call, Call]:
    device, problem = generation.prompt.device, generation.capture_problem
    # Of each first the one capture it cannot do without: the compiler needs room for the step, too.
    prefill = prepare_call(generation.prefill, device, generation.reset, problem)
    step = prepare_call(generation.step, device, generation.rewind, problem)
    prefill = _captured_again(prefill, generation.prefill, generation.reset, device, more)
    step = _captured_again(step, generation.step, generation.rewind, device, more)
    if prefill.is_captured:
        first, *again = (_telling(generation, replay) for replay in (prefill.run, *prefill.again))
        prefill = replace(prefill, run=first, again=tuple(again))
    return prefill, step


def _telling(generation: Generation, replay: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    def replayed_prefill() -> torch.Tensor:
        logits = replay()
        generation.prefill_was_replayed()
        return logits

    return replayed_prefill


@torch.inference_mode()
def _outputs(
    generation: Generation, prefill: Callable[[], torch.Tensor], step: Callable[[], torch.Tensor]
) -> list[torch.Tensor]:
    """Logits of a prefill and of one step that reads a fixed token, so that runs can be compared."""
    generation.reset()
    first = prefill().clone()
    generation.token.fill_(0)
    return [first, step().clone()]


def _noted(call: Call, problem: str | None) -> Call:
    """Why it is not compiled, unless there is already a reason for less."""
    return call if call.note is not None or problem is None else replace(call, note=problem)


def prepare_call(
    function: Callable[[], torch.Tensor],
    device: torch.device,
    before: Callable[[], None] = lambda: None,
    problem: str | None = None,
    more: More = no_more,
) -> Call:
    """A function without arguments as a `Call`: warmed up, and captured on CUDA where possible.

    Args:
        function: reads and writes tensors of fixed address only, the same ones in every call.
        before: brings the state back to where the function can run; called before each run here.
        problem: a known reason why it cannot be captured.
        more: whether to capture once more, up to `CAPTURES` times in all.
    """
    if device.type != "cuda":
        before()
        function()
        return Call(function, "cpu")
    with torch.cuda.device(device):
        stream = _side_stream(torch.cuda.current_device())
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_CALLS):
                before()
                function()
        torch.cuda.current_stream().wait_stream(stream)
        problem = problem or _asks_the_host(function, before)
        if problem is not None:
            return Call(function, "eager", problem)
        return _captured_again(_captured(function, before, stream), function, before, device, more)


@functools.cache
def _side_stream(_device: int) -> torch.cuda.Stream:
    """The stream that calls are warmed up and captured on, one for a device.

    cuBLAS keeps tens of megabytes for every stream it has run on, for as long as the process lives.
    """
    return torch.cuda.Stream()


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
        return f"cannot be captured: {first_line(error)}"
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    return None


def _captured(
    function: Callable[[], torch.Tensor], before: Callable[[], None], stream: torch.cuda.Stream
) -> Call:
    try:
        replay, taken = _capture_and_weigh(function, before, stream)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        _settle_after_failed_capture()
        return Call(function, "eager", f"capture failed: {first_line(_root(error))}")
    return Call(replay, "graph", keeps=function, taken_bytes=taken)


def _captured_again(
    call: Call,
    function: Callable[[], torch.Tensor],
    before: Callable[[], None],
    device: torch.device,
    more: More,
) -> Call:
    """A captured call of this function with as many captures as there should be and is room for."""
    if not call.is_captured:
        return call
    again: list[Callable[[], torch.Tensor]] = []
    taken = call.taken_bytes
    with torch.cuda.device(device):
        stream = _side_stream(torch.cuda.current_device())
        while 1 + len(again) < CAPTURES and more(taken):
            try:
                replay, taken = _capture_and_weigh(function, before, stream)
            except torch.OutOfMemoryError:  # there was less room than it seemed: what there is must do
                _settle_after_failed_capture()
                break
            again.append(replay)
    return replace(call, again=tuple(again))


def _capture_and_weigh(
    function: Callable[[], torch.Tensor], before: Callable[[], None], stream: torch.cuda.Stream
) -> tuple[Callable[[], torch.Tensor], int]:
    """A capture, and what it took of the device's memory."""
    # What earlier calls left behind is given back before a capture in any case, and would count as its own.
    torch.cuda.empty_cache()
    held = torch.cuda.memory_reserved()
    replay = _capture(function, before, stream)
    return replay, torch.cuda.memory_reserved() - held


def _capture(
    function: Callable[[], torch.Tensor], before: Callable[[], None], stream: torch.cuda.Stream
) -> Callable[[], torch.Tensor]:
    before()
    gc.collect()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # The outer stream context restores the stream even where ending the capture fails.
    with torch.cuda.stream(stream), masks_known_on_host(), torch.cuda.graph(graph, stream=stream):
        output = function()

    def replay() -> torch.Tensor:
        graph.replay()
        return output

    return replay


def _settle_after_failed_capture() -> None:
    # The default generator still believes that it is being captured and would refuse to draw; a
    # capture that succeeds ends that state.
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    scratch = torch.zeros(1, device="cuda")
    with torch.cuda.graph(graph):
        scratch.add_(1)
    torch.cuda.synchronize()


def _root(error: BaseException) -> BaseException:
    """The first error of a chain: ending a broken capture raises a second one."""
    while error.__context__ is not None:
        error = error.__context__
    return error
