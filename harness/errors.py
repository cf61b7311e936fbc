"""Every error that the harness raises on purpose.

The tree::

    HarnessError                 base; the command line prints it as one line and exits with 2
    ├── ConfigError              an option, value, file or combination that cannot be used
    │   └── UnknownName          a method, model, task or option that does not exist (with near matches)
    ├── PluginError              a plugin that cannot be loaded or registers something broken
    ├── DiskFull                 the cache cannot be written: ends a sweep, which can be resumed
    ├── NotApplicable            a method that does not fit this model, device or combination
    ├── MissingExtra             an optional package is not installed (names the pip line)
    ├── ExportRejected           an exported checkpoint that is not the variant; nothing of it was left
    ├── NumericalFailure         NaN, a Cholesky factorisation that fails, a training run that diverges
    └── StoreError               a results store that cannot be opened, read or written

A method raises `NotApplicable` for what it cannot do and `NumericalFailure` for what went wrong
numerically; both become the status of the cell, never the end of the sweep.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "ConfigError",
    "DiskFull",
    "ExportRejected",
    "HarnessError",
    "MissingExtra",
    "NotApplicable",
    "NumericalFailure",
    "PluginError",
    "StoreError",
    "UnknownName",
    "first_line",
]


_LISTED_BY = {"method": "harness methods", "task": "harness tasks --all"}


class HarnessError(Exception):
    """Base of all errors raised on purpose; its text is one clear line for the user."""


class ConfigError(HarnessError):
    """A value, file or combination that cannot be used."""


class UnknownName(ConfigError):
    """A name that nothing is registered under.

    >>> str(UnknownName("method", "gptqq", ["gptq", "rtn"]))
    "unknown method 'gptqq'; did you mean 'gptq'?"
    """

    def __init__(self, kind: str, name: str, known: Iterable[str], hint: str = "") -> None:
        known = sorted(known)
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
        if near:
            advice = "did you mean " + " or ".join(repr(match) for match in near) + "?"
        elif len(known) <= 20:
            advice = "known: " + (", ".join(known) or "none")
        else:
            advice = f"{len(known)} are known"
            if kind in _LISTED_BY:
                advice += f" (list them: {_LISTED_BY[kind]})"
        super().__init__(f"unknown {kind} {name!r}; {advice}" + (f" {hint}" if hint else ""))
        self.kind, self.name, self.near = kind, name, tuple(near)

    def __reduce__(self) -> tuple[object, ...]:
        return (HarnessError, (str(self),))


class PluginError(HarnessError):
    """A plugin that cannot be loaded, or registers something broken or already registered."""


class DiskFull(HarnessError):
    """A disk that the harness itself writes to is full; in a worker this ends the whole sweep."""


class NotApplicable(HarnessError):
    """A method does not fit this model, device or combination; the text is the stored reason."""


class MissingExtra(HarnessError):
    """An optional package is needed and absent.

    >>> str(MissingExtra("streamlit", "dashboard"))
    "streamlit is not installed; run: pip install 'transformer-harness[dashboard]'"
    """

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed; run: pip install 'transformer-harness[{extra}]'")
        self.package, self.extra = package, extra

    def __reduce__(self) -> tuple[object, ...]:
        return (MissingExtra, (self.package, self.extra))


class ExportRejected(HarnessError):
    """An exported checkpoint that is not the variant; nothing of it was left."""


class NumericalFailure(HarnessError):
    """The arithmetic broke: NaN or infinity, a factorisation that fails, a divergent training run."""


class StoreError(HarnessError):
    """A results store that cannot be opened, read or written."""


def first_line(error: BaseException) -> str:
    """The first line of what an error says, its type where it says nothing.

    >>> first_line(ValueError("no room\\n  at all"))
    'no room'
    >>> first_line(MemoryError())
    'MemoryError'
    """
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__
