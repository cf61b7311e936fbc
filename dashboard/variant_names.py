"""What variants are called in lists, tables and charts: as short as it can be without doubt. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

__all__ = ["marked", "marked_names", "variant_names"]

_DISTINGUISHING = ("model", "dtype", "device_name", "seed", "origin")


def variant_names(variants: pd.DataFrame, distinguishing: Sequence[str] = _DISTINGUISHING) -> dict[int, str]:
    """A name for each variant: its method, and what else tells the variants of this frame apart.

    Args:
        variants: one row a variant with the columns variant, method and any of those that distinguish.
        distinguishing: what may tell them apart beside the method, in this order.
    """
    if variants.empty:
        return {}
    parts = [name for name in distinguishing if name in variants and variants[name].nunique(dropna=False) > 1]
    names = {
        int(row["variant"]): " · ".join([str(row["method"]), *(_shown(part, row[part]) for part in parts)])
        for row in variants[["variant", "method", *parts]].to_dict("records")
    }
    counts = pd.Series(list(names.values()), dtype=object).value_counts()
    return {id_: name if counts[name] == 1 else f"{name} · #{id_}" for id_, name in names.items()}


def marked(name: str, marks: str) -> str:
    """A variant's name with what a reader must know before believing its figures.

    >>> marked("wanda", "simulated"), marked("gptq", "")
    ('wanda (simulated)', 'gptq')
    """
    return f"{name} ({marks})" if marks else name


def marked_names(about: pd.DataFrame) -> dict[int, str]:
    """Variant to `marked` name.

    Args:
        about: the columns variant, name and marks.
    """
    rows = zip(about["variant"], about["name"], about["marks"], strict=True)
    return {int(variant): marked(name, marks) for variant, name, marks in rows}


def _shown(part: str, value: object) -> str:
    if part == "seed":
        return f"seed {value}"
    if part == "origin":
        return "measured here" if value is None or value != value else f"from {value}"
    return str(value)
