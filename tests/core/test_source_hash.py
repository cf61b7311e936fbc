"""What a method computes is part of every key: its source, under whatever decorators."""

from __future__ import annotations

import pytest

from harness.config import SweepConfig
from harness.errors import PluginError
from harness.method import Method, Options
from harness.planning import plan_sweep
from harness.plugins import load_plugins
from harness.records import CellKind

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


METER = """
from harness import Meter, Record, hookimpl

def measure(measured):
    return [Record("mine", {number}, "things")]

@hookimpl
def register_meters():
    return [Meter(name="mine", measure=measure)]
"""

LOADER = """
from harness import hookimpl

@hookimpl
def load_model(spec, device, dtype):
    return None  # {number}
"""


def _keys(*plugins):
    """The keys of all cells by kind."""
    config = SweepConfig(
        methods="rtn", models="zoo:opt-4m", tasks="grammar", prompt_lens="8", device="cpu", plugin=plugins
    )
    cells = plan_sweep(config).grid.cells
    return {kind: {cell.key for cell in cells if cell.kind is kind} for kind in CellKind}


def _keys_of_versions(file, text):
    """The keys without a plugin, with its first version, with its second and with that again."""
    yield _keys()
    for number in (1, 2, 2):
        file.write_text(text.format(number=number))
        yield _keys(str(file))


def test_an_edited_meter_is_asked_again_in_timed_cells_alone(tmp_path):
    without, first, second, again = _keys_of_versions(tmp_path / "meter.py", METER)
    assert second == again
    for kind in (CellKind.TRANSFORM, CellKind.TASK):
        assert without[kind] == first[kind] == second[kind]
    timed = [keys[CellKind.SCENARIO] for keys in (without, first, second)]
    assert all(timed)
    assert len(set().union(*timed)) == sum(map(len, timed))


def test_a_plugin_that_may_load_models_is_part_of_every_key(tmp_path):
    without, first, second, again = (
        set().union(*keys.values()) for keys in _keys_of_versions(tmp_path / "loader.py", LOADER)
    )
    assert second == again
    assert len(without | first | second) == len(without) + len(first) + len(second)
