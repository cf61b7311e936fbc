"""A real GPU that runs out of memory, and one whose context is lost."""

from __future__ import annotations

import pytest
import torch

from tests.robustness import stored

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PLUGIN = """
import os
from pathlib import Path
import torch
from torch import nn
from harness import Method, Options, hookimpl
from harness.nn.surgery import block_linears, replace_module


class Fails(nn.Module):
    def __init__(self, linear, how):
        super().__init__()
        self.linear, self.how = linear, how

    def forward(self, x):
        if x.shape[0] == 3:
            self.how(x)
        return self.linear(x) * 0.5


def asks_for_too_much(x):
    torch.empty(1 << 44, dtype=torch.uint8, device=x.device)


def indexes_outside(x):
    x.flatten()[torch.full((4,), 1 << 40, device=x.device)]
    torch.cuda.synchronize()


def failing(how):
    def transform(model, options, context):
        with Path("processes").open("a") as file:
            file.write(f"{os.getpid()}\\n")
        name, linear = next(iter(block_linears(model)))
        replace_module(model, name, Fails(linear, how))
        return model
    return transform


@hookimpl
def register_methods():
    return [
        Method(name="too-much", options=Options, transform=failing(asks_for_too_much)),
        Method(name="lost", options=Options, transform=failing(indexes_outside)),
    ]
"""


@pytest.mark.parametrize(("method", "status", "processes"), [("too-much", "oom", 1), ("lost", "failed", 2)])
def test_the_cells_after_a_failure_on_the_device(harness_here, model, method, status, processes):
    folder, run = harness_here
    (folder / "plugin.py").write_text(PLUGIN)
    code = run(
        "sweep", "--plugin", "plugin.py", "--methods", method, "--models", model, "--tasks", "none",
        "--batch-sizes", "1,3,2", "--prompt-lens", "4", "--new-tokens", "1", "--device", "cuda",
    )  # fmt: skip
    assert code == 1
    found = stored.statuses(folder)[method]
    its_status, reason = found.pop("b3-p4-g1")
    assert its_status == status, reason
    if status == "oom":
        assert "with batch 3" in reason
    assert {each for each, _ in found.values()} == {"ok"}, found
    assert len(set((folder / "processes").read_text().split())) == processes


@pytest.fixture
def harness_here(tmp_path, monkeypatch):
    """The command line in this process, in an empty folder, with the real fork server."""
    from harness.cli.app import run

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    return tmp_path, lambda *arguments: run([str(argument) for argument in arguments])
