"""What a method computes is part of every key: its source, under whatever decorators."""

from __future__ import annotations

import pytest

from harness.errors import PluginError
from harness.method import Method, Options
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


WRAPPED = """
'''The card.'''
import functools
from harness import Method, Options, hookimpl

def function(model, options, context, number={number}):
    return model

class Callable:
    def __call__(self, model, options, context):
        return model

@hookimpl
def register_methods():
    return [Method(name="mine", options=Options, transform={transform})]
"""


@pytest.mark.parametrize(
    "transform",
    [
        "functools.partial(function, number=3)",
        "functools.partial(functools.wraps(function)(lambda *given: function(*given)), number=3)",
        "Callable()",
        "Callable().__call__",
    ],
)
def test_partials_and_objects_are_known_by_the_file_that_they_are_written_in(transform, tmp_path):
    hashes = set()
    for number in (1, 2):
        (tmp_path / "mine.py").write_text(WRAPPED.format(transform=transform, number=number))
        method = load_plugins([str(tmp_path / "mine.py")]).method("mine")
        assert method.card == "The card."
        hashes.add(method.source_hash)
    assert len(hashes) == 2


def test_a_transform_without_a_source_is_refused_in_a_line():
    with pytest.raises(PluginError, match="source of its transform cannot be found"):
        _ = Method(name="builtin", options=Options, transform=max).source_hash


def test_the_source_of_every_bundled_method_is_its_plugin():
    for method in load_plugins().methods.values():
        own = method._sources()[0]
        assert own.stem == method.transform.__module__.rpartition(".")[2], method.name
