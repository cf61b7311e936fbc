"""Is a message what its types say? Both sides ask: the worker, so that a method's odd record fails its own
cell with a clear reason, and the parent, because a worker's code may have been changed by a plugin."""

from __future__ import annotations

import dataclasses
import enum
import functools
import types
import typing
from collections import Counter
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any, TypeVar

from harness.records import CellResult

__all__ = ["conforming"]

T = TypeVar("T")
_LARGEST = 2**63 - 1


def conforming(message: T) -> T:
    """The same message with plain values only: numpy's and torch's numbers become Python's.

    Raises:
        ValueError: a value of the wrong type, with where it is and what it is.
    """
    checked: T = _dataclass(message, type(message).__name__)
    if isinstance(checked, CellResult):
        counted = Counter((item.metric, item.index) for item in checked.items)
        if doubled := next((pair for pair, count in counted.items() if count > 1), None):
            raise ValueError(f"item {doubled[1]} has two outcomes of {doubled[0]!r}")
    return checked


def _dataclass(value: Any, where: str) -> Any:
    fields = {
        name: _checked(getattr(value, name), hint, f"{where}.{name}")
        for name, hint in _hints(value.__class__).items()
    }
    return type(value)(**fields)


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _checked(value: Any, hint: Any, where: str) -> Any:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return _union(value, typing.get_args(hint), where)
    if origin is tuple:
        return _tuple(value, typing.get_args(hint), where)
    if hint is Any or origin is not None:
        plain = _json(value, where)
        if isinstance(origin, type) and issubclass(origin, Mapping) and not isinstance(plain, dict):
            raise _wrong(value, "a mapping", where)
        return plain
    if dataclasses.is_dataclass(hint):
        if type(value) is not hint:
            raise _wrong(value, f"a {getattr(hint, '__name__', hint)}", where)
        return _dataclass(value, f"{where}[{value.metric!r}]" if hasattr(value, "metric") else where)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        if type(value) is not hint:
            raise _wrong(value, f"a {hint.__name__}", where)
        return value
    return _scalar(value, hint, where)


def _union(value: Any, hints: tuple[Any, ...], where: str) -> Any:
    if value is None and type(None) in hints:
        return None
    [hint] = [hint for hint in hints if hint is not type(None)]
    return _checked(value, hint, where)


def _tuple(value: Any, hints: tuple[Any, ...], where: str) -> tuple[Any, ...]:
    if not isinstance(value, (tuple, list)):
        raise _wrong(value, "a tuple", where)
    if len(hints) == 2 and hints[1] is Ellipsis:
        return tuple(_checked(each, hints[0], where) for each in value)
    if len(hints) != len(value):
        raise _wrong(value, f"{len(hints)} values", where)
    return tuple(_checked(each, hint, where) for each, hint in zip(value, hints, strict=True))


def _scalar(value: Any, hint: Any, where: str) -> Any:
    if type(value) not in (str, int, float, bool, bytes):
        value = _plain_scalar(value)
    if hint is float and isinstance(value, (int, float)):
        return float(value)
    if hint is int and isinstance(value, int):
        if abs(value) > _LARGEST:
            raise _wrong(value, "a number of 64 bits", where)
        return int(value)
    if hint is str and isinstance(value, str):
        return _text(value)
    if (hint is bool and isinstance(value, bool)) or (hint is bytes and isinstance(value, bytes)):
        return value
    names = {float: "a number", int: "a whole number", str: "a text", bool: "true or false"}
    raise _wrong(value, names.get(hint, str(hint)), where)


def _plain_scalar(value: Any) -> Any:
    for kind in (bool, int, float, str):
        if isinstance(value, kind):  # of a subclass, such as numpy.float64
            return kind(value)
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):  # numpy's and torch's numbers
        return value.item()
    return value


def _json(value: Any, where: str) -> Any:
    value = _plain_scalar(value)
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, Mapping):
        return {_key(name, where): _json(inner, f"{where}.{name}") for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json(inner, where) for inner in value]
    if isinstance(value, (set, frozenset)):
        return sorted(_json(inner, where) for inner in value)
    if isinstance(value, PurePath):
        return str(value)
    if hasattr(value, "tolist"):  # arrays and tensors
        return _json(value.tolist(), where)
    raise _wrong(value, "a plain value", where)


def _key(name: Any, where: str) -> str:
    if not isinstance(name, (str, int, float, bool)):
        raise _wrong(name, "a text as the name", where)
    return _text(str(name))


def _text(value: str) -> str:
    """What any database takes: without lone surrogates and NUL."""
    return value.encode("utf-8", "replace").decode("utf-8").replace("\0", "\ufffd")


def _wrong(value: Any, expected: str, where: str) -> ValueError:
    return ValueError(f"{where} must be {expected}, not {type(value).__name__}")
