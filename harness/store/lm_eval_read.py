"""Reading what lm-eval wrote: one sweep of one variant, with a cell for each task.

What the harness has no column for is kept whole: the results file in the manifest of the sweep, each sample
in the detail of its item, so that `harness results export --layout lm-eval` writes the same files again.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from harness.errors import ConfigError
from harness.store.encoding import dump_json
from harness.store.exchange_layout import FORMAT, VERSION, sections
from harness.store.exchange_read import Contents, RowReader
from harness.store.exchange_text import MAX_LINE, parsed_json, problem, read_lines
from harness.store.lm_eval_files import results_files, samples_files
from harness.store.lm_eval_layout import NOT_METRICS, Call, ResultsFile, Sample, first_problem
from harness.store.lm_eval_own import OWN, own_contents
from harness.store.lm_eval_scores import record_values, sample_outcomes

__all__ = ["read_lm_eval"]

_PLAIN = frozenset({
    "pretrained", "revision", "dtype", "device", "batch_size", "max_batch_size", "max_length", "tokenizer",
    "trust_remote_code", "parallelize", "device_map", "subfolder", "add_bos_token", "use_fast_tokenizer",
    "truncation", "attn_implementation",
})  # fmt: skip
"""Arguments that say which model it is and how it was loaded, and leave the model as it is."""


def read_lm_eval(place: Path) -> list[Contents]:
    """Read and check a results file with its samples, or all of a folder.

    Raises:
        ConfigError: in one line, with the file and for samples the line: nothing of lm-eval's, not JSON, a
            value of the wrong type or range, samples that belong to other results.
    """
    return [_contents(file) for file in results_files(place)]


def _contents(file: Path) -> Contents:
    raw = _json(file)
    read = _checked(file, raw)
    samples = {task: list(_samples(path)) for task, path in samples_files(file, _tasks(raw, read)).items()}
    if OWN in raw:
        return own_contents(file, raw, samples)
    for task, lines in samples.items():
        _check_hash(file, read, task, lines)
    return _rows(file, raw, read, samples)


def _json(file: Path) -> Mapping[str, Any]:
    try:
        with file.open("rb") as opened:
            data = opened.read(4 * MAX_LINE + 1)
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"{file}: not text in UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror or error}") from None
    if len(data) > 4 * MAX_LINE:
        raise ConfigError(f"{file} is larger than {4 * MAX_LINE:,} bytes")
    value = parsed_json(file, 1, text, with_nan=True)
    if not isinstance(value, dict) or not isinstance(value.get("results"), dict):
        raise ConfigError(f"{file}: not lm-eval's results: it has no object called results")
    return value


def _checked(file: Path, raw: Mapping[str, Any]) -> ResultsFile:
    try:
        return ResultsFile.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"{file}: {first_problem(error)}") from None
    except RecursionError:
        raise ConfigError(f"{file}: nested too deep") from None


def _tasks(raw: Mapping[str, Any], read: ResultsFile) -> set[str]:
    configs = raw.get("configs")
    return {*read.results, *(configs if isinstance(configs, dict) else ())}


def _samples(file: Path) -> Iterator[tuple[int, Sample, Mapping[str, Any]]]:
    """Each sample with its line, checked, and as it stands in the file."""
    seen: dict[tuple[str, int], int] = {}
    for number, value in read_lines(file, with_nan=True):
        try:
            sample = Sample.model_validate(value)
        except ValidationError as error:
            raise problem(file, number, first_problem(error)) from None
        except RecursionError:
            raise problem(file, number, "nested too deep") from None
        key = sample.filter, sample.doc_id
        if key in seen:
            raise problem(file, number, f"document {sample.doc_id} was on line {seen[key]} already")
        seen[key] = number
        yield number, sample, value


def _check_hash(
    file: Path, read: ResultsFile, task: str, lines: Sequence[tuple[int, Sample, Mapping[str, Any]]]
) -> None:
    """lm-eval signs the samples in the results; others are not taken for theirs."""
    expected = read.task_hashes.get(task)
    parts = [(each.doc_hash, each.prompt_hash, each.target_hash) for _, each, _ in lines]
    if expected is None or any(part is None for each in parts for part in each):
        return
    text = "".join(str(part) for each in parts for part in each)
    if hashlib.sha256(text.encode()).hexdigest() != expected:
        raise ConfigError(f"{file}: the samples of {task} are not those of these results (task_hashes)")


# --- rows ---------------------------------------------------------------------------------------------


def _rows(
    file: Path,
    raw: Mapping[str, Any],
    read: ResultsFile,
    samples: Mapping[str, Sequence[tuple[int, Sample, Mapping[str, Any]]]],
) -> Contents:
    """The rows, through the reader of exported files, which checks each value once more."""
    uid = f"lm-eval:{hashlib.sha256(dump_json(raw).encode()).hexdigest()}"
    about = _about(read)
    started = _time(read)
    reader = RowReader(file, is_text=False)
    reader.put({"format": FORMAT, "version": VERSION})
    for section in sections().values():
        reader.put({"table": section.name, "columns": list(section.columns)})

    def put(name: str, values: Mapping[str, Any]) -> None:
        reader.put([name, *(values.get(column) for column in sections()[name].columns)])

    put(
        "machines", {"facts": {name: about[name] for name in ("device", "device_name", "cpu") if about[name]}}
    )
    put("sweeps", {
        "machine": 1, "command": f"lm-eval {read.lm_eval_version or ''}".strip(),
        "config": {"tasks": list(read.results), "models": [about["model"]], "limit": _limit(read)},
        "manifest": _manifest(file, raw, read, about, uid, started),
        "cells_planned": len(read.results), "status": "finished", "started_at": started,
    })  # fmt: skip
    put("variants", _variant(read, about, uid))
    for task, values in read.results.items():
        put("cells", {
            "sweep": 1, "used_by": [], "kind": "task", "task": task, "status": "ok", "started_at": started,
            "key": hashlib.sha256(f"{uid} {task}".encode()).hexdigest(), "seconds": 0.0,
        })  # fmt: skip
        lines = samples.get(task, ())
        asked = read.n_samples.get(task)
        n = asked.effective if asked is not None else None
        metrics = {name: value for name, value in values.items() if name not in NOT_METRICS}
        for record in record_values(metrics, [sample for _, sample, _ in lines], n):
            put("records", record)
        for item in _items(lines):
            put("items", item)
    reader.end()
    return reader.contents


def _variant(read: ResultsFile, about: Mapping[str, Any], uid: str) -> dict[str, Any]:
    method, call = about["method"], read.config
    return {
        "key": hashlib.sha256(uid.encode()).hexdigest(),
        "model": about["model"],
        "model_identity": "",
        "method": method,
        "chain": [{"name": method.partition(":")[0], "options": about["options"]}],
        "family": "baseline" if method == "baseline" else "other",
        "seed": call.random_seed or 0,
        "dtype": about["dtype"],
        "device": about["device"] or "",
        "device_name": about["device_name"] or "",
        "synthetic": False,
        "model_info": {"lm_eval": {"model": call.model, "model_args": call.model_args}},
    }


def _items(lines: Sequence[tuple[int, Sample, Mapping[str, Any]]]) -> Iterator[dict[str, Any]]:
    """The outcomes of each document; the sample itself stands with the first of them."""
    for number, sample, value in lines:
        detail: dict[str, Any] = {"lm_eval": value, "line": number}
        if sample.doc_hash:
            detail["doc_hash"] = sample.doc_hash
        for metric, outcome in sample_outcomes(sample):
            yield {"metric": metric, "position": sample.doc_id, "outcome": outcome, "detail": detail}
            detail = {}


def _about(read: ResultsFile) -> dict[str, Any]:
    """What is known of the model and the machine; None where the files do not say."""
    arguments = _arguments(read.config)
    environment = read.pretty_env_info or ""
    device = (read.config.device or str(arguments.get("device", ""))).partition(":")[0] or None
    gpu = re.search(r"^GPU 0: (.{1,200}?)(?: \(UUID.*)?$", environment, re.MULTILINE)
    cpu = re.search(r"^Model name: +(.{1,200})$", environment, re.MULTILINE)
    names = {"cuda": gpu, "cpu": cpu}
    found = names.get(device or "")
    model = read.model_name or arguments.get("pretrained") or read.config.model or "unknown"
    options = {name: value for name, value in arguments.items() if name not in _PLAIN}
    if read.config.model not in (None, "hf", "hf-auto"):
        options = {"model": read.config.model, **options}
    label = ":".join(["lm-eval", *(f"{name}={_short(value)}" for name, value in sorted(options.items()))])
    return {
        "model": str(model),
        "method": label if options else "baseline",
        "options": options,
        "dtype": (read.config.model_dtype or str(arguments.get("dtype", ""))).removeprefix("torch.")
        or "unknown",
        "device": device,
        "device_name": found.group(1).strip() if found else None,
        "cpu": cpu.group(1).strip() if cpu else None,
        "torch": _match(r"^PyTorch version: (\S{1,50})", environment),
    }


def _arguments(call: Call) -> dict[str, Any]:
    if isinstance(call.model_args, Mapping):
        return dict(call.model_args)
    parts = [part.partition("=") for part in (call.model_args or "").split(",") if part]
    return {name.strip(): value for name, _, value in parts}


def _short(value: Any) -> str:
    return re.sub(r"[^\w./-]+", "_", str(value))[:60]


def _match(pattern: str, text: str) -> str | None:
    found = re.search(pattern, text, re.MULTILINE)
    return found.group(1) if found else None


def _time(read: ResultsFile) -> str:
    moment = datetime.fromtimestamp(read.date or 0.0, UTC)
    return moment.isoformat(timespec="milliseconds")


def _limit(read: ResultsFile) -> int | None:
    """How many documents of each task were asked; of a limit that is a share, the most of any task."""
    limit = read.config.limit
    if limit is None or not math.isfinite(limit) or limit < 0:
        return None
    if limit >= 1:
        return int(limit)
    return max((each.effective or 0 for each in read.n_samples.values()), default=0) or None


def _manifest(
    file: Path, raw: Mapping[str, Any], read: ResultsFile, about: Mapping[str, Any], uid: str, started: str
) -> dict[str, Any]:
    versions = {
        "lm-eval": read.lm_eval_version,
        "transformers": read.transformers_version,
        "torch": about["torch"],
    }
    known = {name: about[name] for name in ("device", "device_name", "cpu") if about[name]}
    return {
        "sweep_uid": uid,
        "time_utc": started,
        "versions": versions,
        **known,
        "lm_eval": raw,
        "lm_eval_file": file.name,
    }
