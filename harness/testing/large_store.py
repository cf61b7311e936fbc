"""A results store of any size with made-up but plausible rows, to measure and test what reads stores.

``python -m harness.testing.large_store FILE --variants 5000 --records 1000000``

Every variant has a transform, tasks and timed shapes. The rows are of all kinds that readers must get right:
baselines, simulated and synthetic variants, failures, cells that were measured again, scores with a limit,
raw readings, outcomes of items and kernels.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import Connection, Table, insert

from harness.errors import ConfigError, HarnessError
from harness.store.catalogue import add_to_catalogue
from harness.store.store import Store
from harness.store.tables import (
    cells,
    effects,
    items,
    kernels,
    records,
    samples,
    sweep_cells,
    variants,
)

__all__ = ["MODELS", "make_store"]

MODELS = (
    *(f"shape:model-{billions}b" for billions in (3, 7, 13, 70)),
    *(f"zoo:model-{millions}m" for millions in range(10, 26)),
)
DEVICES = (("cuda", "NVIDIA H100 80GB HBM3"), ("cpu", "a processor"))
TASKS = ("arc_easy", "boolq", "copa", "hellaswag", "piqa", "sciq", "wikitext", "winogrande")
SHAPES = tuple(f"b{b}-p{p}-g64" for b, p in product((1, 8, 32, 4, 16, 2), (512, 128, 2048, 8192, 1024)))
_SWEEPS = 40
_LIMIT = 100  # of the last sweep's items
_READINGS, _ITEMS, _KERNELS = 20, 200, 6
_DETAILED = 20  # one variant in so many has raw readings, items and kernels; baselines all have them
_FLUSH = 20_000  # rows kept in memory

# label, family, settings of each option, share of the bytes, of the time, of the items lost
_METHODS: tuple[tuple[str, str, Mapping[str, Sequence[Any]], float, float, float], ...] = (
    ("rtn", "quantization", {"bits": (8, 4, 3), "group_size": (128, 64, -1)}, 0.3, 0.7, 0.06),
    ("gptq", "quantization", {"bits": (8, 4, 3, 2), "group_size": (128, 64, 32, -1)}, 0.3, 0.65, 0.03),
    ("smoothquant", "quantization", {"alpha": (0.25, 0.5, 0.75), "bits": (8, 6)}, 0.5, 0.6, 0.02),
    ("wanda", "pruning", {"sparsity": (0.25, 0.5, 0.75)}, 1.0, 1.02, 0.08),
    ("nm-prune", "sparsity", {"n": (2, 4), "m": (4, 8)}, 0.57, 0.75, 0.07),
    ("kd", "distillation", {"temperature": (1.0, 2.0, 4.0)}, 0.5, 0.5, 0.05),
    ("window-attention", "attention", {"window": (64, 128, 256, 512)}, 1.0, 0.8, 0.03),
    ("early-exit", "adaptive", {"threshold": (0.5, 0.7, 0.9)}, 1.0, 0.6, 0.09),
)


class _Kind(NamedTuple):
    """One variant that may be made: everything but where it stands."""

    method: str
    family: str
    chain: list[dict[str, Any]]
    bytes_share: float
    time_share: float
    lost: float


@dataclass
class _Rows:
    """Rows waiting to be inserted, by table, in the order in which they must go in."""

    connection: Connection
    waiting: dict[Table, list[dict[str, Any]]] = field(default_factory=dict)
    next_id: dict[Table, int] = field(default_factory=dict)

    def add(self, table: Table, **values: Any) -> int:
        """Queue a row; returns its id, which is set here so that nothing must be read back."""
        id_ = self.next_id.get(table, 1)
        if "id" in table.c:
            values["id"] = id_
            self.next_id[table] = id_ + 1
        self.waiting.setdefault(table, []).append(values)
        return id_

    def flush(self, at_least: int = 1) -> None:
        """Insert what waits, parents before children, where it is enough."""
        if sum(map(len, self.waiting.values())) < at_least:
            return
        for table in (variants, effects, cells, sweep_cells, records, samples, items, kernels):
            if rows := self.waiting.pop(table, None):
                self.connection.execute(insert(table), rows)


def make_store(path: Path, variant_count: int = 5000, record_count: int = 1_000_000, seed: int = 0) -> None:
    """Write a new store with exactly so many variants and records.

    Raises:
        ConfigError: the file is there already; fewer records than variants; no variant.
        StoreError: the file cannot be written.
    """
    if path.exists():
        raise ConfigError(f"{path} is there already; name a new file")
    if variant_count < 1 or record_count < variant_count:
        raise ConfigError(
            f"{variant_count} variants with {record_count} records cannot be made; "
            "there must be at least one variant, and one record for each"
        )
    with Store.open(path) as store:
        sweep_ids = [_sweep(store, number) for number in range(_SWEEPS)]
        with store.writing() as connection:
            _fill(_Rows(connection), sweep_ids, variant_count, record_count, random.Random(seed))
            add_to_catalogue(connection, None)


def _sweep(store: Store, number: int) -> int:
    device, name = DEVICES[number % len(DEVICES)]
    manifest = {"device": device, "device_name": name, "cpu": "a processor", "measuring_version": 1}
    config = {"limit": _LIMIT} if number == _SWEEPS - 1 else {}
    sweep_id = store.open_sweep(command="harness sweep", config=config, manifest=manifest, cells_planned=0)
    store.close_sweep(sweep_id, "finished")
    return sweep_id


def _fill(
    rows: _Rows, sweep_ids: Sequence[int], variant_count: int, left: int, chance: random.Random
) -> None:
    kinds = _kinds()
    for number in range(variant_count):
        # One model after the other, so that each has every method, a baseline first.
        model = MODELS[number * len(MODELS) // variant_count]
        place = number - -(-MODELS.index(model) * variant_count // len(MODELS))
        setting, kind = divmod(place, len(kinds))
        sweep = sweep_ids[setting % len(sweep_ids)]
        quota = left // (variant_count - number)
        _variant(rows, sweep, number, model, kinds[kind], setting, quota, chance)
        left -= quota
        rows.flush(_FLUSH)
    rows.flush()


def _kinds() -> list[_Kind]:
    found = [_Kind("baseline", "baseline", [{"name": "baseline", "options": {}}], 1.0, 1.0, 0.0)]
    for name, family, settings, bytes_share, time_share, lost in _METHODS:
        for number, values in enumerate(product(*settings.values())):
            options = dict(zip(settings, values, strict=True))
            label = ":".join([name, *(f"{option}={value}" for option, value in options.items())])
            spread = 1 + 0.05 * number
            chain = [{"name": name, "options": options}]
            found.append(
                _Kind(label, family, chain, bytes_share / spread, time_share * spread, lost * spread)
            )
    return found


def _variant(
    rows: _Rows,
    sweep: int,
    number: int,
    model: str,
    kind: _Kind,
    setting: int,
    quota: int,
    chance: random.Random,
) -> None:
    device, device_name = DEVICES[(sweep - 1) % len(DEVICES)]
    synthetic, simulated = model.startswith("shape:"), kind.method.startswith("wanda")
    size = 1 + MODELS.index(model) / 4
    id_ = rows.add(
        variants,
        key=f"variant {number}", sweep_id=sweep, model=model, model_identity=f"sha256:{model}",
        method=kind.method, chain=kind.chain, family=kind.family, seed=setting, dtype="bfloat16",
        device=device, device_name=device_name, synthetic=synthetic, model_info={"num_layers": 6},
        simulated=simulated,
    )  # fmt: skip
    rows.add(
        effects,
        variant_id=id_, position=0, module="model.layers.0.mlp.up_proj", kind="Linear",
        changed=kind.family != "baseline", dtype="int8", parameters=1_000_000, bytes_before=2_000_000,
        bytes_after=int(2_000_000 * kind.bytes_share), stored_bits_per_weight=16 * kind.bytes_share,
        sparsity=None, nm_pattern=None, simulated=simulated, kernel=None,
    )  # fmt: skip
    detailed = kind.family == "baseline" or number % _DETAILED == 0
    made = _Variant(rows, sweep, id_, kind, size * chance.uniform(0.95, 1.05), detailed, chance, quota)
    made.cell("transform", "transform", _transform(kind, size))
    if not synthetic:
        for task in TASKS:
            made.cell("task", task, _task(task, kind, size, chance))
    for shape in SHAPES:
        made.cell("scenario", shape, _timings(shape, kind, size, chance))
    while made.quota:  # a store of more records than there are shapes: what was measured again
        for shape in SHAPES:
            made.cell("scenario", shape, _timings(shape, kind, size, chance))
    if number % 33 == 0:
        made.fail("b64-p8192-g64", "oom", "CUDA out of memory")
    if synthetic:
        made.fail("hellaswag", "not_applicable", "random weights: speed and memory only", kind="task")


class _Reading(NamedTuple):
    metric: str
    value: float
    unit: str
    spread: float = 0.0  # half of the interval's width, relative; 0 is no interval
    n: int = 1
    note: str | None = None


@dataclass
class _Variant:
    """Writes the cells of one variant until its records are used up."""

    rows: _Rows
    sweep: int
    id: int
    kind: _Kind
    size: float
    detailed: bool
    chance: random.Random
    quota: int

    def fail(self, place: str, status: str, reason: str, kind: str = "scenario") -> None:
        self._cell(kind, place, status=status, reason=reason)

    def cell(self, kind: str, place: str, readings: Iterator[_Reading]) -> None:
        if not self.quota:
            return
        if self.id % 50 == 0 and place == SHAPES[0]:
            self.fail(place, "timeout", "took longer than 600 s")  # the same key: no longer current
        cell_id = self._cell(kind, place)
        for reading in readings:
            if self.quota:
                self.quota -= 1
                self._record(cell_id, reading)
        if self.detailed and kind == "task":
            self._items(cell_id)
        if self.detailed and place == SHAPES[0]:
            self._kernels(cell_id)

    def _cell(self, kind: str, place: str, status: str = "ok", reason: str | None = None) -> int:
        cell_id = self.rows.add(
            cells,
            key=f"variant {self.id} {kind} {place}", variant_id=self.id, sweep_id=self.sweep, kind=kind,
            task=place if kind == "task" else None, scenario=place if kind == "scenario" else None,
            status=status, reason=reason, traceback=None, log_tail=None,
            started_at="2026-01-01T00:00:00.000+00:00", seconds=1.5,
        )  # fmt: skip
        self.rows.add(sweep_cells, sweep_id=self.sweep, cell_id=cell_id)
        return cell_id

    def _record(self, cell_id: int, reading: _Reading) -> None:
        around = reading.value * reading.spread
        record_id = self.rows.add(
            records,
            cell_id=cell_id, metric=reading.metric, value=reading.value, unit=reading.unit,
            lower=reading.value - around if around else None,
            upper=reading.value + around if around else None,
            n=reading.n, mode="graph" if reading.unit == "s" else None, note=reading.note,
        )  # fmt: skip
        if self.detailed and reading.unit == "s" and reading.spread:
            for position in range(_READINGS):
                value = reading.value * self.chance.uniform(0.97, 1.05)
                self.rows.add(samples, record_id=record_id, position=position, value=value)

    def _items(self, cell_id: int) -> None:
        for position in range(_ITEMS):
            right = (position * 37 % 100) < 62 and self.chance.random() > self.kind.lost
            self.rows.add(
                items, cell_id=cell_id, metric="acc", position=position, outcome=float(right), detail={}
            )

    def _kernels(self, cell_id: int) -> None:
        for phase, position in product(("prefill", "decode"), range(_KERNELS)):
            share = 2.0 ** -(position + 1)
            self.rows.add(
                kernels,
                cell_id=cell_id, phase=phase, position=position, name=f"kernel_{position}",
                family="matmul" if position < 2 else "other", calls=6, seconds=share / 1000, share=share,
            )  # fmt: skip


def _transform(kind: _Kind, size: float) -> Iterator[_Reading]:
    yield _Reading("transform_s", 3.5 * kind.time_share * size, "s")
    yield _Reading("stored_bits_per_weight", 16 * kind.bytes_share, "bits")
    yield _Reading("compression_ratio", 1 / kind.bytes_share, "x")
    yield _Reading("transform_energy", 900 * size, "J")
    yield _Reading("transform_peak_bytes", 3e9 * size, "B")
    yield _Reading("calibration_tokens", 65_536.0, "tokens")
    yield _Reading("sparsity", 0.0, "fraction")
    yield _Reading("parameters_changed_share", 0.9, "fraction")


def _task(task: str, kind: _Kind, size: float, chance: random.Random) -> Iterator[_Reading]:
    if task == "wikitext":
        note = "seq_len=512, windows=400, dropped_tokens=0"
        value = 24.5 * (1 + 3 * kind.lost) / size**0.3 * chance.uniform(0.99, 1.01)
        yield _Reading("token_perplexity", value, "ppl", 0.03, 4096, note)
        yield _Reading("mean_kl", kind.lost / 3, "nats", 0.1, 4096)
        yield _Reading("top1_agreement", 1 - kind.lost, "fraction", 0.02, 4096)
        return
    value = min(0.99, 0.45 * size**0.3 * (1 - kind.lost) * chance.uniform(0.97, 1.03))
    yield _Reading("acc", value, "fraction", 0.08, _ITEMS)
    yield _Reading("acc_norm", value * 1.02, "fraction", 0.08, _ITEMS)
    yield _Reading("acc_flips", kind.lost, "fraction", 0.2, _ITEMS)


def _timings(shape: str, kind: _Kind, size: float, chance: random.Random) -> Iterator[_Reading]:
    batch, prompt = (int(part[1:]) for part in shape.split("-")[:2])
    noise = chance.uniform(0.95, 1.05) * kind.time_share * size
    prefill, decode = 2e-5 * prompt * batch * noise, 2e-3 * batch**0.5 * noise
    weight = 1.25e9 * size * kind.bytes_share
    yield _Reading("weight_bytes", weight, "B")
    yield _Reading("prefill_latency", prefill, "s", 0.02, _READINGS)
    yield _Reading("decode_latency", decode, "s", 0.02, _READINGS)
    yield _Reading("end_to_end_latency", prefill + 64 * decode, "s", 0.02, _READINGS)
    yield _Reading("prefill_throughput", batch * prompt / prefill, "tokens/s", 0.02, _READINGS)
    yield _Reading("decode_throughput", batch / decode, "tokens/s", 0.02, _READINGS)
    yield _Reading("prefill_peak_bytes", weight * 1.2 + 4096.0 * batch * prompt, "B")
    yield _Reading("decode_peak_bytes", weight * 1.1, "B")
    yield _Reading("kv_cache_bytes_per_token", 6144.0 * size, "B/token")
    yield _Reading("prefill_energy", prefill * 400, "J/token", 0.05, 5)
    yield _Reading("decode_energy", decode * 300, "J/token", 0.05, 5)
    yield _Reading("prefill_mfu", min(0.9, 0.4 / kind.time_share), "fraction")
    yield _Reading("decode_mbu", min(0.9, 0.6 / kind.time_share), "fraction")
    slower = kind.time_share > 1
    words = "slower than the baseline: no kernel for this form" if slower else "not measurably slower"
    yield _Reading("verdict", float(slower), "1", note=words)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; prints what was made as one line of JSON."""
    parser = argparse.ArgumentParser(prog="python -m harness.testing.large_store", description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--variants", type=int, default=5000)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(arguments)
    began = time.perf_counter()
    try:
        make_store(asked.file, asked.variants, asked.records, asked.seed)
    except HarnessError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    made = {
        "file": str(asked.file),
        "variants": asked.variants,
        "records": asked.records,
        "seconds": round(time.perf_counter() - began, 1),
        "mb": round(asked.file.stat().st_size / 1e6, 1),
    }
    print(json.dumps(made))
    return 0


if __name__ == "__main__":
    sys.exit(main())
