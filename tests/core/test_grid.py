"""The grid: order, keys and settled cells."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from pydantic import Field

from harness.chain import parse_chain
from harness.errors import NotApplicable, PluginError
from harness.grid import GridInputs, build_grid, with_baseline
from harness.method import Method, Options
from harness.models.info import ModelInfo
from harness.models.loading import ModelDescription
from harness.models.spec import parse_model
from harness.records import CellKind, Scenario, Status


class _Options(Options):
    bits: int = Field(4, ge=1)


class _SomeOptions(Options):
    targets: str | None = None


def _identity(model, options, context):
    return model


def _method(name, **more):
    return Method(name=name, options=_Options, transform=_identity, **more)


METHODS = {
    "baseline": _method("baseline", family="baseline"),
    "plain": _method("plain"),
    "calibrated": _method("calibrated", needs=["calibration"]),
    "prunes": _method("prunes", family="pruning", leaves_layers=lambda _options: True, leaves_zeros=True),
    "narrows": _method("narrows", family="pruning"),
    "teaches": _method(
        "teaches",
        family="distillation",
        needs=lambda options: ["training"] if options.bits > 1 else [],
    ),
    "trained": _method("trained", needs=["training"]),
    "taught": _method("taught", needs=["teacher"]),
    "gpu": _method("gpu", needs=["cuda"]),
    "encoders": _method("encoders", needs=["encoder"]),
    "packs": _method("packs", family="quantization"),
    "packs-too": _method("packs-too", family="quantization"),
    "prepares": _method("prepares", family="quantization", leaves_layers=lambda options: options.bits == 4),
    "some": Method(name="some", options=_SomeOptions, transform=_identity, family="quantization"),
    "wraps": _method("wraps", family="external", leaves_layers=lambda _options: False),
    "picky": _method("picky", applies=lambda info, options: "not today" if options.bits == 3 else None),
}


@dataclass(frozen=True)
class _Task:
    name: str
    revision: str
    output_type: str = "loglikelihood_rolling"


INFO = ModelInfo(
    label="m",
    family="llama",
    model_type="llama",
    kind="decoder",
    hidden_size=64,
    ffn_size=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    vocab_size=256,
    max_positions=128,
    tied_embeddings=True,
)


def _model(**changes):
    info = replace(INFO, **changes)
    return ModelDescription(parse_model(str(Path.cwd())), info, f"identity of {info.label}")


def _inputs(chains=("plain",), models=None, **changes):
    models = models or (_model(),)
    values = {
        "chains": with_baseline(
            [parse_chain(text, METHODS) for text in chains], parse_chain("baseline", METHODS)
        ),
        "models": models,
        "tasks": (_Task("kjv", "r1"),),
        "scenarios": {m.info.label: (Scenario(1, 16, 4),) for m in models},
        "seeds": (0,),
        "dtype": "float32",
        "device": "cpu",
        "environment": {"torch": "2"},
        "budget": {"calibration": {"samples": 8}, "training": {"steps": 5}},
        "task_options": {"limit": None},
        "meters": ("prefill",),
    }
    return GridInputs(**{**values, **changes})


def _keys(inputs, method):
    (variant,) = [v for v in build_grid(inputs).variants if v.chain.label == method]
    return {cell.label: cell.key for cell in variant.cells}


def test_the_baseline_leads_and_comes_once():
    grid = build_grid(_inputs(chains=("plain", "baseline", "plain:bits=3", "plain")))
    assert [v.chain.label for v in grid.variants] == ["baseline", "plain", "plain:bits=3"]


def test_each_variant_has_its_transform_scenario_and_task_cell():
    grid = build_grid(_inputs())
    for variant in grid.variants:
        assert [c.kind for c in variant.cells] == [CellKind.TRANSFORM, CellKind.SCENARIO, CellKind.TASK]
    keys = [cell.key for cell in grid.cells]
    assert len(set(keys)) == len(keys)


def test_equal_inputs_have_equal_keys():
    assert _keys(_inputs(), "plain") == _keys(_inputs(), "plain")


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "bfloat16"},
        {"seeds": (1,)},
        {"environment": {"torch": "3"}},
        {"models": (_model(label="other"),)},
    ],
)
def test_what_decides_everything_changes_every_key(changes):
    before, after = _keys(_inputs(), "plain"), _keys(_inputs(**changes), "plain")
    assert not set(before.values()) & set(after.values())


def test_a_change_touches_only_the_cells_that_it_decides():
    before = _keys(_inputs(), "plain")
    limited = _keys(_inputs(task_options={"limit": 5}), "plain")
    assert limited["kjv"] != before["kjv"]
    assert limited["transform"] == before["transform"]
    assert limited["b1-p16-g4"] == before["b1-p16-g4"]
    revised = _keys(_inputs(tasks=(_Task("kjv", "r2"),)), "plain")
    assert revised["kjv"] != before["kjv"]
    assert revised["b1-p16-g4"] == before["b1-p16-g4"]


def test_the_budget_counts_only_for_those_who_spend_it():
    more = {"calibration": {"samples": 9}, "training": {"steps": 5}}
    for method, changes in (("plain", False), ("calibrated", True), ("trained", False)):
        inputs = _inputs(chains=(method,))
        spent = replace(inputs, budget=more)
        assert (_keys(inputs, method) != _keys(spent, method)) is changes, method


def test_the_source_of_a_method_is_part_of_the_key(tmp_path):
    import importlib.util

    def method_of(text):
        file = tmp_path / "plug.py"
        file.write_text(text)
        spec = importlib.util.spec_from_file_location("plug", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return Method(name="plain", options=_Options, transform=module.transform)

    hashes = {method_of(f"def transform(m, o, c):\n    return m  # {n}\n").source_hash for n in range(2)}
    assert len(hashes) == 2


@pytest.mark.parametrize(
    ("method", "model", "reason"),
    [
        ("gpu", {}, "needs a CUDA device"),
        ("encoders", {}, "needs an encoder; m is a decoder"),
        ("taught", {"scratch": True}, "needs a trained teacher"),
        ("picky:bits=3", {}, "not today"),
    ],
)
def test_skips_are_explained_before_anything_is_loaded(method, model, reason):
    grid = build_grid(_inputs(chains=(method,), models=(_model(**model),)))
    variant = grid.variants[-1]
    for cell in variant.cells:
        assert cell.decision.status is Status.NOT_APPLICABLE
        assert reason in cell.decision.reason


def _refused_before_loading(chain):
    """A variant, and why all of its cells are not applicable; None where none is refused."""
    variant = build_grid(_inputs(chains=(chain,))).variants[-1]
    (reason,) = {cell.decision and cell.decision.reason for cell in variant.cells}
    if reason is not None:
        assert {cell.decision.status for cell in variant.cells} == {Status.NOT_APPLICABLE}
    return variant, reason


@pytest.mark.parametrize(
    ("chain", "refused"),
    [
        ("packs+packs-too", True),
        ("packs+plain+packs-too", True),
        ("prepares:bits=3+packs", True),  # told to quantize by itself
        ("some+packs", True),
        ("plain+packs", False),
        ("packs+plain", False),
        ("baseline+packs", False),
        ("prepares+packs", False),
        ("some:targets=mlp+packs", False),
        ("wraps+packs", True),
        ("packs+wraps", True),
        ("packs+prunes", True),
        ("wraps+prunes", True),
        ("prunes+packs", False),
        ("prunes+wraps", False),
        ("prepares+prunes", False),
    ],
)
def test_a_quantizer_after_a_quantizer_is_refused_before_anything_is_loaded(chain, refused):
    variant, reason = _refused_before_loading(chain)
    assert (reason is not None) == refused
    if reason is None:
        return
    names = [step.method.name for step in variant.chain.steps if step.method.works_on_layers]
    assert reason.startswith(f"{names[1]}: {names[0]} comes before it and quantizes every linear layer")
    assert reason.endswith(f"put it before {names[0]}" if names[1] == "prunes" else "have that option")


def test_random_weights_refuse_accuracy_but_not_speed():
    grid = build_grid(_inputs(models=(_model(synthetic=True),)))
    for variant in grid.variants:
        decisions = {cell.kind: cell.decision for cell in variant.cells}
        assert decisions[CellKind.SCENARIO] is None
        assert decisions[CellKind.TRANSFORM] is None
        assert "random weights (synthetic)" in decisions[CellKind.TASK].reason


@pytest.mark.parametrize(
    ("kind", "output_type", "reason"),
    [
        ("encoder", "loglikelihood", "m is an encoder"),
        ("decoder", "embedding_similarity", "m is a decoder"),
        ("encoder", "embedding_classification", None),
        ("decoder", "multiple_choice", None),
    ],
)
def test_a_task_for_another_kind_of_model_is_refused_or_left_out(kind, output_type, reason):
    inputs = {"models": (_model(kind=kind),), "tasks": (_Task("t", "r", output_type),)}
    (cell,) = [c for c in build_grid(_inputs(**inputs)).variants[0].cells if c.kind is CellKind.TASK]
    assert (cell.decision and cell.decision.status) == (reason and Status.NOT_APPLICABLE)
    assert reason is None or reason in cell.decision.reason
    left = [c for c in build_grid(_inputs(**inputs, fitting_only=True)).variants[0].cells if c.task]
    assert len(left) == (reason is None)


def test_a_prompt_longer_than_the_model_is_settled_with_a_reason():
    inputs = _inputs(scenarios={"m": (Scenario(1, 120, 64),)})
    (cell,) = [c for c in build_grid(inputs).variants[0].cells if c.kind is CellKind.SCENARIO]
    assert cell.decision.status is Status.NOT_APPLICABLE
    assert "128" in cell.decision.reason


def _broken(*given):
    raise ValueError("boom")


@pytest.mark.parametrize(
    ("what", "answer", "problem"),
    [
        ("applies", _broken, "'odd': applies failed: ValueError: boom"),
        ("applies", lambda info, options: True, "'odd': applies must return None, .* not True"),
        ("applies", lambda info, options: "", "'odd': applies must return None"),
        ("needs", _broken, "'odd': needs failed: ValueError: boom"),
        ("needs", lambda options: None, "'odd': needs must be a list of names, not None"),
        ("needs", lambda options: "cuda", "'odd': needs must be a list of names, not 'cuda'"),
        ("inputs", _broken, "'odd': inputs failed: ValueError: boom"),
        ("inputs", lambda options: {"a": object()}, "'odd': inputs must return texts by name"),
        ("inputs", lambda options: ["a"], "'odd': inputs must return texts by name"),
        ("leaves_layers", _broken, "'odd': leaves_layers failed: ValueError: boom"),
    ],
)
def test_what_a_method_answers_wrongly_is_one_line_that_names_it(what, answer, problem):
    methods = {**METHODS, "odd": _method("odd", family="quantization", **{what: answer})}
    chains = [parse_chain("odd+packs", methods)] if what == "leaves_layers" else [parse_chain("odd", methods)]
    with pytest.raises(PluginError, match=problem):
        build_grid(replace(_inputs(), chains=tuple(chains)))


def test_a_reason_of_the_harness_itself_is_passed_on():
    def applies(info, options):
        raise NotApplicable("as it says")

    with pytest.raises(NotApplicable, match="as it says"):
        _method("odd", applies=applies).reason_against(INFO, _Options())


@pytest.mark.parametrize(
    ("chain", "refused"),
    [
        ("prunes+teaches", True),
        ("prunes+plain+teaches", True),
        ("teaches+prunes", False),
        ("narrows+teaches", False),
        ("prunes+teaches:bits=1", False),  # trains nothing
    ],
)
def test_a_distillation_after_a_pruner_is_refused_before_anything_is_loaded(chain, refused):
    _, reason = _refused_before_loading(chain)
    assert (reason is not None) == refused
    if reason is not None:
        assert reason.startswith("teaches: prunes comes before it")
        assert "write teaches first" in reason
