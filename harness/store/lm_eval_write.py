"""Writing scores as lm-eval does: a folder a variant, with a results file and the samples of each task."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from harness.errors import ConfigError
from harness.evaluate.metrics import metric_of
from harness.store.encoding import dump_json
from harness.store.exchange_export import ExportTree, Wanted, read_tree
from harness.store.exchange_rows import Row
from harness.store.lm_eval_files import safe_name, samples_name
from harness.store.lm_eval_own import OWN, own_rows
from harness.store.lm_eval_scores import split_record, standard_error
from harness.store.store import Store

__all__ = ["Written", "export_lm_eval"]

_WINDOWS = frozenset({"nll", "mean_kl", "top1_agreement"})  # of windows of text, not of documents


@dataclass(frozen=True)
class Written:
    """What a folder holds: results files, tasks in them, samples; `left_out` are cells without scores."""

    files: int
    tasks: int
    samples: int
    left_out: int


def export_lm_eval(
    store: Store,
    folder: Path,
    wanted: Wanted,
    *,
    leave_out: Sequence[str] = (),
    with_host: bool = False,
) -> Written:
    """Write the scores that are wanted into a new folder, in the form of lm-eval's output.

    Cells of times and sizes, and cells that are not ok, have no place there and are counted. Rows that came
    from lm-eval are written as they came.

    Raises:
        ConfigError: no scores are wanted, the folder is not empty or cannot be written.
        UnknownName: no such sweep, or nothing of that name can be left out.
        StoreError: the store cannot be read.
    """
    tree = read_tree(store, wanted, leave_out, with_host=with_host)
    runs = list(_runs(tree))
    cells = sum(each.section.name == "cells" for row in tree.variants for each in row.children)
    if not runs:
        raise ConfigError(f"nothing to export: {store.label} holds no scores of what is wanted")
    with _new_folder(folder) as inside:
        samples = sum(_write(inside / name, run) for name, run in _named(runs))
    tasks = sum(len(run.cells) for run in runs)
    return Written(len(runs), tasks, samples, cells - tasks)


@dataclass(frozen=True)
class _Run:
    """The task cells of one variant that one sweep measured."""

    machine: Row
    sweep: Row
    variant: Row
    cells: tuple[Row, ...]

    @property
    def original(self) -> Mapping[str, Any] | None:
        """The results file that the rows came from, where lm-eval wrote it."""
        found = self.sweep.values["manifest"].get("lm_eval")
        return found if isinstance(found, dict) and isinstance(found.get("results"), dict) else None

    @property
    def moment(self) -> str:
        """When it was, as lm-eval writes it into names of files."""
        name = self.sweep.values["manifest"].get("lm_eval_file")
        if self.original is not None and isinstance(name, str) and name.endswith(".json") and "_" in name:
            return safe_name(Path(name).stem.rpartition("_")[2])
        started = datetime.fromisoformat(self.sweep.values["started_at"]).replace(tzinfo=None)
        return started.isoformat(timespec="microseconds").replace(":", "-")


def _runs(tree: ExportTree) -> Iterator[_Run]:
    for variant in tree.variants:
        effects = [child for child in variant.children if child.section.name != "cells"]
        by_sweep: dict[int, list[Row]] = {}
        for cell in variant.children:
            if cell.section.name == "cells" and cell.values["task"] and cell.values["status"] == "ok":
                by_sweep.setdefault(cell.values["sweep"], []).append(cell)
        for number, cells in by_sweep.items():
            sweep = tree.sweeps[number - 1]
            own = tuple(replace(cell, values={**cell.values, "sweep": 1, "used_by": []}) for cell in cells)
            yield _Run(
                machine=tree.machines[sweep.values["machine"] - 1],
                sweep=replace(sweep, values={**sweep.values, "machine": 1}),
                variant=replace(variant, children=[*effects, *own]),
                cells=own,
            )


def _named(runs: Sequence[_Run]) -> Iterator[tuple[str, _Run]]:
    """A folder for each variant; of several that would be called alike, with the beginning of their key."""
    owners: dict[str, str] = {}
    for run in runs:
        values = run.variant.values
        label = (
            values["model"] if values["method"] == "baseline" else f"{values['model']}__{values['method']}"
        )
        original = (run.original or {}).get("model_name_sanitized")
        name = safe_name(original if isinstance(original, str) and original else label)
        if owners.setdefault(f"{name}/{run.moment}", values["key"]) != values["key"]:
            name = f"{name}__{values['key'][:8]}"
        yield name, run


@contextlib.contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A folder beside this one that takes its place at the end, all or nothing."""
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(f"{folder} is there and not an empty folder: name a new one")
        made = Path(tempfile.mkdtemp(dir=folder.absolute().parent, prefix=f".{folder.name}."))
        try:
            yield made
            made.chmod(0o755)
            os.replace(made, folder)
        except BaseException:
            shutil.rmtree(made, ignore_errors=True)
            raise
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error.strerror or error}") from None


def _write(folder: Path, run: _Run) -> int:
    """Write one run; how many samples it has."""
    folder.mkdir(exist_ok=True)
    original = run.original
    samples = {
        str(cell.values["task"]): list(_originals(cell) if original is not None else _samples(cell))
        for cell in run.cells
    }
    content = _restricted(original, samples) if original is not None else _results(run, samples)
    _put(folder / f"results_{run.moment}.json", _text(content, original is not None, indent=2))
    for task, listed in samples.items():
        if listed:
            lines = "".join(f"{_text(sample, original is not None)}\n" for sample in listed)
            _put(folder / samples_name(task, run.moment), lines)
    return sum(map(len, samples.values()))


def _put(file: Path, text: str) -> None:
    if file.exists():
        raise ConfigError(
            f"two sweeps of one variant began at the same moment ({file.name}): export one a time"
        )
    try:
        data = text.encode()
    except UnicodeEncodeError:  # half a character, which JSON can only write escaped
        data = text.encode("utf-8", "backslashreplace")
    file.write_bytes(data)


def _text(value: Any, is_original: bool, indent: int | None = None) -> str:
    # lm-eval writes NaN as Python does; our own part is standard JSON with tags.
    plain = value if is_original else json.loads(dump_json(value))
    return json.dumps(plain, indent=indent, ensure_ascii=False)


# --- rows that came from lm-eval ------------------------------------------------------------------------


def _restricted(original: Mapping[str, Any], tasks: Mapping[str, Any]) -> Mapping[str, Any]:
    """The file as it came; where only some of its tasks are wanted, without the others."""
    if set(original["results"]) <= set(tasks):
        return original
    by_task = ("results", "configs", "versions", "n-shot", "higher_is_better", "n-samples", "task_hashes")
    return {
        name: {task: each for task, each in value.items() if task in tasks}
        if name in by_task and isinstance(value, dict)
        else value
        for name, value in original.items()
    }


def _originals(cell: Row) -> Iterator[Any]:
    details = [each.values["detail"] for each in cell.children if each.section.name == "items"]
    kept = [(detail["line"], detail["lm_eval"]) for detail in details if "lm_eval" in detail]
    yield from (sample for _, sample in sorted(kept, key=lambda pair: pair[0]))


# --- rows that the harness measured ---------------------------------------------------------------------


def _results(run: _Run, samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    values, manifest = run.variant.values, run.sweep.values["manifest"]
    versions = manifest.get("versions") or {}
    results: dict[str, dict[str, Any]] = {}
    members: dict[str, list[str]] = {}
    for cell in run.cells:
        task = str(cell.values["task"])
        results.setdefault(task, {"name": task, "alias": task})
        for record in _children(cell, "records"):
            metric, filter_name, subtask = split_record(record.values["metric"])
            if subtask:
                members.setdefault(task, []).append(subtask)
            entry = results.setdefault(subtask or task, {"name": subtask or task, "alias": subtask or task})
            entry[f"{metric},{filter_name}"] = _shown(record.values["value"])
            entry[f"{metric}_stderr,{filter_name}"] = _error(cell, record) if not subtask else "N/A"
            entry["sample_len"] = max(entry.get("sample_len", 0), record.values["n"])
    tasks = list(results)
    return {
        "results": results,
        "group_subtasks": {task: list(dict.fromkeys(names)) for task, names in members.items()},
        "configs": {task: {"task": task} for task in tasks},
        "versions": {},
        "n-shot": {},
        "higher_is_better": {task: _directions(results[task]) for task in tasks},
        "n-samples": {
            task: dict.fromkeys(("original", "effective"), results[task].get("sample_len", 0))
            for task in tasks
        },
        "config": {
            "model": OWN,
            "model_args": f"pretrained={values['model']},method={values['method']}",
            "model_dtype": values["dtype"],
            "device": values["device"],
            "limit": run.sweep.values["config"].get("limit"),
            "random_seed": values["seed"],
        },
        "git_hash": None,
        "date": datetime.fromisoformat(run.sweep.values["started_at"]).timestamp(),
        "transformers_version": versions.get("transformers"),
        "lm_eval_version": versions.get("lm-eval"),
        "task_hashes": {task: _signature(listed) for task, listed in samples.items() if listed},
        "model_source": OWN,
        "model_name": f"{values['model']} {values['method']}",
        "model_name_sanitized": safe_name(f"{values['model']}__{values['method']}"),
        OWN: own_rows([run.machine, run.sweep, run.variant]),
    }


def _samples(cell: Row) -> Iterator[dict[str, Any]]:
    """lm-eval's sample of each document and filter; the texts are in the task's data, not in a store."""
    found: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for item in _children(cell, "items"):
        metric, filter_name, _ = split_record(item.values["metric"])
        key = "windows" if metric in _WINDOWS else filter_name
        found.setdefault((key, item.values["position"]), []).append(item.values)
    for (filter_name, position), items in sorted(found.items()):
        detail = {name: value for each in items for name, value in each["detail"].items()}
        # Whether an answer was the greedy one is not stored.
        answers = [[str(score), "N/A"] for score in detail.get("loglikelihoods", ())]
        if not answers and "loglikelihood" in detail:
            answers = [[str(detail["loglikelihood"]), "N/A"]]
        responses = [detail["response"]] if "response" in detail else answers
        target = str(detail.get("target", ""))
        scores = {split_record(each["metric"])[0]: _finite(each["outcome"]) for each in items}
        yield {
            "doc_id": position,
            "doc": {"doc_id": position},
            "target": target,
            "arguments": {},
            "resps": [[answer] for answer in responses],
            "filtered_resps": responses,
            "filter": filter_name,
            "metrics": list(scores),
            "doc_hash": str(detail.get("doc_hash", "")),
            "prompt_hash": "",
            "target_hash": hashlib.sha256(target.encode("utf-8", "replace")).hexdigest(),
            **scores,
            OWN: {"items": [[each["metric"], each["outcome"], each["detail"]] for each in items]},
        }


def _children(row: Row, name: str) -> list[Row]:
    return [child for child in row.children if child.section.name == name]


def _finite(value: float | None) -> float | None:
    """A number that JSON has; of the others (None is a stored NaN) ours stand beside it.

    None, because a column of numbers and texts is none that a reader of data sets takes.
    """
    return value if value is not None and math.isfinite(value) else None


def _shown(value: float | None) -> float | str:
    """A number, or what lm-eval's tables show where there is none."""
    found = _finite(value)
    return "N/A" if found is None else found


def _error(cell: Row, record: Row) -> float | str:
    metric = record.values["metric"]
    outcomes = [
        each.values["outcome"] for each in _children(cell, "items") if each.values["metric"] == metric
    ]
    value = record.values["value"]
    if value is None or not all(outcome is not None and math.isfinite(outcome) for outcome in outcomes):
        return "N/A"
    return _shown(standard_error(value, outcomes))


def _directions(entry: Mapping[str, Any]) -> dict[str, bool]:
    names = {key.partition(",")[0] for key in entry if "," in key}
    return {
        name: metric_of(name).better == "higher" for name in sorted(names) if not name.endswith("_stderr")
    }


def _signature(samples: Sequence[Mapping[str, Any]]) -> str:
    parts = (sample[name] for sample in samples for name in ("doc_hash", "prompt_hash", "target_hash"))
    return hashlib.sha256("".join(parts).encode()).hexdigest()
