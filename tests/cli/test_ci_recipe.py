"""The recipe in docs/ci.md, as it stands there, on a tiny model."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml

from harness.cli.app import app
from tests.robustness.tiny import TASK, save_model

PAGE = (Path(__file__).parents[2] / "docs" / "ci.md").read_text()
BLOCKS = dict(re.findall(r"```(?:bash|yaml)\n# (\S+)\n(.*?)```", PAGE, flags=re.S))
TASKS = Path(__file__).parents[1] / "robustness"
PLUGIN = """
import time
import torch
from harness import Method, Options, hookimpl
from harness.nn.surgery import block_linears

@torch.no_grad()
def transform(model, options, context):
    for _, linear in block_linears(model):
        linear.weight.mul_(0.5)
{worse}
    return model

@hookimpl
def register_methods():
    return [Method(name="my-method", options=Options, transform=transform)]
"""
WORSE = """
        linear.register_buffer("forgotten", linear.weight.clone())
        linear.register_forward_pre_hook(lambda *_: time.sleep(0.005))
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with a plugin, the page's gates, and a sweep that takes seconds."""
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "model")
    settings = {
        **yaml.safe_load(BLOCKS["sweep.yaml"]),
        "tasks": [TASK], "include_path": [str(TASKS)], "prompt_lens": [8], "new_tokens": 2, "device": "cpu",
    }  # fmt: skip
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(settings))
    (tmp_path / "gates.yaml").write_text(BLOCKS["gates.yaml"])

    def plugin(worse=""):
        (tmp_path / "my_method.py").write_text(PLUGIN.format(worse=worse))

    plugin()
    return plugin


def commands(script):
    """The harness' lines of a script, without what the shell does with them."""
    lines = [line for line in BLOCKS[script].splitlines() if line.startswith("harness ")]
    assert lines
    return [shlex.split(line.partition(" > ")[0].replace('"$MODEL"', "./model"))[1:] for line in lines]


def test_a_method_made_worse_ends_with_3_and_names_the_row(harness, project):
    for command in commands("main.sh"):
        done = harness(*command)
        assert done.code == 0, done.err
    project(WORSE)
    sweep, compare = commands("gate.sh")
    done = harness(*sweep)
    assert done.code == 0, done.err
    done = harness(*compare)
    assert done.code == 3
    gates, table, *_ = done.out.split("\n\n")
    outcome = {row.split("|")[1].strip(): row for row in gates.splitlines()[2:]}
    slower = outcome["decode\\_latency\\>1.10x!"]
    assert "| trips |" in slower
    assert "./model my-method b1-p8-g2: " in slower
    # Times of a busy machine may say the same of the baseline; bytes cannot.
    larger = outcome["weight\\_bytes\\>1.01x"]
    assert "| trips |" in larger
    assert "./model my-method" in larger
    assert "./model baseline" not in larger
    assert "| passes |" in outcome["acc\\<-0.01!"]
    assert "| my-method | b1-p8-g2 | decode" in table
    assert "gate decode_latency>1.10x! trips on ./model my-method b1-p8-g2" in done.err
    # The same side once more: nothing happened, nothing fails.
    assert harness("compare", "main.jsonl.gz", "main.db", *compare[3:]).code == 0


@pytest.mark.slow
def test_the_scripts_run_in_a_shell(project, tmp_path):
    environment = {
        **os.environ, "MODEL": "./model", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HARNESS_CACHE": str(tmp_path / "cache"),
    }  # fmt: skip
    environment.pop("HARNESS_DB", None)

    def runs(script):
        return subprocess.run(
            ["bash", "-c", BLOCKS[script]], env=environment, capture_output=True, text=True, timeout=600
        )

    first = runs("main.sh")
    assert first.returncode == 0, first.stderr
    project(WORSE)
    second = runs("gate.sh")
    assert second.returncode == 3, second.stderr
    assert "./model my-method b1-p8-g2" in second.stdout
    assert "| trips |" in (tmp_path / "compare.md").read_text()


def _lines_of_the_workflow():
    workflow = yaml.safe_load(BLOCKS[".github/workflows/harness.yml"])
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    lines = [line.strip() for step in steps for line in step.get("run", "").splitlines()]
    return [
        line.partition(" > ")[0].replace('"$MODEL"', "m") for line in lines if line.startswith("harness ")
    ]


def test_every_command_of_the_workflow_is_understood():
    lines = _lines_of_the_workflow()
    assert {line.split()[1] for line in lines} == {"sweep", "results", "compare"}
    verbs = typer.main.get_command(app).commands
    for line in lines:
        _, verb, *arguments = shlex.split(line)
        command = verbs[verb]
        if verb == "results":
            command, arguments = command.commands[arguments[0]], arguments[1:]
        with command.make_context(verb, arguments) as context:
            assert context.params
