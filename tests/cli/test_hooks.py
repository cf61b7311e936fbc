"""Every hook has a documentation entry and a test in which a plugin uses it in a real sweep."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest

from harness import hookspecs

ROOT = Path(__file__).parents[2]
HOOKS = sorted(
    name
    for name, value in inspect.getmembers(hookspecs, inspect.isfunction)
    if getattr(value, "harness_spec", None) is not None
)

PLUGIN = """
import json
import pathlib

import torch

from harness import Meter, Method, ModelEntry, Options, Record, TaskSource, hookimpl
from harness.claims import Claim, Side, SweepNeed, all_of
from harness.claims.figures import exact
from harness.models.loading import LoadedModel, load
from harness.nn.surgery import block_linears

HERE = pathlib.Path(__file__).parent


def _note(kind, **facts):
    with (HERE / "seen.jsonl").open("a") as file:
        file.write(json.dumps({"hook": kind, **facts}) + "\\n")


@torch.no_grad()
def transform(model, options, context):
    for _, linear in block_linears(model):
        linear.weight.mul_(0.5)
    return model


@hookimpl
def register_methods():
    return [Method(name="half", options=Options, transform=transform)]


@hookimpl
def register_models():
    return [ModelEntry("mine", str(HERE / "model"))]


@hookimpl
def register_tasks():
    return [TaskSource(HERE / "tasks")]


@hookimpl
def register_meters():
    def measure(measured):
        count = sum(parameter.numel() for parameter in measured.model.parameters())
        return [Record("parameters_counted", count, "parameters")]

    return [Meter(name="count", measure=measure)]


@hookimpl
def register_claims():
    def counted(evidence):
        return exact(evidence, "mine", "half", "b1-p8-g2", "parameters_counted", expected=Side.ABOVE, bound=1)

    need = SweepNeed(("mine",), ("half",), prompt_lens=(8,), new_tokens=2)
    return [Claim("counts", "my section", "It counts.", "nobody", ("half",), (need,), all_of(counted))]


@hookimpl
def load_model(spec, device, dtype):
    _note("load_model", name=spec.name, device=str(device), dtype=dtype)
    return None


@hookimpl
def variant_started(label, model, options):
    _note("variant_started", label=label, model=model)
    raise RuntimeError("an observer's mistake decides nothing")


@hookimpl
def cell_finished(result):
    _note("cell_finished", status=str(result.status))
    raise SystemExit("nor does one that wants to end the process")
"""


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_is_documented_and_used_here(hook):
    page = (ROOT / "docs" / "plugin-hooks.md").read_text()
    assert f"| `{hook}` |" in page
    assert inspect.getdoc(getattr(hookspecs, hook))
    assert f"def {hook}(" in PLUGIN


def test_a_plugin_that_uses_every_hook(harness, tmp_path, tiny_llama):
    tiny_llama.save_pretrained(tmp_path / "model")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "plug.py").write_text(PLUGIN)

    ran = harness(
        "sweep", "--plugin", "plug.py", "--methods", "half", "--models", "mine", "--tasks", "none",
        "--prompt-lens", "8", "--new-tokens", "2", "--device", "cpu",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    rows = harness("results", "--format", "json").rows
    counted = {row["value"] for row in rows if row["metric"] == "parameters_counted"}
    assert counted == {sum(parameter.numel() for parameter in tiny_llama.parameters())}
    command = ("reproduce", "--plugin", "plug.py", "--claim", "counts", "--budget", "0", "--device", "cpu")
    [claim] = harness(*command, "--format", "json").rows
    assert (claim["outcome"], claim["findings"][0]["value"]) == ("holds", next(iter(counted)))
    seen = [json.loads(line) for line in (tmp_path / "seen.jsonl").read_text().splitlines()]
    by_hook = {hook: [s for s in seen if s["hook"] == hook] for hook in HOOKS}
    assert {s["label"] for s in by_hook["variant_started"]} == {"mine · baseline", "mine · half"}
    assert {s["dtype"] for s in by_hook["load_model"]} == {"float32"}
    assert [s["status"] for s in by_hook["cell_finished"]] == ["ok"] * 4


def test_an_observer_that_fails_silences_no_other(harness, tmp_path):
    observer = """
from harness import hookimpl

@hookimpl
def variant_started(label):
    open({file!r}, "a").write("started ")
    {then}

@hookimpl
def cell_finished():
    open({file!r}, "a").write("finished ")
    {then}
"""
    ends = {"first": "pass", "second": "raise RuntimeError", "third": "raise SystemExit", "last": "pass"}
    plugins = []
    for name, then in ends.items():
        (tmp_path / f"{name}.py").write_text(observer.format(file=str(tmp_path / f"{name}.log"), then=then))
        plugins += ["--plugin", f"{name}.py"]
    ran = harness(
        "sweep", *plugins, "--methods", "baseline", "--models", "zoo:opt-4m", "--tasks", "none",
        "--prompt-lens", "8", "--new-tokens", "2", "--device", "cpu",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    seen = {name: (tmp_path / f"{name}.log").read_text() for name in ends}
    assert seen == dict.fromkeys(ends, "started finished finished ")
