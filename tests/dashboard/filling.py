"""A store as a real sweep leaves it: two models, a dozen variants, failures, hostile text."""

from __future__ import annotations

import random

from harness.records import (
    CellKind,
    CellResult,
    Item,
    KernelUse,
    ModuleEffect,
    Record,
    Status,
    VariantReport,
)
from harness.store.store import VariantRow

HOSTILE = "<img src=x onerror=alert(1)> **bold** [link](javascript:alert(1)) $x$ :red[red] _i_"
MODEL, SHAPE = "zoo:llama-6m", "shape:llama-7b"
SMALL, LARGE = "b1-p512-g64", "b8-p512-g64"

# method label, steps with options, family, share of bytes, share of time, share of items lost
VARIANTS = (
    ("baseline", (("baseline", {}),), "baseline", 1.0, 1.0, 0.0),
    ("rtn:bits=4", (("rtn", {"bits": 4, "group_size": 128}),), "quantization", 0.3, 0.6, 0.08),
    ("gptq:bits=4", (("gptq", {"bits": 4, "group_size": 128}),), "quantization", 0.3, 0.58, 0.03),
    ("gptq:bits=3", (("gptq", {"bits": 3, "group_size": 128}),), "quantization", 0.25, 0.7, 0.15),
    (
        "smoothquant+gptq",
        (("smoothquant", {"alpha": 0.5}), ("gptq", {"bits": 4, "group_size": -1})),
        "quantization", 0.28, 0.5, 0.05,
    ),
    ("wanda:sparsity=0.5", (("wanda", {"sparsity": 0.5}),), "pruning", 1.0, 1.02, 0.06),
    ("magnitude", (("magnitude", {"sparsity": 0.5}),), "pruning", 1.0, 0.98, 0.4),
    ("window-attention", (("window-attention", {"window": 64}),), "attention", 1.0, 0.8, 0.02),
)  # fmt: skip
SIMULATED = "wanda:sparsity=0.5"


def variant_row(label, steps, family, model=MODEL, **changes):
    values = {
        "key": f"{model}/{label}",
        "model": model,
        "model_identity": "sha256:0123",
        "method": label,
        "chain": [{"name": name, "options": options} for name, options in steps],
        "family": family,
        "seed": 0,
        "dtype": "bfloat16",
        "device": "cuda",
        "device_name": "NVIDIA H100 80GB HBM3",
        "synthetic": model == SHAPE,
        "model_info": {"num_layers": 6},
    }
    return VariantRow(**{**values, **changes})


def speed_records(size, bytes_share, time_share, chance):
    prefill, decode = 0.012 * size * time_share, 0.0021 * size * time_share

    def timed(metric, seconds):
        samples = tuple(seconds * chance.uniform(0.97, 1.05) for _ in range(20))
        return Record(metric, seconds, "s", seconds * 0.98, seconds * 1.03, 20, samples, "graph")

    return (
        Record("weight_bytes", 12_500_000 * bytes_share * size, "B"),
        timed("prefill_latency", prefill),
        timed("decode_latency", decode),
        Record("decode_throughput", 1 / decode, "tokens/s", 0.97 / decode, 1.02 / decode, 20),
        Record("kv_cache_bytes_per_token", 6144.0, "B/token"),
    )


def kernels(bytes_share, time_share):
    """Four in each phase; the first of them is what a quantized variant replaces."""
    first = "dequant_gemm" if bytes_share < 1 else "ampere_bf16_gemm"
    shares = (
        ("matmul", first, 0.6),
        ("attention", "flash_fwd", 0.25),
        ("norm", "rms", 0.1),
        ("copy", "cat", 0.05),
    )
    return tuple(
        KernelUse(phase, name, family, 6, share * time_share / 500, share)
        for phase in ("prefill", "decode")
        for family, name, share in shares
    )


def task_parts(lost, chance):
    right = [chance.random() < 0.62 for _ in range(200)]
    kept = [each if chance.random() > lost else not each and chance.random() < 0.3 for each in right]
    share = sum(kept) / len(kept)
    records = (
        Record("acc", share, "fraction", share - 0.06, share + 0.06, 200),
        Record("acc_flips", lost, "fraction", max(0.0, lost - 0.02), lost + 0.03, 200),
    )
    items = tuple(
        Item(index, "acc", float(each), {"loglikelihoods": [-1.0 - index, -2.0], "target": 0})
        for index, each in enumerate(kept)
    )
    return records, items


def fill(store):
    """Fill an empty store with two finished sweeps."""
    chance = random.Random(7)
    manifest = {"device": "cuda", "device_name": "NVIDIA H100 80GB HBM3", "cpu": "a processor"}
    sweep = store.open_sweep(command="harness sweep", config={}, manifest=manifest, cells_planned=60)
    for label, steps, family, bytes_share, time_share, lost in VARIANTS:
        row = variant_row(label, steps, family)
        store.write_variant(sweep, row)
        effect = ModuleEffect(
            "model.layers.0.mlp.up_proj", "QuantLinear" if bytes_share < 1 else "Linear",
            label != "baseline", "int8", 1_000_000, 2_000_000, int(2_000_000 * bytes_share),
            16 * bytes_share, simulated=label == SIMULATED,
        )  # fmt: skip
        store.write_effects(row.key, VariantReport(row.key, (effect,), label == SIMULATED))

        def write(name, kind, records=(), items=(), row=row, status=Status.OK, **more):
            place = {"task": None, "scenario": None}
            if kind is not CellKind.TRANSFORM:
                place[str(kind)] = name
            result = CellResult(
                f"{row.key}/{name}", row.key, status, records=records, items=items, seconds=1.5, **more
            )
            return store.write_cell(sweep, result, kind=kind, **place)

        write("transform", CellKind.TRANSFORM, (Record("transform_s", 3.5 * time_share, "s"),))
        records = speed_records(1, bytes_share, time_share, chance)
        write(SMALL, CellKind.SCENARIO, records, kernels=kernels(bytes_share, time_share))
        write(LARGE, CellKind.SCENARIO, speed_records(3, bytes_share, time_share, chance))
        records, items = task_parts(lost, random.Random(3))
        write("hellaswag", CellKind.TASK, records, items)
        perplexity = 24.5 * (1 + lost * 3)
        low, high = perplexity * 0.96, perplexity * 1.05
        write(
            "wikitext", CellKind.TASK,
            (Record("token_perplexity", perplexity, "ppl", low, high, 4096),),
        )  # fmt: skip
    fill_failures(store, sweep)
    fill_synthetic(store, sweep, chance)
    store.close_sweep(sweep, "finished")
    second = store.open_sweep(command="harness sweep", config={}, manifest=manifest, cells_planned=1)
    store.close_sweep(second, "interrupted")


def fill_failures(store, sweep):
    endings = (
        ("moe", Status.OOM, "CUDA out of memory", "Traceback (most recent call last):\n  ...", "alloc"),
        ("fp8", Status.NOT_APPLICABLE, "fp8: needs compute capability 8.9", None, None),
        ("hostile", Status.CRASHED, HOSTILE, f"Traceback\n  File <b>\n{HOSTILE}", HOSTILE),
    )
    for label, status, reason, traceback, log in endings:
        row = variant_row(label, ((label, {}),), "other")
        store.write_variant(sweep, row)
        result = CellResult(
            f"{row.key}/t", row.key, status, reason, traceback=traceback, log_tail=log, seconds=2.0
        )
        store.write_cell(sweep, result, kind=CellKind.TRANSFORM, task=None, scenario=None)
    row = variant_row("markup", ((HOSTILE, {HOSTILE: HOSTILE}),), "other", method=HOSTILE)
    store.write_variant(sweep, row)
    result = CellResult(
        f"{row.key}/s", row.key, Status.OK, records=speed_records(1, 0.9, 0.9, random.Random(1))
    )
    store.write_cell(sweep, result, kind=CellKind.SCENARIO, task=None, scenario=SMALL)


def fill_synthetic(store, sweep, chance):
    for label, steps, family, bytes_share, time_share, _ in VARIANTS[:3]:
        row = variant_row(label, steps, family, model=SHAPE)
        store.write_variant(sweep, row)
        result = CellResult(
            f"{row.key}/s", row.key, Status.OK,
            records=speed_records(1000, bytes_share, time_share, chance),
        )  # fmt: skip
        store.write_cell(sweep, result, kind=CellKind.SCENARIO, task=None, scenario=SMALL)
        refused = CellResult(
            f"{row.key}/t", row.key, Status.NOT_APPLICABLE, "random weights: speed and memory only"
        )
        store.write_cell(sweep, refused, kind=CellKind.TASK, task="hellaswag", scenario=None)
