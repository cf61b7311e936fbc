"""What the columns of the pages Scaling, Method, Sweep and Environment say. Pure."""

from __future__ import annotations

__all__ = ["PAGE_WORDS"]

PAGE_WORDS = {
    "95 % from": "The lower end of the interval that holds the true value 95 times in 100.",
    "95 % to": "The upper end of the interval that holds the true value 95 times in 100.",
    "also accepted as": "Other libraries' names for the option; it is stored under its own.",
    "at the end": "The same, looked at when the sweep ended; empty where it did not change.",
    "at the start": "What was recorded when the sweep began.",
    "basis": "What a time rests on. *paired*: rounds that alternate with the baseline's; *control*: over "
    "that of a fixed workload timed next to it; *unpaired*: as it stands; *reading*: a single reading, so "
    "no interval.",
    "batch size": "How many sequences are computed at a time.",
    "bits per weight": "Bits that are stored for a weight, with scales, zero points and indices: the mean "
    "over the modules that the method changed, by their parameters. Lower is smaller.",
    "cell": "A task, the shape of a timed run (`b8-p512-g64`: batch size 8, prompt of 512 tokens, 64 new "
    "ones), or the transform.",
    "cells not ok": "How many of its cells have another status than *ok*.",
    "cells ok": "How many of its cells were measured.",
    "crossing": "The size at which both take the same time, interpolated between measured sizes, with its "
    "95 % interval. *none* says nothing about sizes that were not measured.",
    "default": "What holds where the option is not given; *none* leaves it to the method.",
    "difference": "This variant's score minus its baseline's.",
    "difference ↑": "This variant's score minus its baseline's; above zero is a gain.",
    "difference ↓": "This variant's score minus its baseline's; below zero is a gain.",
    "error": "Why the plugin could not be loaded.",
    "exponent": "How the cost grows: cost ~ size ^ exponent. 1 is linear, 2 quadratic, 0 does not grow.",
    "from size": "The smallest size of the line.",
    "imported at (UTC)": "When the file was read into this store.",
    "imported from": "The file that the row came from; empty for what was measured here.",
    "in words": "Which of the two is faster, and where.",
    "local exponents": "The exponents between neighbouring sizes: where they differ, one power law does "
    "not fit.",
    "lower": "The lower end of the 95 % interval.",
    "matters for": "Which numbers should not be compared because of it; *nothing*: it is only recorded.",
    "meaning": "Why it matters.",
    "mode": "How it was timed: *graph* replays a captured CUDA graph, *eager* launches every kernel from "
    "Python.",
    "most frequent reason": "The reason that most of these cells give.",
    "new tokens": "How many tokens are generated after the prompt.",
    "option": "The name under which it is given and stored.",
    "origin": "The file that was read.",
    "part": "What of the machine or the sweep it is about.",
    "plugin": "The module that registers methods.",
    "prompt length": "How many tokens the model reads before it generates.",
    "range": "Which values are allowed.",
    "ratios": "Measured time of the second over that of the first, at each size; below 1 the second is "
    "faster.",
    "rows": "How many rows the table of the store has.",
    "sizes": "How many sizes were measured.",
    "sparsity": "Share of weights that are exactly zero: the mean over the modules that the method "
    "changed, by their parameters.",
    "started (UTC)": "When the cell was started.",
    "table": "A table of the store.",
    "to size": "The largest size of the line.",
    "took": "How long the cell took.",
    "type": "What kind of value it takes.",
    "unit": "What the value is counted in.",
    "upper": "The upper end of the 95 % interval.",
    "values": "Each value, with the sweeps that have it.",
    "what": "What was recorded.",
}
