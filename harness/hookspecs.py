"""The hooks a plugin can implement (pluggy, project name ``harness``).

A plugin is a module (or object) whose functions are marked with ``@hookimpl``. Collecting hooks are
called once when the harness starts; running hooks are called in the worker that makes a variant.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    import torch

    from harness.claims import Claim
    from harness.evaluate.task import TaskSource
    from harness.measure.meter import Meter
    from harness.method import Method
    from harness.models.loading import LoadedModel
    from harness.models.registry import ModelEntry
    from harness.models.spec import ModelSpec
    from harness.records import CellResult

__all__ = ["hookimpl", "hookspec"]

hookspec = pluggy.HookspecMarker("harness")
hookimpl = pluggy.HookimplMarker("harness")


@hookspec
def register_methods() -> Iterable[Method]:  # type: ignore[empty-body]
    """Return the methods of this plugin. Called once, at start. Names must be unique."""


@hookspec
def register_models() -> Iterable[ModelEntry]:  # type: ignore[empty-body]
    """Return named models (a name for `--models` and the spec that it stands for).

    Called once, at start. Names must be unique and must not contain a colon.
    """


@hookspec
def register_tasks() -> Iterable[TaskSource]:  # type: ignore[empty-body]
    """Return folders of lm-eval task files (YAML). Called once, at start.

    Every task in them can be named in `--tasks`. Names must be unique over all plugins.
    """


@hookspec
def register_meters() -> Iterable[Meter]:  # type: ignore[empty-body]
    """Return meters, which measure a variant in a scenario. Called once, at start."""


@hookspec
def register_claims() -> Iterable[Claim]:  # type: ignore[empty-body]
    """Return claims that stored rows decide, for `harness reproduce` and the Survey page.

    Called once, at start. Ids must be unique over all plugins.
    """


@hookspec(firstresult=True)
def load_model(spec: ModelSpec, device: torch.device, dtype: str) -> LoadedModel | None:
    """Load a model, or return None to leave it to another plugin or to the harness itself.

    Called in the worker, once per variant; the first answer wins. A plugin that answers owns
    everything about the model, its tokenizer included.
    """


@hookspec
def variant_started(label: str, model: str, options: dict[str, Any]) -> None:
    """Observe that a worker starts to make a variant. Called in the worker, before loading.

    An exception here is logged and changes nothing.
    """


@hookspec
def cell_finished(result: CellResult) -> None:
    """Observe a finished cell. Called in the worker, before the result is sent to the store.

    An exception here is logged and changes nothing.
    """
