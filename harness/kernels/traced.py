"""Reading the graph that torch.compile hands to its backend, and joining calls in it."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = [
    "Changes",
    "Groups",
    "example_of",
    "is_input",
    "join",
    "join_groups",
    "operand_of",
    "same_values",
    "several",
    "source_of",
    "value_read",
]

_RESHAPES = ("reshape", "view")
_OPERATORS = (
    *("iadd", "isub", "imul", "imatmul", "itruediv", "ifloordiv", "imod", "ipow"),
    *("iand", "ior", "ixor", "ilshift", "irshift", "setitem"),
)
"""Of Python's `operator`: those that change their first argument; methods of tensors have two lines around
the name."""
_PURE_METHODS = frozenset(("reshape", "view", "float", "abs", "amax", "clamp", "to"))
_PURE_FUNCTIONS = frozenset(
    (torch.full_like, torch.ones_like, torch.where, torch.round, operator.truediv, operator.mul, operator.lt)
)


def example_of(node: Any) -> torch.Tensor | None:
    """The tensor that stands for a node's value while it is traced; None for anything else.

    A class of tensors of its own (torchao's quantized ones) is something else: it has the type and the shape
    of what it stands for, and nothing that a kernel could read.
    """
    value = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    is_plain = isinstance(value, torch.Tensor) and not is_traceable_wrapper_subclass(value)
    return value if is_plain else None


def operand_of(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """What a call is given for a parameter, by place or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def is_input(node: Any) -> bool:
    """Whether a node is an input of the graph, which exists before anything is computed."""
    return isinstance(node, fx.Node) and node.op in ("placeholder", "get_attr")


def source_of(node: Any) -> tuple[Any, ...]:
    """The tensor behind a reshaped one, with the shape it has got: layers flatten the same x each for
    itself."""
    value = example_of(node)
    return _steps(node)[-1], None if value is None else (value.dtype, *value.shape)


def _steps(node: Any) -> list[Any]:
    """A node, what it is a reshaped form of, and so on."""
    steps = [node]
    while isinstance(node, fx.Node) and node.op == "call_method" and node.target in _RESHAPES:
        node = node.args[0]
        steps.append(node)
    return steps


class Changes:
    """Where a graph changes tensors in place, as it was when this was made.

    A call that is moved across such a place may read other numbers than it did. Tensors are the same where
    they lie in the same memory, as views of each other do; of what is not known everything is assumed.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self._places = {node: place for place, node in enumerate(graph.nodes)}
        self._changed = [
            (place, {_memory_of(each) for each in changed})
            for node, place in self._places.items()
            if (changed := _changed_by(node))
        ]

    def begin(self, call: fx.Node) -> int:
        """The place where a call begins to read: the first reshaping of what it is given, which may copy."""
        steps = [_steps(each)[:-1] for each in call.all_input_nodes]
        return min(self._places[node] for node in (call, *(step for some in steps for step in some)))

    def between(self, begin: int | fx.Node, end: fx.Node, read: Iterable[fx.Node]) -> bool:
        """Whether one of the nodes `read`, or what it is a reshaped form of, may be changed between two
        places, which do not count themselves."""
        first = begin if isinstance(begin, int) else self._places[begin]
        last = self._places[end]
        memory = {_memory_of(step) for node in read for step in _steps(node)}
        return any(
            first < place < last and (None in memory or None in changed or not memory.isdisjoint(changed))
            for place, changed in self._changed
        )


def _memory_of(node: Any) -> int | None:
    """What is the same for tensors in the same memory; None where it is not known."""
    value = example_of(node)
    if value is None or value.layout != torch.strided:
        return None
    place: int = value.untyped_storage()._cdata
    return place


def _changed_by(node: fx.Node) -> list[fx.Node]:
    """The nodes whose tensors a node may change in place."""
    if node.op == "call_method":
        return _nodes_in(node.args[0]) if _names_a_change(str(node.target)) else []
    if node.op != "call_function":
        return node.all_input_nodes if node.op == "call_module" else []
    target = node.target
    if isinstance(target, torch._ops.HigherOrderOperator):  # a graph or a kernel of its own
        return node.all_input_nodes
    if isinstance(target, torch._ops.OpOverloadPacket):
        schemas = [getattr(target, name)._schema for name in target.overloads()]
        return node.all_input_nodes if any(schema.is_mutable for schema in schemas) else []
    if isinstance(target, torch._ops.OpOverload):
        written = [
            operand_of(node, place, argument.name)
            for place, argument in enumerate(target._schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        return _nodes_in(written)
    if _names_a_change(getattr(target, "__name__", "")):
        return _nodes_in(node.args[0])
    place = _place_of_inplace(target)
    if place is not None and operand_of(node, place, "inplace", False) is not False:
        return node.all_input_nodes
    return _nodes_in(node.kwargs.get("out"))


def _names_a_change(name: str) -> bool:
    """Whether a method or a function of this name changes its first argument."""
    if name.endswith("__"):
        return name.strip("_") in _OPERATORS
    return name.endswith("_") or name in _OPERATORS


@functools.cache
def _place_of_inplace(function: Any) -> int | None:
    """The place of the parameter ``inplace`` of a function; None where there is none."""
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # built in, which have no such parameter
        return None
    return names.index("inplace") if "inplace" in names else None


def _nodes_in(operand: Any) -> list[fx.Node]:
    """The nodes in an argument, which may be a list or anything else."""
    found: list[fx.Node] = []
    fx.map_arg(operand, found.append)
    return found


class Groups:
    """Calls that read the same numbers, which may therefore become one where the first of them is."""

    def __init__(self, graph: fx.Graph) -> None:
        self._changes = Changes(graph)
        self._open: dict[tuple[Any, ...], tuple[int, list[fx.Node]]] = {}
        self._all: list[list[fx.Node]] = []

    def __iter__(self) -> Iterator[list[fx.Node]]:
        return iter(self._all)

    def add(self, key: tuple[Any, ...], call: fx.Node) -> None:
        """Add a call, the next one of the graph, to those with the same key, unless what they read may be
        changed between the first of them and this one."""
        begin, calls = self._open.get(key, (self._changes.begin(call), []))
        begin = min(begin, self._changes.begin(call))
        read = {node for each in (*calls, call) for node in each.all_input_nodes}
        if not calls or self._changes.between(begin, call, read):
            begin, calls = self._changes.begin(call), []
            self._all.append(calls)
        calls.append(call)
        self._open[key] = begin, calls


def same_values(graph: fx.Graph) -> dict[fx.Node, tuple[int, int]]:
    """A number for each node's value, and how many nodes before it change something in place.

    Each layer rounds x for itself; this sees that the outcome is the same. Two nodes with the same pair have
    the same value for all that come before the next change (`value_read`). Only the arithmetic of rounding
    counts; any other node has a number of its own.
    """
    known: dict[Hashable, int] = {}  # what makes up a value, and its number
    found: dict[fx.Node, tuple[int, int]] = {}
    changed = 0
    for node in graph.nodes:
        is_own = _changes_own(node)
        if _changed_by(node) and not is_own:
            changed += 1
        found[node] = len(known), changed
        key = (changed, _arithmetic(node, found)) if _is_pure(node) or is_own else node
        found[node] = known.setdefault(key, len(known)), changed
    return found


def value_read(values: dict[fx.Node, tuple[int, int]], node: fx.Node, reader: fx.Node) -> Hashable:
    """What a reader finds in a node: the same for two readers only where they find the same value, if both
    come after the same number of changes (the second of `same_values`)."""
    # What one of two nodes had before a change may be what was changed.
    return values[node] if values[node][1] == values[reader][1] else node


def _arithmetic(node: fx.Node, values: dict[fx.Node, tuple[int, int]]) -> Hashable:
    """A call and the values that it reads, as text, which tells 1, 1.0 and True apart."""

    def read(each: fx.Node) -> str:
        return f"value {value_read(values, each, node)}"

    args, kwargs = fx.map_arg([*node.args], read), fx.map_arg(dict(node.kwargs), read)
    return node.target, repr(args), repr(sorted(kwargs.items()))


def _is_pure(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in _PURE_METHODS
    return node.op == "call_function" and node.target in _PURE_FUNCTIONS and not _changed_by(node)


def _changes_own(node: fx.Node) -> bool:
    """Whether a node clamps what was rounded for nothing else."""
    if node.op != "call_method" or node.target != "clamp_":
        return False
    of = node.args[0]
    return isinstance(of, fx.Node) and of.target is torch.round and len(of.users) == 1


def several(groups: Iterable[Sequence[fx.Node]], most: int) -> Iterator[Sequence[fx.Node]]:
    """Groups of calls in parts of at most `most`; what is left of one alone is no part."""
    for calls in list(groups):  # read before anything is joined
        for start in range(0, len(calls), most):
            if len(some := calls[start : start + most]) > 1:
                yield some


def join_groups(
    module: fx.GraphModule,
    groups: Iterable[Sequence[fx.Node]],
    most: int,
    join_calls: Callable[[fx.Graph, Sequence[fx.Node]], None],
) -> int:
    """Make one call of each group, or of each `most` calls in it, with `join_calls`; how many were joined."""
    joined = 0
    for calls in several(groups, most):
        join_calls(module.graph, calls)
        joined += len(calls)
    if joined:
        module.graph.lint()
        module.recompile()
    return joined


def join(
    graph: fx.Graph, calls: Sequence[fx.Node], target: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    """Put one call, which has a list of their results, where the first of several calls is."""
    with graph.inserting_before(calls[0]):
        products = graph.call_function(target, arguments)
        for position, call in enumerate(calls):
            product = graph.call_function(operator.getitem, (products, position))
            product.meta["example_value"] = call.meta["example_value"]
            call.replace_all_uses_with(product)
    for call in calls:
        graph.erase_node(call)
