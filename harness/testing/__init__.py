"""Tools for the tests of methods: the contract, tiny models, a real context.

>>> from harness.testing import check_method
>>> check_method(METHOD)  # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harness.testing.contract import ContractReport, check_method
    from harness.testing.global_state import unchanged_globals
    from harness.testing.making import make_context
    from harness.testing.models import TINY_FAMILIES, TinyTokenizer, tiny_model

__all__ = [
    "TINY_FAMILIES",
    "ContractReport",
    "TinyTokenizer",
    "check_method",
    "make_context",
    "tiny_model",
    "unchanged_globals",
]

_WHERE = {
    "TINY_FAMILIES": "models",
    "ContractReport": "contract",
    "TinyTokenizer": "models",
    "check_method": "contract",
    "make_context": "making",
    "tiny_model": "models",
    "unchanged_globals": "global_state",
}


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        import importlib

        return getattr(importlib.import_module(f"harness.testing.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'harness.testing' has no attribute {name!r}")
