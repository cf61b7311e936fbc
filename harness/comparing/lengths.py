"""How each variant's time and memory grow with the prompt, from its stored cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from harness.comparing.cells import Cell, cells_of
from harness.comparing.growth import MIN_SIZES, Axis, growths, shape_of
from harness.errors import ConfigError, UnknownName
from harness.scaling import Exponent
from harness.store.store import Store

__all__ = ["GROWING", "LengthSweep", "length_sweeps"]

GROWING = (
    "prefill_latency",
    "decode_latency",
    "end_to_end_latency",
    "prefill_peak_bytes",
    "prefill_activation_bytes",
    "prefill_kv_cache_bytes",
)
"""The times and the bytes that grow with the prompt."""


@dataclass(frozen=True)
class LengthSweep:
    """One metric of one variant over prompt lengths, at one batch size, taken in one way.

    `values` are as measured. `basis` says what the exponent rests on: ``control`` (each time over that of
    a fixed workload timed next to it), ``unpaired`` or ``reading``. `exponent` is None where fewer than
    three lengths can be put in one line; `note` then says why.
    """

    model: str
    method: str
    seed: int
    dtype: str
    device: str
    metric: str
    batch_size: int
    new_tokens: int
    mode: str | None
    values: dict[int, float]
    exponent: Exponent | None
    basis: str
    note: str = ""


def length_sweeps(
    store: Store, models: Sequence[str] | None = None, methods: Sequence[str] | None = None
) -> list[LengthSweep]:
    """The exponents of every variant that was timed at three prompt lengths or more.

    Only cells that may be compared are put in one line: taken in the same mode, on the same device, with
    the same versions and clocks.

    Raises:
        UnknownName: a model or a method that the store has no timings of.
        ConfigError: nothing was timed at three prompt lengths.
    """
    timed = _timed(store, models)
    for name in models or ():
        if name not in {cell.model for cell in timed}:
            raise UnknownName("timed model in this store:", name, sorted({c.model for c in _timed(store)}))
    known = sorted({cell.method for cell in timed})
    for name in methods or ():
        if name not in known:
            raise UnknownName("timed method in this store:", name, known)
    cells = [cell for cell in timed if methods is None or cell.method in methods]
    rows = [row for key in dict.fromkeys(map(_variant, cells)) for row in _rows(key, cells)]
    if not rows:
        raise ConfigError(
            f"nothing in this store was timed at {MIN_SIZES} prompt lengths: "
            "sweep with --prompt-lens 128,512,2048"
        )
    return rows


def _timed(store: Store, models: Sequence[str] | None = None) -> list[Cell]:
    return [cell for cell in cells_of(store, models) if shape_of(cell.label) is not None]


_Key = tuple[str, str, int, str, str, int, int]


def _variant(cell: Cell) -> _Key:
    shape = shape_of(cell.label)
    assert shape is not None
    batch, _, new = shape
    model, seed = str(cell.place[0]), int(cell.place[1])
    return model, cell.method, seed, str(cell.dtype), str(cell.device), batch, new


def _rows(key: _Key, cells: Sequence[Cell]) -> list[LengthSweep]:
    model, method, seed, dtype, device, batch, new = key
    mine = [cell for cell in cells if _variant(cell) == key]
    return [
        LengthSweep(
            model=model, method=method, seed=seed, dtype=dtype, device=device, metric=line.metric,
            batch_size=batch, new_tokens=new, mode=line.mode, values=line.values, exponent=line.exponent,
            basis=line.basis, note=line.note,
        )
        for line in growths(mine, Axis.PROMPT_LEN, GROWING)
    ]  # fmt: skip
