"""How values that databases disagree about are stored, the same way in every database.

- **NaN** in a column is NULL. SQLite does so by itself; PostgreSQL would keep a NaN that then
  sorts above every number and spoils every average, so it is turned into NULL there too. The
  columns that can hold one (`records.value`, `samples.value`, `items.outcome`) are never NULL for
  another reason, so readers get NaN back. A bound (`lower`, `upper`) that is NaN reads as no
  bound. Infinities are ordinary values in both databases.
- **JSON** has no NaN and no infinity; they are written as ``{"$float": "nan"}`` and come back.
- **Text** of a child process may hold NUL or undecodable bytes; those become U+FFFD.
"""

from __future__ import annotations

import json
import math
import operator
import os
from collections.abc import Mapping
from typing import Any, SupportsIndex

from sqlalchemy import BigInteger, Float, Integer, Text
from sqlalchemy.engine import Dialect
from sqlalchemy.types import TypeDecorator, TypeEngine

__all__ = [
    "CleanText",
    "Real",
    "RowId",
    "Unstorable",
    "Whole",
    "dump_json",
    "load_json",
    "nan_if_null",
    "untagged",
]

_TAG = "$float"
_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class Unstorable(TypeError):
    """A value that JSON does not know."""


class Real(TypeDecorator[float]):
    """A double; NaN is stored as NULL."""

    impl = Float(53)
    cache_ok = True

    def process_bind_param(self, value: float | None, dialect: Dialect) -> float | None:
        if value is None:
            return None
        value = float(value)  # numpy scalars too
        return None if math.isnan(value) else value


class Whole(TypeDecorator[int]):
    """A 64-bit integer; numpy's, which SQLite would store as bytes, become Python's."""

    impl = BigInteger
    cache_ok = True

    def process_bind_param(self, value: SupportsIndex | None, dialect: Dialect) -> int | None:
        return None if value is None else operator.index(value)


class RowId(Whole):
    """The number of a row. SQLite fills in only an INTEGER key (which is 64 bits wide there)."""

    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[int]:
        return dialect.type_descriptor(Integer() if dialect.name == "sqlite" else BigInteger())


class CleanText(TypeDecorator[str]):
    """Text of any origin: what a database cannot hold is replaced, never refused."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        if value is None:
            return None
        return value.replace("\0", "\ufffd").encode("utf-8", "replace").decode("utf-8")


def nan_if_null(value: float | None) -> float:
    """A stored value as it was before `Real` stored it."""
    return math.nan if value is None else value


def dump_json(value: Any) -> str:
    """Standard JSON; non-finite floats are tagged.

    >>> dump_json({"b": float("-inf"), "a": (1, 2.5)})
    '{"b": {"$float": "-inf"}, "a": [1, 2.5]}'
    """
    try:
        return json.dumps(value, allow_nan=False, default=_plain)
    except ValueError:  # a non-finite float somewhere: rare, so only then is the value walked
        return json.dumps(_tagged(value), allow_nan=False, default=_plain)


def load_json(text: str | bytes) -> Any:
    """The inverse of `dump_json` (tuples come back as lists)."""
    return json.loads(text, object_hook=untagged)


def _tagged(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return {_TAG: str(float(value))}
    if isinstance(value, Mapping):
        return {name: _tagged(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_tagged(inner) for inner in value]
    return value if isinstance(value, str | int | float | None) else _tagged(_plain(value))


def untagged(value: dict[str, Any]) -> Any:
    """A JSON object, or the non-finite float that it stands for."""
    tag = value.get(_TAG) if len(value) == 1 else None
    return _NON_FINITE.get(tag, value) if isinstance(tag, str) else value


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # numpy and torch
        return value.tolist()
    raise Unstorable(f"{type(value).__name__} cannot be stored as JSON")
