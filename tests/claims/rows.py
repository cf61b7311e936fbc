"""Small stores for claims: models, methods and outcomes by hand."""

from __future__ import annotations

import random
import re

from harness.claims import Claim, SweepNeed, all_of
from harness.records import CellKind, CellResult, Item, Record, Status
from harness.store.store import VariantRow

MODEL, OTHER = "zoo:m", "zoo:other"
SHAPE = "b1-p64-g16"
WINDOWS = 30


def begin(store, *, config=None, device="cpu", device_name="a CPU", **manifest):
    facts = {
        "device": device,
        "device_name": device_name,
        "cpu": device_name,
        "measuring_version": 2,
        "versions": {"torch": "2.13"},
        **manifest,
    }
    return store.open_sweep(command="harness sweep", config=config or {}, manifest=facts, cells_planned=1)


def variant(store, sweep, method, *, model=MODEL, seed=0, device="cpu", device_name="a CPU"):
    row = VariantRow(
        key=re.sub(r"[^\w.-]", "-", f"{sweep} {model} {method} {seed}"),
        model=model,
        model_identity=f"sha256:{model}",
        method=method,
        chain=[{"name": method.partition(":")[0], "options": {}}],
        family="baseline" if method == "baseline" else "quantization",
        seed=seed,
        dtype="float32",
        device=device,
        device_name=device_name,
        synthetic=False,
        model_info={},
    )
    store.write_variant(sweep, row)
    return row


def write(store, sweep, method, place, records=(), items=(), status=Status.OK, reason=None, **about):
    """A cell of a task, or of a shape where the place begins with ``b1-``; its id."""
    row = variant(store, sweep, method, **about)
    is_shape = place.startswith("b1-")
    result = CellResult(
        f"{row.key}-{place}", row.key, status, reason, records=tuple(records), items=tuple(items), seconds=2.0
    )
    return store.write_cell(
        sweep,
        result,
        kind=CellKind.SCENARIO if is_shape else CellKind.TASK,
        task=None if is_shape else place,
        scenario=place if is_shape else None,
    )


def losses(rise, *, noise=0.02, of="", count=WINDOWS):
    """A record of nats per token with its windows: the same hard and easy ones, each `rise` worse."""
    chance = random.Random(of)
    outcomes = [3 + index % 5 / 10 + rise + chance.gauss(0, noise) for index in range(count)]
    items = [Item(index, "nll", value, {"tokens": 64}) for index, value in enumerate(outcomes)]
    return [Record("nll", sum(outcomes) / count, "nats/token", n=count)], items


def scored(store, sweep, method, rise, *, place="text", noise=0.02, **about):
    records, items = losses(rise, noise=noise, of=f"{method} {about}")
    return write(store, sweep, method, place, records, items, **about)


def timed(store, sweep, method, place=SHAPE, *, more=(), **ratios):
    """A shape with speed-ups over the baseline as (value, lower, upper)."""
    records = [Record(f"{name}_speedup", *numbers, 20) for name, numbers in ratios.items()]
    records = [Record(r.metric, r.value, "x", r.unit, r.lower, r.upper) for r in records]
    return write(store, sweep, method, place, [*records, *more])


def claim(*parts, id="a-claim", methods=("good", "bad"), models=(MODEL,), **changes):
    need = changes.pop("need", None) or SweepNeed(
        models, methods, ("text",), prompt_lens=(64, 128, 256), seeds=(0, 1, 2)
    )
    values = {
        "section": "pruning",
        "says": "Good is better than bad.",
        "source": "somebody",
        "methods": methods,
        "sweep": (need,),
        "decide": all_of(*parts) if parts else None,
    }
    return Claim(id=id, **{**values, **changes})
