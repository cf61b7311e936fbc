"""What a claim's `decide` is made of: parts, each of which makes one finding, and `all_of`, which joins them.

    decide=all_of(
        loses_less("gptq:bits=3", than="rtn:bits=3", model="zoo:llama-6m", task="kjv"),
        loses_less("gptq:bits=3", than="rtn:bits=3", model="zoo:opt-4m", task="kjv"),
    )

A part is any callable from evidence to a `Finding`; the ones here cover losses, times and sizes. A claim that
needs something else can bring its own part, or its own `decide`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from harness.claims.decision import Decision, Finding, Side, concluded, undecided
from harness.claims.evidence import Evidence, Incomparable, NotMeasured
from harness.claims.figures import BASELINE, exact, loss_contrast, prefill_exponent, speedup

__all__ = [
    "Part",
    "all_of",
    "exponent_above",
    "exponent_below",
    "exponent_lower",
    "faster",
    "gains_more",
    "loses_at_most",
    "loses_less",
    "no_faster",
    "repairs",
    "slower",
    "times_smaller",
]

Part = Callable[[Evidence], Finding]


def all_of(*parts: Part) -> Callable[[Evidence], Decision]:
    """A `decide` by the rule of `harness.claims.decision`: every part has to support the claim."""

    def decide(evidence: Evidence) -> Decision:
        found: list[Finding] = []
        missing: dict[str, None] = {}
        refused: list[str] = []
        for part in parts:
            try:
                found.append(part(evidence))
            except NotMeasured as error:
                if error.is_missing:
                    missing[error.what] = None
                else:
                    refused.append(str(error))
            except Incomparable as error:
                refused.append(str(error))
        if refused:
            return undecided(refused[0], findings=found)
        if missing:
            first, more = next(iter(missing)), len(missing) - 1
            why = f"not measured: {first}" + (f" and {more} more" if more else "")
            return undecided(why, is_measured=False, findings=found)
        return concluded(found)

    return decide


# --- losses -------------------------------------------------------------------------------------------


def loses_less(
    better: str,
    *,
    than: str,
    model: str,
    task: str,
    metric: str = "nll",
    by: float = 0.0,
    seeds: Sequence[int] = (0,),
    than_model: str | None = None,
) -> Part:
    """A method loses less quality than another on the same items, by more than `by`.

    Args:
        than_model: the model of `than`, where it is another one.
    """
    worse, name = f"{model} · {task}: {than}", better
    if than_model is not None:
        worse, name = f"{task}: {than_model} · {than}", f"{model} · {better}"
    return lambda evidence: loss_contrast(
        evidence,
        {(than_model or model, than): 1.0, (model, better): -1.0},
        task=task,
        what=f"{worse} loses more than {name} by",
        expected=Side.ABOVE,
        bound=by,
        metric=metric,
        seeds=seeds,
    )


def loses_at_most(
    method: str,
    most: float,
    *,
    model: str,
    task: str,
    than: str = BASELINE,
    metric: str = "nll",
    seeds: Sequence[int] = (0,),
) -> Part:
    """A method loses at most so much more than another: "almost nothing" must be said in numbers."""
    return lambda evidence: loss_contrast(
        evidence,
        {(model, method): 1.0, (model, than): -1.0},
        task=task,
        what=f"{model} · {task}: {method} loses more than {than} by",
        expected=Side.BELOW,
        bound=most,
        metric=metric,
        seeds=seeds,
    )


def repairs(
    repaired: str,
    broken: str,
    *,
    model: str,
    task: str,
    share: float,
    clean: str = BASELINE,
    metric: str = "nll",
    seeds: Sequence[int] = (0,),
) -> Part:
    """A method takes away at least this share of what another loses against the clean model.

    The figure is what is repaired beyond that share, item by item: ``(broken - repaired) - share (broken -
    clean)``, so no quotient of two noisy numbers is taken.
    """
    terms = {(model, broken): 1.0 - share, (model, clean): share, (model, repaired): -1.0}
    return lambda evidence: loss_contrast(
        evidence,
        terms,
        task=task,
        what=f"{model} · {task}: {repaired} repairs more than {share:.0%} of what {broken} loses by",
        expected=Side.ABOVE,
        metric=metric,
        seeds=seeds,
    )


def gains_more(
    method: str,
    over: str,
    *,
    model: str,
    reference: str,
    task: str,
    metric: str = "nll",
) -> Part:
    """The advantage of a method over another is larger on `model` than on `reference`, item by item."""
    terms = {(model, over): 1.0, (model, method): -1.0, (reference, over): -1.0, (reference, method): 1.0}
    return lambda evidence: loss_contrast(
        evidence,
        terms,
        task=task,
        what=f"{task}: what {method} gains over {over} is more on {model} than on {reference} by",
        expected=Side.ABOVE,
        metric=metric,
    )


# --- times and sizes ----------------------------------------------------------------------------------


def faster(
    method: str, *, model: str, scenario: str, phase: str, by: float = 1.0, over: str = BASELINE
) -> Part:
    """A phase (prefill, decode, end_to_end) takes less than one `by`-th of the other's time."""
    return lambda evidence: speedup(
        evidence, model, method, scenario, phase, expected=Side.ABOVE, bound=by, over=over
    )


def no_faster(method: str, *, model: str, scenario: str, phase: str, most: float = 1.05) -> Part:
    """A phase is faster than the baseline's by a factor of at most `most`, which may be noise or nothing."""
    return lambda evidence: speedup(evidence, model, method, scenario, phase, expected=Side.BELOW, bound=most)


def slower(method: str, *, model: str, scenario: str, phase: str) -> Part:
    """A phase takes longer than the baseline's."""
    return lambda evidence: speedup(evidence, model, method, scenario, phase, expected=Side.BELOW)


def exponent_above(bound: float, *, model: str, method: str = BASELINE, prompts: Sequence[int]) -> Part:
    """Prefill time grows faster than this power of the prompt length."""
    return lambda evidence: prefill_exponent(
        evidence, model, method, prompts, expected=Side.ABOVE, bound=bound
    )


def exponent_below(bound: float, *, model: str, method: str = BASELINE, prompts: Sequence[int]) -> Part:
    """Prefill time grows slower than this power of the prompt length."""
    return lambda evidence: prefill_exponent(
        evidence, model, method, prompts, expected=Side.BELOW, bound=bound
    )


def exponent_lower(method: str, *, than: str, model: str, prompts: Sequence[int]) -> Part:
    """Prefill time grows with a smaller power of the prompt length than another method's."""
    return lambda evidence: prefill_exponent(
        evidence, model, method, prompts, expected=Side.BELOW, bound=0.0, minus=than
    )


def times_smaller(
    metric: str,
    factor: float,
    *,
    model: str,
    method: str,
    place: str,
    than: str = BASELINE,
    than_place: str | None = None,
) -> Part:
    """A number of bytes is exactly `factor` times smaller than another cell's (above 0.999 of it)."""
    return lambda evidence: exact(
        evidence,
        model,
        than,
        than_place or place,
        metric,
        expected=Side.ABOVE,
        bound=0.999 * factor,
        over=method,
        over_place=place,
    )
