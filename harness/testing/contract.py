"""The contract of a method, as a test: `check_method(METHOD)`.

A method that passes does what it says, on every family of models that it says it fits, twice the
same, without touching anything else. Plugin authors call it from their own tests; the harness runs
it over everything that is registered.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from harness.errors import ConfigError, MissingExtra, NotApplicable, PluginError
from harness.measure.effect import Effect, measure_effect, snapshot
from harness.method import Method, Options, Paper
from harness.models.info import ModelInfo, info_from_config
from harness.testing.global_state import unchanged_globals
from harness.testing.making import make_context
from harness.testing.models import TINY_FAMILIES, TinyTokenizer, tiny_model

__all__ = ["ContractReport", "check_method"]

MILD_OPTIONS: Mapping[str, Any] = {"bits": 8, "a_bits": 8, "sparsity": 0.05}
"""What "as mild as it gets" means for the knobs that many methods share."""

_PAPERLESS_FAMILIES = ("baseline", "external", "other")
_UNKNOWN_OPTION = "no_such_option_anywhere"


@dataclass(frozen=True)
class ContractReport:
    """Which models were checked, and why others were not."""

    method: str
    checked: tuple[str, ...] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Run:
    """One transform of a fresh model."""

    model: nn.Module
    effect: Effect
    output: torch.Tensor  # of the probe, after
    original: torch.Tensor  # of the probe, before


def check_method(
    method: Method,
    *,
    model: str | Callable[[], nn.Module] | None = None,
    options: Mapping[str, Any] | None = None,
    tokenizer: Any = TinyTokenizer,
    max_drift: float = 1.0,
) -> ContractReport:
    """Check a method against the contract, on the CPU, on tiny random models.

    The card is complete (bundled methods); options survive JSON and refuse unknown names; the
    transform uses no calibration and no training that `needs` does not name, has a real effect, leaves
    the process alone, gives an evaluating model whose output is finite, of the same shape and the same
    each time; a second run on a fresh model agrees bit for bit; a saved state loaded into another
    transformed copy, whose own state and tensors in plain attributes are spoiled before, gives the same
    output; a quantization stores fewer bytes; a method that is neither architectural nor trained stays
    within `max_drift` at its mildest.

    Args:
        model: a name of `TINY_FAMILIES` or a function that makes a fresh model, equal each time; by
            default every tiny family that the method applies to.
        options: for models this small; the defaults where left out.
        tokenizer: what `Context.tokenizer` holds; by default the special tokens alone.
        max_drift: relative Frobenius distance of the outputs before and after.

    Raises:
        AssertionError: names the method, the model and the clause that is broken.
    """
    parsed = method.options.parse(dict(options or {}), method=method.name)
    _check_options(method, parsed)
    if method.is_bundled:
        _check_card(method)
    if "cuda" in method.needs_of(parsed) and not torch.cuda.is_available():
        return ContractReport(method.name, skipped=dict.fromkeys(TINY_FAMILIES, "needs CUDA"))
    makers: dict[str, Callable[[], nn.Module]] = {}
    if callable(model):
        makers["the given model"] = model
    else:
        for family in (model,) if model else TINY_FAMILIES:
            makers[family] = lambda family=family: tiny_model(family)  # type: ignore[misc]
    checked, skipped = [], {}
    for name, make in makers.items():
        reason = _check_on(method, parsed, name, make, tokenizer, max_drift)
        if reason is None:
            checked.append(name)
        else:
            skipped[name] = reason
    if not checked and not all("not installed" in reason for reason in skipped.values()):
        raise AssertionError(f"{method.name} fits none of the models: {skipped}")
    return ContractReport(method.name, tuple(checked), skipped)


# --- static clauses -------------------------------------------------------------------------------


def _check_options(method: Method, options: Options) -> None:
    required = [name for name, field in method.options.model_fields.items() if field.is_required()]
    _expect(not required, method.name, f"a method is named without options, and {required} have no default")
    written = json.loads(json.dumps(options.canonical()))
    _expect(method.options.parse(written) == options, method.name, "options do not survive JSON")
    try:
        method.options.parse({_UNKNOWN_OPTION: 1})
    except ConfigError:
        return
    raise AssertionError(f"{method.name}: an unknown option is not refused")


def _check_card(method: Method) -> None:
    card, claim = method.card, method.claim
    _expect(method.family != "other", method.name, "a bundled method names its family")
    _expect(claim.endswith("."), method.name, f"the claim is one sentence, not {claim!r}")
    if method.family not in _PAPERLESS_FAMILIES:
        paper = method.paper
        if not isinstance(paper, Paper):
            raise AssertionError(f"{method.name}: the paper must be a harness.Paper")
        _expect(str(paper.year) in card, method.name, f"the card does not give the year {paper.year}")
        if paper.arxiv:
            _expect(paper.arxiv in card, method.name, f"the card does not give arXiv:{paper.arxiv}")
    unnamed = [name for name in method.options.model_fields if name not in card]
    _expect(not unnamed, method.name, f"the card does not explain the options {unnamed}")


# --- on a model -----------------------------------------------------------------------------------


def _check_on(
    method: Method,
    options: Options,
    name: str,
    make: Callable[[], nn.Module],
    tokenizer: Any,
    max_drift: float,
) -> str | None:
    """Check on one model; the reason why it does not fit, or None where everything holds."""
    who = f"{method.name} on {name}"
    fresh = make()
    info = info_from_config(fresh.config, f"test:{name}")
    needs = method.needs_of(options)
    if info.kind == "encoder" and "decoder" in needs:
        return "needs a decoder"
    if info.kind == "decoder" and "encoder" in needs:
        return "needs an encoder"
    reason = method.applies(info, options) if method.applies else None
    if reason is not None and method.trains_scratch:  # perhaps it fits no model that is trained already
        scratch = replace(info, scratch=True)
        if method.applies is not None and method.applies(scratch, options) is None:
            info, reason = scratch, None
    if reason is not None:
        _expect(isinstance(reason, str) and bool(reason), who, "applies gives None or a reason")
        return reason
    try:
        with unchanged_globals(who):
            run = _run(method, options, fresh, tokenizer, info)
    except (NotApplicable, MissingExtra) as error:
        return str(error)
    except PluginError as error:
        raise AssertionError(f"{who}: {error}") from error
    _check_result(method, run, who)
    _check_repeatable(run, _run(method, options, make(), tokenizer, info), who)
    if not method.architectural and "training" not in needs and method.family != "baseline":
        mildest = _mildest(method, options)
        mild = run if mildest == options else _run(method, mildest, make(), tokenizer, info)
        drift = _relative_distance(mild.output, mild.original)
        _expect(drift <= max_drift, who, f"the output drifts by {drift:.3g}, over {max_drift}")
    return None


def _run(method: Method, options: Options, model: nn.Module, tokenizer: Any, info: ModelInfo) -> _Run:
    probe = _probe(model, seed=1234)
    original = _output(model, probe)
    context = make_context(model, info, tokenizer=tokenizer, has_teacher=not info.scratch)
    context.needs = method.needs_of(options)
    before = snapshot(model)
    result = method.transform(model, options, context)
    if not isinstance(result, nn.Module):
        raise AssertionError(f"{method.name}: transform must return the model, not {result!r}")
    effect = measure_effect(before, result)
    return _Run(result, effect, _output(result, probe), original)


def _check_result(method: Method, run: _Run, who: str) -> None:
    _expect(not run.model.training, who, "the model is left in training mode")
    shape, original_shape = tuple(run.output.shape), tuple(run.original.shape)
    _expect(shape == original_shape, who, f"the output has shape {shape}, not {original_shape}")
    _expect(bool(torch.isfinite(run.output).all()), who, "the output is not finite")
    same = torch.equal(_output(run.model, _probe(run.model, seed=1234)), run.output)
    _expect(same, who, "evaluating the same input twice gives two outputs")
    if method.family == "baseline":
        _expect(not run.effect.changed, who, "the baseline changed the model")
        return
    _expect(run.effect.changed, who, "the transform changed nothing")
    if method.family == "quantization" and not run.effect.simulated:
        touched = [effect for effect in run.effect.effects if effect.changed]
        bytes_before = sum(effect.bytes_before for effect in touched)
        bytes_after = sum(effect.bytes_after for effect in touched)
        _expect(bytes_after < bytes_before, who, f"{bytes_before} bytes became {bytes_after}")


def _check_repeatable(run: _Run, again: _Run, who: str) -> None:
    first, second = run.model.state_dict(), again.model.state_dict()
    _expect(first.keys() == second.keys(), who, "a second run gives other modules")
    differing = [name for name in first if not _equal(first[name], second[name])]
    _expect(not differing, who, f"a second run differs in {differing[:3]}")
    _expect(torch.equal(run.output, again.output), who, "a second run gives another output")
    # Save, spoil the other copy, load: the state must hold everything that decides the output. What is stored
    # in plain attributes is in no checkpoint and counts in no size.
    saved = io.BytesIO()
    torch.save(first, saved)
    places = {tensor.data_ptr() for tensor in second.values() if isinstance(tensor, torch.Tensor)}
    with torch.no_grad():
        for tensor in second.values():
            if type(tensor) in (torch.Tensor, nn.Parameter):
                tensor.zero_()
        for attributes in map(vars, again.model.modules()):
            for name, value in attributes.items():
                if type(value) is torch.Tensor and value.data_ptr() not in places:  # no view of the state
                    attributes[name] = torch.zeros_like(value)
    saved.seek(0)
    again.model.load_state_dict(torch.load(saved, weights_only=False))
    probe = _probe(run.model, seed=4321)
    same = torch.equal(_output(run.model, probe), _output(again.model, probe))
    _expect(same, who, "a saved and loaded state gives another output")


def _probe(model: nn.Module, *, seed: int) -> torch.Tensor:
    config: Any = model.config
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (2, 24), generator=generator)


def _mildest(method: Method, options: Options) -> Options:
    values = options.canonical()
    for name, value in MILD_OPTIONS.items():
        if values.get(name) is not None:
            try:
                values = method.options.parse({**values, name: value}).canonical()
            except ConfigError:
                continue  # the method does not go that far
    return method.options.parse(values)


@torch.no_grad()
def _output(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    output = model(input_ids=tokens)
    logits = getattr(output, "logits", None)
    result: torch.Tensor = output.last_hidden_state if logits is None else logits
    return result


def _relative_distance(value: torch.Tensor, reference: torch.Tensor) -> float:
    reference = reference.double()
    distance = float((value.double() - reference).norm() / reference.norm())
    return distance if math.isfinite(distance) else math.inf


def _equal(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor):
        if type(first) not in (torch.Tensor, nn.Parameter):
            return True  # a packed tensor of another library: its output is compared instead
        return first.dtype == second.dtype and torch.equal(first, second)
    return bool(first == second)


def _expect(holds: bool, who: str, problem: str) -> None:
    if not holds:
        raise AssertionError(f"{who}: {problem}")
