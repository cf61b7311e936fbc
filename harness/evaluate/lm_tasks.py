"""From a resolved task to lm-eval's task objects, and to the documents of a rolling task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import datasets.exceptions
from lm_eval.tasks import TaskManager

from harness.errors import ConfigError, NotApplicable
from harness.evaluate.hub_data import pinned
from harness.evaluate.index import ResolvedTask
from harness.evaluate.revision import require_unchanged

__all__ = ["ROLLING", "LoadedTask", "load_task"]

ROLLING = "loglikelihood_rolling"


@dataclass(frozen=True)
class LoadedTask:
    """lm-eval's objects: the tasks by name and, for a group, the groups by name (its own first)."""

    name: str
    tasks: Mapping[str, Any]
    groups: Mapping[str, Any]

    @property
    def is_group(self) -> bool:
        return bool(self.groups)

    @property
    def is_rolling(self) -> bool:
        """Whether every task of it scores running text."""
        return all(task.OUTPUT_TYPE == ROLLING for task in self.tasks.values())

    def documents(self, limit: int | None) -> list[str]:
        """The texts that a rolling task scores, in order; `limit` counts per task, as lm-eval's does.

        Raises:
            NotApplicable: it is no rolling task.
        """
        if not self.is_rolling:
            raise NotApplicable(f"task {self.name!r} scores no running text")
        return [
            str(task.doc_to_target(document))
            for task in self.tasks.values()
            for _, document in task.doc_iterator(limit=limit)
        ]


def load_task(task: ResolvedTask, *, seed: int) -> LoadedTask:
    """Build lm-eval's objects; reads the data.

    Raises:
        ConfigError: the data set cannot be loaded (no network, no such set), the task is broken, or a file of
            it was changed since it was resolved.
        NotApplicable: the task runs generated code, or needs images or sound.
    """
    try:
        with pinned(task.data):
            if task.kind == "group":
                folders = [str(folder) for folder in task.include_dirs]
                manager = TaskManager(include_path=folders, include_defaults=False)
                loaded = manager.load([task.name])
            else:
                loaded = TaskManager(include_defaults=False).load([str(task.yaml_path)])
    except (datasets.exceptions.DatasetsError, OSError, ImportError) as error:
        raise ConfigError(f"the data of task {task.name!r} cannot be loaded: {_reason(error)}") from error
    except StopIteration as error:  # what `datasets` makes of files that are empty
        raise ConfigError(f"the data of task {task.name!r} cannot be loaded: there are none") from error
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise ConfigError(f"task {task.name!r} cannot be built: {_reason(error)}") from error
    require_unchanged(task.name, task.files)
    for leaf in loaded["tasks"].values():
        _check(task.name, leaf)
        # As lm-eval's own entry point does.
        if leaf.get_config("num_fewshot") is None:
            leaf.set_config(key="num_fewshot", value=0)
        leaf.set_fewshot_seed(seed=seed)
    return LoadedTask(task.name, loaded["tasks"], loaded.get("groups", {}))


def _reason(error: BaseException) -> str:
    """What went wrong, in one line."""
    # `datasets` only says that something did; what it was is the cause (a line that is no JSON).
    if type(error) is datasets.exceptions.DatasetGenerationError and error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())[:300]
    # The text of a KeyError is the key alone.
    return f"{type(error).__name__}: {text}" if isinstance(error, KeyError) else text


def _check(name: str, leaf: Any) -> None:
    if getattr(leaf, "UNSAFE_CODE", False):
        raise NotApplicable(f"task {name!r} executes generated code, which the harness does not do")
    if getattr(leaf, "MULTIMODAL", False):
        raise NotApplicable(f"task {name!r} needs images or sound; the harness scores text")
