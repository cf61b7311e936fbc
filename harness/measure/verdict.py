"""Why a variant is slower, or no smaller, than the baseline: a pure function from facts to sentences.

For every phase that is slower, and for the bytes where they did not shrink, the causes that the facts
support are named, each with the share of the time (or of the bytes) that it explains; the largest comes
first. A cause is only given where a measured fact says so; where none does, the verdict says what is known
and no more.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from harness.measure.ceilings import Ceilings
from harness.measure.verdict_facts import CellFacts, VariantFacts, time_ratio
from harness.records import KernelUse, ModuleEffect, Record

__all__ = ["Verdict", "judge"]

PHASES = ("prefill", "decode")
SMALLER = 0.98  # of the baseline's bytes: above this a variant is no smaller
WORTH_NAMING = 0.05  # a cause that explains less is left out
COVERED = 0.9  # of the parameters: below this what is left out is worth a word
BUSY = 0.7  # of the time in kernels: below this launches decide
TINY_LAUNCHES = 3.0  # kernels this many times a launch in a graph are bound by it
_CODES = re.compile(
    r"int8|int4|_int_mm|i8816|i8i8|imma|(?<![a-z0-9])s8|fp8|e4m3|scaled_mm|marlin|qlinear|weight_only|wint"
)
MODE_ORDER = ("compiled", "graph", "eager", "cpu")


@dataclass(frozen=True, slots=True)
class Verdict:
    """`slower` holds the phases, `sentences` the words; empty where there is nothing to explain."""

    slower: tuple[str, ...]
    no_smaller: bool
    sentences: tuple[str, ...]

    @property
    def text(self) -> str:
        return " ".join(self.sentences)


@dataclass(frozen=True, slots=True)
class _Cause:
    share: float
    text: str


def judge(variant: CellFacts, baseline: CellFacts, facts: VariantFacts, ceilings: Ceilings) -> Verdict:
    """The verdict on one shape."""
    sentences: list[str] = []
    slower: list[str] = []
    for phase in PHASES:
        ratio = time_ratio(phase, variant, baseline)
        if ratio is None or not ratio.is_more:
            continue
        slower.append(phase)
        causes = _time_causes(phase, variant, baseline, facts, ceilings)
        sentences.append(
            f"{phase} takes {ratio} the baseline's time: {_joined(causes, _unknown(phase, variant))}."
        )
    size = _size_ratio(variant, baseline)
    no_smaller = size is not None and size > SMALLER
    if size is not None and no_smaller:
        words = "as many bytes as" if 0.995 < size < 1.005 else f"{size:.3g}× the bytes of"
        causes = _size_causes(facts)
        sentences.append(
            f"the weights take {words} the baseline's: {_joined(causes, 'no weight is stored smaller')}."
        )
    return Verdict(
        tuple(slower), no_smaller, tuple(sentence[:1].upper() + sentence[1:] for sentence in sentences)
    )


# --- time ---------------------------------------------------------------------------------------------


def _time_causes(
    phase: str, variant: CellFacts, baseline: CellFacts, facts: VariantFacts, ceilings: Ceilings
) -> list[_Cause]:
    kernels = variant.of(phase)
    found = [
        *_simulated(facts),
        *_worse_mode(phase, variant, baseline),
        *_in_pieces(phase, variant, baseline),
        *_launches(phase, variant, ceilings),
        *_dequantizes(phase, variant, baseline, facts),
        *_quantizes(kernels),
        *_unquantized(kernels, facts),
        *_masked(kernels, facts),
        *_compute_bound(phase, variant, baseline, facts, ceilings),
        *_coverage(facts),
    ]
    explained = {"dequantize", "quantize"}
    if not any("dequantizes" in cause.text for cause in found):
        found += _more_time(phase, variant, baseline, explained)
    return found


def _simulated(facts: VariantFacts) -> list[_Cause]:
    if not facts.simulated:
        return []
    text = (
        "simulated: dense arithmetic stands in for the method's kernel, so neither time nor bytes are its own"
    )
    return [_Cause(1.0, text)]


def _worse_mode(phase: str, variant: CellFacts, baseline: CellFacts) -> list[_Cause]:
    ours, theirs = (facts.records.get(f"{phase}_latency") for facts in (variant, baseline))
    modes = [_mode(record) for record in (ours, theirs)]
    if None in modes or ours is None:
        return []
    places = [MODE_ORDER.index(mode) for mode in modes if mode is not None]
    if places[0] <= places[1]:
        return []
    why = f" ({ours.note})" if ours.note else ""
    return [_Cause(0.9, f"it ran {modes[0]} while the baseline ran {modes[1]}{why}")]


def _in_pieces(phase: str, variant: CellFacts, baseline: CellFacts) -> list[_Cause]:
    """Compiled, but not as one graph: nothing is fused across the breaks."""
    ours, theirs = (facts.records.get(f"{phase}_latency") for facts in (variant, baseline))
    if ours is None or theirs is None or not ours.note or (ours.mode, theirs.mode) != ("compiled",) * 2:
        return []
    return [] if theirs.note else [_Cause(0.5, f"its blocks were {ours.note}")]


def _launches(phase: str, variant: CellFacts, ceilings: Ceilings) -> list[_Cause]:
    """Launch-bound: the device waits for the host, or in a graph for one tiny kernel after another."""
    latency, kernels = variant.value(f"{phase}_latency"), variant.of(phase)
    mode = _mode(variant.records.get(f"{phase}_latency"))
    if latency is None or not kernels or mode in (None, "cpu"):
        return []
    launches, busy_s = sum(k.calls for k in kernels), sum(k.seconds for k in kernels)
    busy = busy_s / latency
    if mode == "eager" and busy < BUSY:
        each = ceilings.values.get("launch")
        cost = f" of {each * 1e6:.1f} µs each" if each else ""
        text = f"launch-bound: eager, {launches} launches{cost}, the device is busy {busy:.0%} of the time"
        return [_Cause(1 - busy, text)]
    gap = ceilings.values.get("graph_launch")
    if mode != "eager" and gap and busy_s / launches < TINY_LAUNCHES * gap:
        mean_us = busy_s / launches * 1e6
        text = f"launch-bound even in a graph: {launches} kernels of {mean_us:.1f} µs on average"
        return [_Cause(min(1.0, launches * gap / latency), text)]
    return []


def _dequantizes(phase: str, variant: CellFacts, baseline: CellFacts, facts: VariantFacts) -> list[_Cause]:
    kernels = variant.of(phase)
    share, name = _share(kernels, "dequantize")
    declared = {
        verb for verb in ("dequantize", "decompress") for e in facts.changed if verb in (e.kernel or "")
    }
    does = "decompresses" if declared == {"decompress"} else "dequantizes"
    if declared:
        # Built from ordinary operators it shows as what the baseline does not spend beside its products.
        ours, theirs = (_by_family(each.of(phase)) for each in (variant, baseline))
        extra = [ours.get(f, 0.0) - theirs.get(f, 0.0) for f in ours if f not in ("gemm", "attention")]
        whole = sum(ours.values())
        added = sum(extra) / whole if whole and theirs else 0.0
        if added > share:
            text = f"{does}, then multiplies: {added:.0%} of the time in what only that needs"
            return [_Cause(added, text)]
    return [_Cause(share, f"{does}, then multiplies: {share:.0%} of the time in {name}")] if name else []


def _quantizes(kernels: Sequence[KernelUse]) -> list[_Cause]:
    share, name = _share(kernels, "quantize")
    text = f"{share:.0%} of the time goes into quantizing activations ({name})"
    return [_Cause(share, text)] if name else []


def _unquantized(kernels: Sequence[KernelUse], facts: VariantFacts) -> list[_Cause]:
    """Stored small, multiplied as floats: no kernel of the phase reads codes."""
    small = [effect for effect in facts.changed if _is_small(effect, facts.dtype)]
    share, name = _share(kernels, "gemm")
    if not small or not name or any(effect.kernel for effect in small) or any(map(_reads_codes, kernels)):
        return []
    bits = _mean(effect.stored_bits_per_weight or 0.0 for effect in small)
    text = (
        f"unquantized kernel: stored in {bits:.3g} bits, multiplied in {facts.dtype or 'floats'} by {name} "
        f"({share:.0%} of the time)"
    )
    return [_Cause(share, text)]


def _masked(kernels: Sequence[KernelUse], facts: VariantFacts) -> list[_Cause]:
    zeros = _masked_share(facts)
    if zeros is None:
        return []
    share, _ = _share(kernels, "gemm")
    return [_Cause(share, f"{_zeros_text(zeros)}: the dense kernel takes the dense kernel's time")]


def _compute_bound(
    phase: str, variant: CellFacts, baseline: CellFacts, facts: VariantFacts, ceilings: Ceilings
) -> list[_Cause]:
    """Smaller weights save reading; where arithmetic takes longer than reading, that helps nothing."""
    if not any(_is_small(effect, facts.dtype) for effect in facts.changed):
        return []
    flops = variant.value(f"{phase}_flops")
    read = baseline.value(f"{phase}_read_bytes") or baseline.value("weight_bytes")
    peak, bandwidth = ceilings.matmul_flops_per_s(facts.dtype), ceilings.bytes_per_s
    if flops is None or read is None or not peak or not bandwidth:
        return []
    compute_s, read_s = flops / peak, read / bandwidth
    if compute_s <= read_s:
        return []
    text = (
        f"compute-bound at {facts.shape or 'this shape'}: the arithmetic takes {_time(compute_s)} at this "
        f"device's ceiling and reading the baseline's weights {_time(read_s)}, so smaller weights alone "
        "cannot help"
    )
    share, _ = _share(variant.of(phase), "gemm")
    return [_Cause(max(share, WORTH_NAMING), text)]


def _more_time(phase: str, variant: CellFacts, baseline: CellFacts, explained: Iterable[str]) -> list[_Cause]:
    """The family of kernels that gained the most time on the baseline's, with its share of all gains."""
    ours, theirs = (_by_family(facts.of(phase)) for facts in (variant, baseline))
    if not ours or not theirs:
        return []
    gained = {family: ours.get(family, 0.0) - theirs.get(family, 0.0) for family in ours}
    total = sum(gain for gain in gained.values() if gain > 0)
    extra = sum(ours.values()) - sum(theirs.values())
    if extra <= 0 or total <= 0:
        return []
    family = max(gained, key=lambda name: gained[name])
    share = gained[family] / total
    if family in explained or share < WORTH_NAMING:
        return []
    times = f"{_time(ours[family])} against {_time(theirs.get(family, 0.0))}"
    slowest = max((k for k in variant.of(phase) if k.family == family), key=lambda k: k.seconds)
    text = f"{share:.0%} of the added kernel time is in {family} kernels ({times}; {slowest.name})"
    return [_Cause(share * extra / sum(ours.values()), text)]


def _unknown(phase: str, variant: CellFacts) -> str:
    record = variant.records.get(f"{phase}_kernels")
    if variant.of(phase):
        return "its kernels do not say why"
    reason = record.note if record is not None and record.note else "none were recorded"
    return f"its kernels are not known ({reason})"


# --- size ---------------------------------------------------------------------------------------------


def _size_ratio(variant: CellFacts, baseline: CellFacts) -> float | None:
    ours, theirs = variant.value("weight_bytes"), baseline.value("weight_bytes")
    return ours / theirs if ours is not None and theirs else None


def _size_causes(facts: VariantFacts) -> list[_Cause]:
    causes = _simulated(facts)
    zeros = _masked_share(facts)
    if zeros is not None:
        causes.append(_Cause(0.9, f"{_zeros_text(zeros)}: zeros take as many bytes as other numbers"))
    causes += _coverage(facts)
    on_paper = facts.value("theoretical_compression_ratio")
    if on_paper is not None and on_paper > 1.05:
        text = f"on paper it would be {on_paper:.3g}× smaller"
        causes.append(_Cause(0.06, text))
    if not facts.simulated and zeros is None and facts.changed and not _shrunk(facts):
        kinds = sorted({effect.kind for effect in facts.changed})
        text = f"what it changed is stored as before ({', '.join(kinds[:3])})"
        causes.append(_Cause(0.5, text))
    return causes


def _coverage(facts: VariantFacts) -> list[_Cause]:
    """What a method leaves alone neither shrinks nor gets faster."""
    coverage = facts.value("parameters_changed_share")
    if coverage is None or not _shrunk(facts) or coverage >= COVERED:
        return []
    text = f"it covers only {coverage:.0%} of the parameters: the rest (embeddings, head, norms) stays"
    return [_Cause(1 - coverage, text)]


def _shrunk(facts: VariantFacts) -> bool:
    return any(effect.bytes_after < effect.bytes_before for effect in facts.changed)


# --- facts --------------------------------------------------------------------------------------------


def _joined(causes: Sequence[_Cause], otherwise: str) -> str:
    ordered = sorted(causes, key=lambda cause: -cause.share)
    texts = [cause.text for cause in ordered if cause.share >= WORTH_NAMING]
    return "; ".join(texts) or otherwise


def _share(kernels: Sequence[KernelUse], family: str) -> tuple[float, str | None]:
    """The share of a family and its slowest kernel; the name is None where it is not worth naming."""
    mine = [kernel for kernel in kernels if kernel.family == family]
    share = sum(kernel.share for kernel in mine)
    if share < WORTH_NAMING:
        return share, None
    return share, max(mine, key=lambda kernel: kernel.share).name


def _reads_codes(kernel: KernelUse) -> bool:
    """A kernel that works on codes: it unpacks or quantizes, or multiplies packed or 8-bit numbers."""
    return kernel.family in ("dequantize", "quantize") or _CODES.search(kernel.name.lower()) is not None


def _is_small(effect: ModuleEffect, dtype: str) -> bool:
    bits = effect.stored_bits_per_weight
    full = {"float32": 32.0, "float16": 16.0, "bfloat16": 16.0}.get(dtype, 16.0)
    return bits is not None and bits < 0.9 * full and effect.bytes_after < effect.bytes_before


def _masked_share(facts: VariantFacts) -> float | None:
    """The share of zeros in changed modules that take as many bytes as before; None without such."""
    masked = [
        effect
        for effect in facts.changed
        if (effect.sparsity or 0.0) >= WORTH_NAMING and effect.bytes_after >= effect.bytes_before > 0
    ]
    if not masked:
        return None
    weights = sum(effect.parameters for effect in masked)
    return sum((effect.sparsity or 0.0) * effect.parameters for effect in masked) / max(weights, 1)


def _zeros_text(zeros: float) -> str:
    return f"sparsity is only a mask: {zeros:.0%} of the weights are zero and stored densely"


def _by_family(kernels: Iterable[KernelUse]) -> dict[str, float]:
    seconds: dict[str, float] = {}
    for kernel in kernels:
        seconds[kernel.family] = seconds.get(kernel.family, 0.0) + kernel.seconds
    return seconds


def _mode(record: Record | None) -> str | None:
    """``graph`` of ``graph, simulated``; None where it is none of the known ones."""
    mode = (record.mode or "").partition(",")[0].strip() if record is not None else ""
    return mode if mode in MODE_ORDER else None


def _mean(values: Iterable[float]) -> float:
    known = list(values)
    return sum(known) / len(known) if known else 0.0


def _time(seconds: float) -> str:
    for scale, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"
