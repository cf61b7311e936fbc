"""What a method computes is part of every key: its source, under whatever decorators."""

from __future__ import annotations

import pytest

from harness.plugins import load_plugins

SOURCE = """
import torch
from harness import Method, Options, hookimpl

{decorator}
def transform(model, options, context):
    return model  # {number}

@hookimpl
def register_methods():
    return [Method(name="mine", options=Options, transform=transform)]
"""


@pytest.mark.parametrize("decorator", ["", "@torch.no_grad()"])
def test_an_edited_plugin_has_another_hash(decorator, tmp_path):
    hashes = set()
    for number in (1, 2):
        (tmp_path / "mine.py").write_text(SOURCE.format(decorator=decorator, number=number))
        hashes.add(load_plugins([str(tmp_path / "mine.py")]).method("mine").source_hash)
    assert len(hashes) == 2


def test_the_source_of_every_bundled_method_is_its_plugin():
    for method in load_plugins().methods.values():
        own = method._sources()[0]
        assert own.stem == method.transform.__module__.rpartition(".")[2], method.name
