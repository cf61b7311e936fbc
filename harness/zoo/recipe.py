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
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from harness.corpus import kjv_held_out_chapters
from harness.errors import ConfigError, HarnessError
from harness.zoo.architectures import ARCHITECTURES, Architecture, build_model, count_parameters
from harness.zoo.card import RECORD_FILE, write_card
from harness.zoo.corpus import (
    Source,
    fragments,
    kjv_source,
    read_source,
    token_stream,
    training_batches,
)
from harness.zoo.evaluation import bits_per_byte, minimal_pair_accuracy, read_minimal_pairs
from harness.zoo.saving import EarlyCheckpoints, parse_moments, save_checkpoint
from harness.zoo.tokenizer import load_tokenizer, train_tokenizer
from harness.zoo.training import Budget, Hyperparameters, TrainingRun, train

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe; returns the exit code (2: something given cannot be used)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        run(_parser().parse_args(argv), argv)
    except HarnessError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run(options: argparse.Namespace, argv: Sequence[str]) -> None:
    """Train, save, measure, write the card."""
    device = _device(options.device)
    # Everything that can be wrong with the arguments is found before the training.
    moments = parse_moments(options.checkpoint_steps)
    architecture = _architecture(options)
    sources = _training_sources(options)
    evaluation_sources = [read_source(path) for path in options.eval_text]
    pairs = [(path.name, read_minimal_pairs(path)) for path in options.minimal_pairs]

    tokenizer = _tokenizer(options, sources)
    if options.fragment_share > 0:
        sources += [fragments(source, options.fragment_share, options.seed) for source in sources]
    stream = token_stream(tokenizer, sources)
    torch.manual_seed(options.seed)
    model = build_model(architecture, tokenizer).to(device)
    print(f"{count_parameters(model):,} parameters, {len(stream):,} tokens of text", flush=True)
    settings = Hyperparameters(learning_rate=options.learning_rate)
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
        on_step=early,
        log=lambda line: print(line, flush=True),
    )
    save_checkpoint(model, tokenizer, options.out)
    _write_json(
        options.out / "schedule.json",
        _schedule(options, settings, training, early.steps_saved),
    )

    saved = AutoModelForCausalLM.from_pretrained(options.out, dtype=torch.float32).to(device)
    results = [_bits(saved, tokenizer, source, architecture) for source in evaluation_sources]
    if options.kjv:
        held_out = tuple(chapter.text for chapter in kjv_held_out_chapters())
        source = Source("King James Bible, held-out books", held_out)
        results.append(_bits(saved, tokenizer, source, architecture))
    results += [
        {
            "name": name,
            "metric": "minimal-pair accuracy",
            "value": minimal_pair_accuracy(saved, tokenizer, items),
            "n": len(items),
            "unit": "pairs",
        }
        for name, items in pairs
    ]
    for result in results:
        print(f"{result['name']}: {result['metric']} {result['value']:.4f}", flush=True)
    _write_json(
        options.out / RECORD_FILE,
        {
            "name": options.out.name,
            "family": architecture.family,
            "model_class": type(model).__name__,
            "parameters": count_parameters(model),
            "shape": _describe(architecture),
            "vocab_size": len(tokenizer),
            "sources": [_describe_source(source) for source in sources],
            "epoch_tokens": len(stream),
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
            "command": _portable_command(argv),
            "results": results,
        },
    )
    write_card(options.out)


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
    texts = (
        document
        for source in sources
        for _ in range(source.repeats)
        for document in source.documents
    )
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


def _bits(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    source: Source,
    architecture: Architecture,
) -> dict[str, Any]:
    measured = bits_per_byte(
        model, tokenizer, source.documents, window_tokens=architecture.context_tokens
    )
    return {
        "name": source.name,
        "metric": "bits per byte",
        "value": measured.value,
        "n": measured.bytes,
        "unit": "bytes",
        "tokens": measured.tokens,
    }


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
            {"step": step, "learning_rate": rate, "loss_nats": loss}
            for step, rate, loss in training.history
        ],
    }


def _describe(architecture: Architecture) -> str:
    parts = {
        "llama": "RMSNorm, rotary positions, SwiGLU",
        "opt": "LayerNorm, learned positions, ReLU",
    }
    return (
        f"{architecture.layers} pre-norm layers, width {architecture.width}, "
        f"{architecture.heads} attention heads, feed-forward width {architecture.ffn_width}, "
        f"{parts[architecture.family]}, {architecture.context_tokens} positions"
    )


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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m harness.zoo.recipe", description=__doc__)
    parser.add_argument("--arch", choices=sorted(ARCHITECTURES), required=True)
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="checkpoint to write"
    )
    text = parser.add_argument_group(
        "text (.txt, .txt.xz, .txt.gz; two blank lines part documents)"
    )
    text.add_argument("--text", type=Path, action="append", default=[], metavar="FILE")
    text.add_argument("--kjv", action="store_true", help="add the King James Bible")
    text.add_argument("--kjv-repeats", type=_positive, default=2, help="times an epoch reads it")
    text.add_argument(
        "--fragment-share",
        type=_share,
        default=0.4,
        help="share of the lines read once more as single passages of 1 to 6 sentences",
    )
    text.add_argument("--tokenizer", type=Path, metavar="DIR", help="reuse it; else one is trained")
    text.add_argument("--vocab-size", type=_positive, default=4096)
    measure = parser.add_argument_group("evaluation")
    measure.add_argument("--eval-text", type=Path, action="append", default=[], metavar="FILE")
    measure.add_argument("--minimal-pairs", type=Path, action="append", default=[], metavar="FILE")
    budget = parser.add_argument_group("training")
    limit = budget.add_mutually_exclusive_group(required=True)
    limit.add_argument("--seconds", type=float, help="train that long; the schedule follows")
    limit.add_argument("--steps", type=_positive, help="train that many steps")
    budget.add_argument("--batch-sequences", type=_positive, default=64)
    budget.add_argument("--learning-rate", type=float, default=Hyperparameters.learning_rate)
    budget.add_argument("--seed", type=int, default=0)
    budget.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    budget.add_argument("--compile", action="store_true", help="compile the model with torch")
    budget.add_argument("--note", default="", help="a sentence for the card's training section")
    budget.add_argument(
        "--checkpoint-steps", default="", metavar="0,1%,500", help="also save to OUT/step-N"
    )
    shape = parser.add_argument_group("shape, where it should differ from the architecture's own")
    for name in ("layers", "width", "heads", "ffn-width", "context-tokens"):
        shape.add_argument(f"--{name}", type=_positive)
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
