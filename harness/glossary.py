"""What the words in tables and lists mean: metrics, columns, statuses, marks, families, verdicts. Pure.

Every text is written here; nothing from a store is repeated in one, so they may be shown as Markdown.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import NamedTuple

from harness.display import better
from harness.metric_words import METRIC_WORDS
from harness.page_words import PAGE_WORDS

__all__ = ["COLUMNS", "VALUES", "Heading", "explain", "explain_metric", "heading_of", "word_of"]

COLUMNS = {
    "#": "The place in the order that was chosen.",
    "against the baseline": "Of times and sizes this variant over its baseline, of scores the difference; "
    "with the 95 % interval, where there is one.",
    "detectable": "The smallest true difference that this many items would show four times in five.",
    "figure": "A metric and the task or the shape that it was measured in; ↓ lower is better, ↑ higher is "
    "better.",
    "first": "The figure of the variant that the others are compared with.",
    "flips [%]": "Share of the items that changed between right and wrong, either way.",
    "history": "Every value that was ever measured of this figure, the oldest first.",
    "change": "The outcome of the other variant less that of the first.",
    "item": "The place of the item among the task's documents.",
    "items": "How many items both answered.",
    "other": "The outcome of the variant that is held against the first.",
    "p": "How often a difference as large as this would be seen between equals: the p-value of a paired "
    "test, adjusted for all tests of the table (Benjamini-Hochberg).",
    "readings": "How the raw readings of the figure are spread, from the lowest to the highest.",
    "rests on": "What the comparison rests on: rounds timed in turn (paired), a control, single items, the "
    "two intervals as if independent, or single readings.",
    "test": "The paired test that p comes from.",
    "unit": "The unit of the figures in this row.",
    "after / before": "Stored bytes after the transform over those before.",
    "baseline": "The figure of the variant that is compared with: the same model, seed, type and device "
    "without a method, or the first one chosen.",
    "caution": "Why the two should not be compared, or only with care.",
    "cells": "How many cells of this variant ended how; see *status*.",
    "changed": "How many modules the transform changed.",
    "command": "The command line of the sweep.",
    "compared": "How the difference got its interval.",
    "device": "The hardware that the cell ran on.",
    "difference [95 %]": "This variant minus the baseline, with the interval that holds the true "
    "difference 95 times in 100. An interval that holds zero shows no clear difference.",
    "dtype": "The number type of the model before the transform.",
    "family": "The branch of the survey that the method belongs to.",
    "marks": "What must be known before the figures are used.",
    "method": "The chain of optimisations, with the options that differ from the defaults; `a+b` is "
    "first a, then b.",
    "metric": "What is compared, and the task or the shape that it was measured in.",
    "MiB after": "Stored bytes after the transform, in MiB (2²⁰ bytes).",
    "MiB before": "Stored bytes before the transform, in MiB (2²⁰ bytes).",
    "model": "The network that the method was applied to.",
    "modules": "How many modules the model has that a transform could change.",
    "n": "How many readings or items stand behind the value.",
    "options": "The method's options as they were used.",
    "place": "The task, the shape of the timed run, or `transform` for the method's own work.",
    "reason": "Why the cell ended as it did.",
    "seconds": "How long the cell took, in seconds.",
    "seed": "What random choices started from.",
    "simulated": "Whether the method's arithmetic ran without a kernel that makes it fast or small.",
    "started_at": "When the cell was started (UTC).",
    "status": "How the cell ended.",
    "sweep": "The number of the sweep that measured it.",
    "value": "The figure of this variant.",
    "value / baseline": "This variant's figure over the baseline's; 1 is no change.",
    "variant": "A method on a model with its seed, type and device.",
    "verdict": "What the interval of the difference says.",
    **PAGE_WORDS,
}
"""Columns that are not metrics."""

_STATUSES = {
    "ok": "measured",
    "not_applicable": "the method does not fit this model or device; the reason says why",
    "no_effect": "the transform changed nothing, though it should have",
    "failed": "an error ended it; see the traceback",
    "oom": "it ran out of memory",
    "timeout": "it took longer than it was allowed to",
    "crashed": "its process ended without an answer",
    "skipped": "not tried, because what it builds on did not work",
}
_MARKS = {
    "simulated": "the arithmetic of the method without a kernel that makes it fast or small",
    "synthetic": "a model with random weights: speed and memory only",
    "imported": "measured elsewhere and read from a file",
}
_FAMILIES = {
    "baseline": "the model as it is",
    "quantization": "numbers of fewer bits",
    "pruning": "weights set to zero or removed",
    "distillation": "a smaller model that learns from a larger one",
    "sparsity": "zeros in patterns that hardware can use",
    "moe": "a mixture of experts, of which each token uses a few",
    "attention": "another attention than that of every token to all before it",
    "recurrence": "a state of fixed size instead of attention",
    "adaptive": "as much computation as each input needs",
    "serving": "how requests are batched and decoded",
    "external": "other libraries' methods, wrapped",
    "other": "none of these",
}
_VERDICTS = {
    "better": "the whole interval lies on the good side of zero",
    "worse": "the whole interval lies on the bad side of zero",
    "equal": "there is no difference at all",
    "no clear difference": "the interval holds zero, which does not show that the two are equal",
}
_COMPARED = {
    "item by item": "both answered the same items: a paired bootstrap",
    "by intervals": "the two intervals are combined as if the measurements were independent",
    "counted": "bytes do not vary",
    "no interval": "one reading, so there is no verdict",
}
VALUES = {
    "status": _STATUSES,
    "marks": _MARKS,
    "family": _FAMILIES,
    "verdict": _VERDICTS,
    "compared": _COMPARED,
}
"""Columns whose cells are words of a fixed list, and what each says."""

_SIGNED = {
    "cells": _STATUSES,
    "status": _STATUSES,
    "verdict": _VERDICTS,
}  # words with a sign or a number before them

_LOWER, _HIGHER = "lower is better", "higher is better"
_ARROWS = {"lower": "↓", "higher": "↑"}
_UNIT = re.compile(r"(?P<name>.*\S) \[(?P<unit>[^\[\]]+)\]", re.DOTALL)
_SHAPE = re.compile(r"b\d+-p\d+-g\d+")
_PREFIXED = re.compile(r"(?:[KMGT]iB)(?P<rest>/.*)?")
_TIMES = ("ms", "µs", "s")


class Heading(NamedTuple):
    """What a heading of a column says: ``metric · place [unit]``."""

    metric: str
    place: str
    unit: str
    direction: str | None

    @property
    def arrow(self) -> str:
        """Which way is good, in one character; empty where nobody knows."""
        return _ARROWS.get(self.direction or "", "")


def heading_of(column: str) -> Heading:
    """A heading taken apart.

    >>> heading_of("acc · hellaswag [%]"), heading_of("decode_latency · b1-p512-g64 [ms]").direction
    (Heading(metric='acc', place='hellaswag', unit='%', direction='higher'), 'lower')
    """
    found = _UNIT.fullmatch(column)
    name, unit = (found["name"], found["unit"]) if found else (column, "")
    metric, _, place = name.partition(" · ")
    kind = "scenario" if _SHAPE.match(place) else "task" if place else "transform"
    known = word_of(metric) is not None
    return Heading(metric, place, unit, better(metric, _stored_unit(unit), kind) if known else None)


def _stored_unit(shown: str) -> str:
    """The unit in the store of a unit in a table (see `harness.display.scale`)."""
    if scaled := _PREFIXED.fullmatch(shown):
        return "B" + (scaled["rest"] or "")
    unit, per, rest = shown.partition("/")
    if unit in _TIMES:
        return f"s{per}{rest}"
    return "fraction" if shown == "%" else shown


def word_of(metric: str) -> str | None:
    """The sentence on a metric; None where nobody wrote one (a number that some plugin recorded).

    >>> word_of("acc/mmlu_anatomy") == word_of("acc")
    True
    """
    name = metric.partition("/")[0].partition(",")[0]
    if name in METRIC_WORDS:
        return METRIC_WORDS[name]
    fitting = [pattern for pattern in METRIC_WORDS if "*" in pattern and fnmatchcase(name, pattern)]
    # What a name ends with (a test's `_p`) says more of it than what it begins with (`acc_`).
    return METRIC_WORDS[max(fitting, key=lambda each: (each[0] == "*", len(each)))] if fitting else None


def explain_metric(column: str) -> str | None:
    """A metric's heading in words: what it is, its unit and which way is good."""
    heading = heading_of(column)
    sentence = word_of(heading.metric)
    if sentence is None:
        return None
    told = [sentence]
    if heading.unit:
        told.append(f"In {heading.unit}.")
    if heading.direction:
        told.append(f"{(_LOWER if heading.direction == 'lower' else _HIGHER).capitalize()}.")
    return " ".join(told)


def explain(column: str, cells: Iterable[object] = ()) -> str | None:
    """What a column says, and what the words in its cells mean; None where nobody wrote it down.

    Only words of this module are repeated, never a text of the cells.
    """
    told = COLUMNS.get(column, COLUMNS.get(heading_of(column).metric))
    if told is None:
        return explain_metric(column)
    seen = list(dict.fromkeys(str(cell) for cell in cells))
    if column == "metric":
        names = dict.fromkeys(heading_of(cell).metric.partition("/")[0].partition(",")[0] for cell in seen)
        meanings = {name: word_of(name) for name in names if name in METRIC_WORDS or _is_plain(name)}
    else:
        known = VALUES.get(column, {})
        words = [cell if cell in known else cell.partition(" ")[2] for cell in seen]  # behind a sign
        meanings = {word: known.get(word) for word in words}
        if column == "marks":  # a cell may hold several
            meanings = {word: text for word, text in _MARKS.items() if any(word in cell for cell in seen)}
        elif column in _SIGNED:
            known = _SIGNED[column]
            meanings = {word: text for word, text in known.items() if any(word in cell for cell in seen)}
    lines = [f"- *{word}*: {text}" for word, text in meanings.items() if text]
    return "\n".join([told, "", *lines]) if lines else told


def _is_plain(name: str) -> bool:
    """Whether a metric's name is nothing but a name, which Markdown shows as it is."""
    return re.fullmatch(r"[A-Za-z0-9_+@]{1,80}", name) is not None and word_of(name) is not None
