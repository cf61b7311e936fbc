"""Compiling the blocks of a model for the calls that are timed, and leaving the model as it was.

All blocks of a Transformer run the same code: dynamo traces the first one for each shape and the others
reuse what was compiled, which takes seconds where the whole model would take a minute. Two things stand
in the way and are taken out of it:

- a block tells the cache which layer it is, so that its number would become part of what was compiled:
  each block gets a cache of its own layer (`LayerCache`) instead;
- libraries and the compiler's own kernels leave bandwidth unused at one row: the traced graph is
  rewritten to the harness's kernels for one row and for a decode step's attention
  (`harness.kernels.rewriting` and the modules named after it) before it is compiled.

Modules outside the blocks run as they are, but for the head, the largest matrix of all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import fx, nn

from harness.errors import NotApplicable
from harness.measure.static_cache import FixedCache
from harness.nn.anatomy import anatomy_of, blocks_of

__all__ = ["broken_graphs", "compile_problem", "compiled"]

Backend = Callable[[fx.GraphModule, list[Any]], Callable[..., Any]]


def compile_problem(model: nn.Module) -> str | None:
    """Why the blocks of a model cannot be compiled; None where they might."""
    if hasattr(model, "_orig_mod"):
        return "the method compiled the model itself"
    try:
        blocks_of(model)
    except NotApplicable as error:
        return f"not compiled: {error}"
    return None


@contextmanager
def compiled(model: nn.Module, backend: Backend | None = None) -> Iterator[list[Any]]:
    """Inside, the blocks and the head of the model run compiled; afterwards as before.

    What is compiled is for the shapes of the calls made inside, and forgotten when the next `compiled`
    begins.

    Args:
        backend: as of `torch.compile`; inductor behind `rewrite_linears` and `rewrite_decode_attention` by
            default.

    Raises:
        NotApplicable: the blocks differ so much that each would be compiled for itself.

    Yields:
        a list that fills with the compiled code. Whoever captures a CUDA graph inside must keep it: the
        graph reads constants that belong to the code.
    """
    import torch._dynamo
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters["graph_break"].clear()
    code: list[Any] = []
    make = backend or _rewritten_inductor

    def keeping(module: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        code.append(make(module, inputs))
        made: Callable[..., Any] = code[-1]
        return made

    modules = [module for _, module in blocks_of(model)]
    head = _head(model)
    try:
        for index, module in enumerate(modules):
            call = torch.compile(module._call_impl, backend=keeping, dynamic=False)
            _set_call(module, _with_own_layer(call, index))
        if head is not None:
            _set_call(head, torch.compile(_traceable(head), backend=keeping, dynamic=False))
        # Beyond its limit dynamo would run the blocks that are left as they are, and say so in a log only.
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
            yield code
    except torch._dynamo.exc.FailOnRecompileLimitHit:
        reason = "more blocks than the compiler's limit need code of their own"
        raise NotApplicable(f"not compiled: {reason}") from None
    finally:
        for module in [*modules, *([] if head is None else [head])]:
            _set_call(module, None)


def broken_graphs() -> str | None:
    """How often the compiler gave up following a block since the last `compiled` began, and compiled it in
    pieces, and why first. None where it did not.

    Nothing is fused across a break, and rewritings do not see what lies on both sides.
    """
    from torch._dynamo.utils import counters

    breaks = counters["graph_break"]
    total = sum(breaks.values())
    if not total:
        return None
    times = "once" if total == 1 else f"{total} times"
    first = next(iter(breaks)).strip().partition("\n")[0].rstrip(".: ")
    return f"compiled in pieces: dynamo broke off {times}, first at: {first}"


def _set_call(module: nn.Module, call: Callable[..., Any] | None) -> None:
    # What `nn.Module.compile` sets; a wrapper module would change the names of the modules.
    module._compiled_call_impl = call


def _traceable(module: nn.Module) -> Callable[..., Any]:
    """The call of a module of torch's own, which dynamo passes over where it is not called from outside."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return module._call_impl(*args, **kwargs)

    return call


def _head(model: nn.Module) -> nn.Module | None:
    for name in anatomy_of(model).head:
        try:
            head = model.get_submodule(name)
        except AttributeError:
            continue
        return head if isinstance(head, nn.Linear) else None
    return None


def _with_own_layer(call: Callable[..., Any], index: int) -> Callable[..., Any]:
    """`call` with every `FixedCache` among its arguments replaced by its layer `index`."""

    def own(value: Any) -> Any:
        return value.layer_cache(index) if isinstance(value, FixedCache) else value

    def run(*args: Any, **kwargs: Any) -> Any:
        return call(*map(own, args), **{name: own(value) for name, value in kwargs.items()})

    return run


def _rewritten_inductor(module: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    from torch._inductor.compile_fx import compile_fx

    from harness.kernels.rewriting import rewrite_linears
    from harness.kernels.rewriting_attention import rewrite_decode_attention
    from harness.kernels.rewriting_int8 import join_int8
    from harness.kernels.rewriting_residual import fold_residuals
    from harness.kernels.rewriting_sparse import join_sparse

    rewrite_linears(module)
    join_int8(module)
    join_sparse(module)
    fold_residuals(module)
    rewrite_decode_attention(module)
    made: Any = compile_fx(module, inputs, config_patches=_options(inputs))
    return made  # type: ignore[no-any-return]


def _options(inputs: list[Any]) -> dict[str, Any]:
    """Of the compiler: on CUDA small kernels that do not wait for each other share a launch."""
    return {"combo_kernels": any(getattr(value, "is_cuda", False) for value in inputs)}
