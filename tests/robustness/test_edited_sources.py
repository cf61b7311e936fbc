"""A method that somebody edits while a sweep runs: nothing is stored under the key of what it was."""

from __future__ import annotations

from tests.robustness import stored

PLUGIN = """
from pathlib import Path

from harness import Method, Options, hookimpl
from harness.nn.surgery import block_linears


class EditsOptions(Options):
    factor: float = 0.5


def transform(model, options, context):
    for _, linear in block_linears(model):
        linear.weight.data.mul_(options.factor)
    file = Path(__file__)
    file.write_text(file.read_text() + "# edited")
    return model


@hookimpl
def register_methods():
    return [Method(name="edits", options=EditsOptions, transform=transform)]
"""


def outcomes(folder):
    return {name: set(found.values()) for name, found in stored.statuses(folder).items()}


def test_a_method_that_is_edited_is_not_taken_for_what_it_was(nursery, tmp_path, command):
    file = tmp_path / "edits.py"
    file.write_text(PLUGIN)
    arguments = command("edits,edits:factor=0.25", "--plugin", file, task=False)
    swept = nursery.sweep(tmp_path, *arguments)
    assert swept.wait() == 1, swept.err
    assert outcomes(tmp_path) == {
        "baseline": {("ok", "")},
        "edits": {("ok", "")},
        "edits:factor=0.25": {
            ("failed", "edits: its source was edited since the sweep began; run the same command again")
        },
    }
    nursery.wait_until_empty()
