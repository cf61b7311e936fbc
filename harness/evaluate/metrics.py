"""Names, units and directions of what tasks measure.

Shares are stored as fractions of 1 with the unit ``fraction``. lm-eval's ``perplexity`` (of target
strings, as in LAMBADA) is renamed: a perplexity is always named by its definition.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Metric", "metric_of", "record_name"]


class Metric(NamedTuple):
    """The unit of a metric and whether ``higher`` or ``lower`` values are better."""

    unit: str
    better: str


_SHARE = Metric("fraction", "higher")
_POINTS = Metric("points", "higher")  # of 100
_KNOWN = {
    "acc_difference": _SHARE,
    "bits_per_byte": Metric("bits/byte", "lower"),
    "bleu": _POINTS,
    "brier_score": Metric("", "lower"),
    "byte_perplexity": Metric("ppl", "lower"),
    "chrf": _POINTS,
    "chrf++": _POINTS,
    "choice_kl": Metric("nats/item", "lower"),
    "cosine": Metric("", "higher"),
    "embedding_distance": Metric("1 - cos", "lower"),
    "exact_match": _SHARE,
    "flips": Metric("fraction", "lower"),
    "f1": _SHARE,
    "likelihood": Metric("", "higher"),
    "mcc": Metric("", "higher"),
    "mean_kl": Metric("nats/token", "lower"),
    "nll": Metric("nats/token", "lower"),
    "nll_rise": Metric("nats/token", "lower"),
    "outlier_column_share": Metric("1", "lower"),
    "outlier_columns_beyond_capacity": Metric("columns", "lower"),
    "pearson": Metric("", "higher"),
    "spearman": Metric("", "higher"),
    "spearman_difference": Metric("", "higher"),
    "target_nll": Metric("nats/target", "lower"),
    "target_perplexity": Metric("ppl", "lower"),
    "ter": Metric("points", "lower"),
    "token_perplexity": Metric("ppl", "lower"),
    "top1_agreement": _SHARE,
    "word_perplexity": Metric("ppl", "lower"),
}


def metric_of(record: str) -> Metric:
    """Unit and direction of a stored metric; a name that is not known is a plain number, up is good.

    >>> metric_of("acc_norm"), metric_of("exact_match,strict-match"), metric_of("acc/mmlu_stem")
    (Metric(unit='fraction', better='higher'), Metric(unit='fraction', better='higher'), \
Metric(unit='fraction', better='higher'))
    """
    name = record.partition("/")[0].partition(",")[0]
    if name.endswith("_p"):
        return Metric("p", "higher")  # of a paired test against the baseline
    if name.endswith("_detectable"):
        return Metric(metric_of(name.removesuffix("_detectable")).unit, "lower")
    if name.endswith("_flips"):
        return Metric("fraction", "lower")
    if name == "acc" or name.startswith(("acc_", "exact_match", "pass@")):
        return _SHARE
    return _KNOWN.get(name, Metric("", "higher"))


def record_name(metric: str, filter_name: str, subtask: str = "") -> str:
    """The name under which lm-eval's ``metric,filter`` of a (sub)task is stored.

    >>> record_name("acc", "none"), record_name("exact_match", "strict-match")
    ('acc', 'exact_match,strict-match')
    >>> record_name("acc", "none", "mmlu_anatomy")
    'acc/mmlu_anatomy'
    """
    name = "target_perplexity" if metric == "perplexity" else metric
    name += "" if filter_name == "none" else f",{filter_name}"
    return f"{name}/{subtask}" if subtask else name
