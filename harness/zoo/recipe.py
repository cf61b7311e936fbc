"""Train a small checkpoint from text files: `python -m harness.zoo.recipe --help`.

Text to tokenizer, tokenizer to tokens, tokens to a model, the saved model to measurements, and all
of it to a model card. See docs/zoo.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedTokenizerFast

from harness.errors import ConfigError, HarnessError
from harness.zoo.architectures import ARCHITECTURES, Architecture, build_model, count_parameters
from harness.zoo.arguments import build_parser
from harness.zoo.card import RECORD_FILE, write_card
from harness.zoo.corpus import (
    Source,
    fragments,
    kjv_source,
    read_source,
    token_stream,
    training_batches,
)
from harness.zoo.evaluation import read_minimal_pairs
from harness.zoo.measurement import kjv_held_out_source, measure_checkpoint
from harness.zoo.saving import EarlyCheckpoints, parse_moments, save_checkpoint
from harness.zoo.tokenizer import load_tokenizer, train_tokenizer
from harness.zoo.training import Budget, Hyperparameters, TrainingRun, train

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe; returns the exit code (2: something given cannot be used)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        run(build_parser().parse_args(argv), argv)
    except HarnessError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run(options: argparse.Namespace, argv: Sequence[str]) -> None:
    """Train, save, measure, write the card."""
    device = _device(options.device)
    # Everything that can be wrong with the arguments is found before the training.
    if options.weight_noise_levels < 0:
        raise ConfigError(f"--weight-noise-levels must be at least 0, not {options.weight_noise_levels}")
    if options.seconds is not None and options.seconds <= 0:
        raise ConfigError(f"--seconds must be positive, not {options.seconds:g}")
    moments = parse_moments(options.checkpoint_steps)
    architecture = _architecture(options)
    sources = _training_sources(options)
    evaluation_sources = [read_source(path) for path in options.eval_text]
    if options.kjv:
        evaluation_sources.append(kjv_held_out_source())
    pairs = {path.name: read_minimal_pairs(path) for path in options.minimal_pairs}

    tokenizer = _tokenizer(options, sources)
    if options.fragment_share > 0:
        sources += [fragments(source, options.fragment_share, options.seed) for source in sources]
    stream = token_stream(tokenizer, sources)
    torch.manual_seed(options.seed)
    model = build_model(architecture, tokenizer)
    nn.Module.to(model, device)
    print(f"{count_parameters(model):,} parameters, {len(stream):,} tokens of text", flush=True)
    settings = Hyperparameters(
        learning_rate=options.learning_rate,
        noise_levels=options.weight_noise_levels,
        noise_group=options.weight_noise_group,
    )
    early = EarlyCheckpoints(model, tokenizer, options.out, moments)
    training = train(
        model,
        training_batches(
            stream,
            sequences=options.batch_sequences,
            length=architecture.context_tokens,
            seed=options.seed,
            device=device,
        ),
        Budget(seconds=options.seconds, steps=options.steps),
        settings,
        compile_model=options.compile,
        seed=options.seed,
        on_step=early,
        log=lambda line: print(line, flush=True),
    )
    save_checkpoint(model, tokenizer, options.out)
    _write_json(
        options.out / "schedule.json",
        _schedule(options, settings, training, early.steps_saved),
    )

    results = measure_checkpoint(options.out, texts=evaluation_sources, minimal_pairs=pairs, device=device)
    for result in results:
        print(f"{result.name}: {result.metric} {result.value:.4f}", flush=True)
    _write_json(
        options.out / RECORD_FILE,
        {
            "name": options.out.name,
            "model_class": type(model).__name__,
            "parameters": count_parameters(model),
            "vocab_size": len(tokenizer),
            "epoch_tokens": len(stream),
            "sources": [_describe_source(source) for source in sources],
            "results": [asdict(result) for result in results],
            "command": _portable_command(argv),
            **_describe_training(options, architecture, settings, training, device),
        },
    )
    write_card(options.out)


def _describe_training(
    options: argparse.Namespace,
    architecture: Architecture,
    settings: Hyperparameters,
    training: TrainingRun,
    device: torch.device,
) -> dict[str, Any]:
    """What the card says of the run."""
    return {
        "family": architecture.family,
        "shape": architecture.description,
        "length": architecture.context_tokens,
        "steps": training.steps,
        "tokens": training.tokens,
        "step_tokens": training.tokens // max(training.steps, 1),
        "seconds": round(training.seconds, 1),
        "seed": options.seed,
        **asdict(settings),
        "hardware": _hardware(device),
        "on_gpu": device.type == "cuda",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "note": options.note,
    }


def _training_sources(options: argparse.Namespace) -> list[Source]:
    sources = [read_source(path) for path in options.text]
    if options.kjv:
        sources.append(kjv_source(options.kjv_repeats))
    if not sources:
        raise ConfigError("no training text: give --text FILE, --kjv or both")
    return sources


def _tokenizer(options: argparse.Namespace, sources: Sequence[Source]) -> PreTrainedTokenizerFast:
    if options.tokenizer is not None:
        return load_tokenizer(options.tokenizer)
    texts = (document for source in sources for _ in range(source.repeats) for document in source.documents)
    return train_tokenizer(
        texts,
        vocab_size=options.vocab_size,
        context_tokens=_architecture(options).context_tokens,
    )


def _architecture(options: argparse.Namespace) -> Architecture:
    given = {
        name: getattr(options, name)
        for name in ("layers", "width", "heads", "ffn_width", "context_tokens")
        if getattr(options, name) is not None
    }
    return replace(ARCHITECTURES[options.arch], **given)


def _schedule(
    options: argparse.Namespace,
    settings: Hyperparameters,
    training: TrainingRun,
    checkpoint_steps: Sequence[int],
) -> dict[str, Any]:
    """What a method that rewinds or resumes training must know of the run."""
    return {
        **asdict(settings),
        "seed": options.seed,
        "batch_sequences": options.batch_sequences,
        "budget": {"seconds": options.seconds, "steps": options.steps},
        "steps": training.steps,
        "tokens": training.tokens,
        "checkpoint_steps": list(checkpoint_steps),
        "history": [
            {"step": step, "learning_rate": rate, "loss_nats": loss} for step, rate, loss in training.history
        ],
    }


def _describe_source(source: Source) -> dict[str, Any]:
    return {
        "name": source.name,
        "documents": len(source.documents),
        "bytes": source.size_bytes,
        "repeats": source.repeats,
        "sha256": source.sha256,
    }


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("no CUDA device here; use --device cpu or auto")
    return torch.device(name)


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return f"one {torch.cuda.get_device_name(device)}"
    return f"a CPU ({platform.machine()}, {torch.get_num_threads()} threads)"


def _portable_command(argv: Sequence[str]) -> str:
    """The command with bare file names: where the files lay is nobody's business."""
    words = [Path(word).name if "/" in word else word for word in argv]
    return "python -m harness.zoo.recipe " + shlex.join(words)


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    transformers.logging.disable_progress_bar()
    sys.exit(main())
