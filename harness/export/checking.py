"""Whether a written checkpoint is the variant: its files decoded, and the model loaded from them.

Two checks. *Weights*: every matrix, read back from the files and decoded by the definition of the format,
equals the one that the variant multiplies with. *Outputs*: the folder is loaded by transformers alone, and
its outputs on a fixed text are compared with those of the variant in memory. Where the package that reads
the format is not installed, the model of the second check is built from the decoded files instead, and the
result says so.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harness.errors import ExportRejected
from harness.export import compressed_tensors, gptq
from harness.export.contents import Contents
from harness.export.forms import DenseForm, weight_of
from harness.export.quiet import without_bars
from harness.export.stock import stock_config

__all__ = [
    "Agreement",
    "agreement",
    "build_dense",
    "decoded_state",
    "load_again",
    "missing_reader",
    "outputs_of",
    "probe_tokens",
    "round_no_inputs",
    "tolerance",
    "weights_differ",
]

TOKENS = 128

_READERS = {"compressed-tensors": ("compressed_tensors",), "gptq": ("gptqmodel", "optimum")}
_LAST_BITS = 1e-6
_EXACT = 1e-3
_HALF = 0.05
_ROUNDED = 0.15


@dataclass(frozen=True)
class Agreement:
    """How far two models' outputs on the same tokens are apart.

    Args:
        max_difference: the largest absolute difference.
        relative_rms: root mean square of the differences over the standard deviation of the variant's.
        top1: share of positions with the same likeliest token; None for what has no logits.
    """

    max_difference: float
    relative_rms: float
    top1: float | None
    tokens: int


def agreement(ours: torch.Tensor, theirs: torch.Tensor, *, are_logits: bool) -> Agreement:
    """Compare outputs [1, tokens, d]."""
    ours, theirs = ours.double(), theirs.double()
    difference = theirs - ours
    spread = float(ours.std())
    return Agreement(
        max_difference=float(difference.abs().max()),
        relative_rms=float(difference.square().mean().sqrt()) / spread if spread else float(difference.any()),
        top1=float((ours.argmax(-1) == theirs.argmax(-1)).double().mean()) if are_logits else None,
        tokens=ours.shape[1],
    )


def tolerance(contents: Contents, dtype: torch.dtype, *, rounding: bool) -> tuple[float, str]:
    """The largest `relative_rms` that is let through, and why.

    Args:
        rounding: the loaded model rounds the inputs of layers.
    """
    if rounding:
        return _ROUNDED, (
            "inputs are rounded by the loading library, on a grid of its own (int8: to 127.5 steps, not 127)"
        )
    if dtype in (torch.float16, torch.bfloat16):
        return _HALF, "16-bit arithmetic; the loading library holds scales in the model's type"
    return _EXACT, "the order of float32 sums"


def probe_tokens(tokenizer: Any, vocab_size: int, max_positions: int) -> torch.Tensor:
    """The start of the held-out books as token ids int64 [1, n]; seeded ones without a tokenizer."""
    length = min(TOKENS, max_positions)
    if tokenizer is not None:
        from harness.corpus import kjv_held_out_chapters

        text = "\n".join(chapter.text for chapter in kjv_held_out_chapters()[:2])
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:length]
        return torch.tensor(ids)[None]
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocab_size, (1, length), generator=generator)


@torch.no_grad()
def outputs_of(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Logits, or last hidden states of a model without a head, float32 on the CPU."""
    device = next(iter(model.parameters())).device
    options = {"use_cache": False} if getattr(model, "can_generate", lambda: False)() else {}
    with without_bars():  # compressed-tensors unpacks on the first pass
        output = model(input_ids=tokens.to(device), **options)
    found = getattr(output, "logits", None)
    values: torch.Tensor = output.last_hidden_state if found is None else found
    return values.float().cpu()


# --- the files --------------------------------------------------------------------------------------


def weights_differ(contents: Contents, stored: Mapping[str, torch.Tensor]) -> str | None:
    """Which tensor, decoded from the files, is not the variant's own; None where all are.

    Decoded weights may differ from those of the variant in the last bits of float32, where its kernels
    multiply in another order; whatever is stored as it is must be equal.

    Args:
        stored: the files' tensors by name.
    """
    left = set(stored)
    for name, tensor in contents.rest.items():
        if name not in stored or not torch.equal(stored[name], tensor.cpu()):
            return f"{name} is not stored as it is in the variant"
        left.discard(name)
    for name, form in contents.layers.items():
        weight, used = _decoded(contents, name, stored)
        held = weight_of(contents.sources[name]).cpu()
        if isinstance(form, DenseForm):
            is_same = torch.equal(weight, held.to(weight.dtype))
        else:
            is_same = weight.shape == held.shape and torch.allclose(weight, held, rtol=_LAST_BITS, atol=0)
        if not is_same:
            return f"{name}, decoded from the files, is not what the variant multiplies with"
        if not _are_equal(stored.get(f"{name}.bias"), form.bias):
            return f"the bias of {name} is not stored as it is in the variant"
        left -= {*used, f"{name}.bias"}
    return f"the files hold {min(left)}, which the variant does not have" if left else None


def _are_equal(stored: torch.Tensor | None, held: torch.Tensor | None) -> bool:
    if stored is None or held is None:
        return stored is held
    return torch.equal(stored, held.cpu().to(stored.dtype))


def decoded_state(contents: Contents, stored: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state of the stock model, from the files and what config.json says of the format."""
    state: dict[str, torch.Tensor] = {}
    used: set[str] = set()
    for name in contents.layers:
        weight, names = _decoded(contents, name, stored)
        weight = weight.to(contents.config.dtype)
        state[f"{name}.weight"] = weight.t().contiguous() if name in contents.transposed else weight
        used |= names
    return state | {name: stored[name] for name in stored if name not in used}


def _decoded(
    contents: Contents, name: str, stored: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, set[str]]:
    """A weight [out, in], float32 where it was quantized, and the names of what it was made of; no bias."""
    config = contents.quantization_config
    if config is None or name not in contents.quantized:
        weight = stored[f"{name}.weight"]
        return weight.t() if name in contents.transposed else weight, {f"{name}.weight"}
    names = {key for key in stored if key.rpartition(".")[0] == name and not key.endswith(".bias")}
    parts = {key.rpartition(".")[2]: stored[key] for key in names}
    decode: Any = gptq.decode if contents.layout == "gptq" else compressed_tensors.decode
    return decode(parts, _scheme_of(name, config)), names


def _scheme_of(name: str, config: Mapping[str, Any]) -> Mapping[str, Any]:
    if config["quant_method"] == "gptq":
        return config
    groups: Mapping[str, Any] = config["config_groups"]
    return next(
        group for group in groups.values() if name in group["targets"] or group["targets"] == ["Linear"]
    )


# --- loading ----------------------------------------------------------------------------------------


def missing_reader(layout: str) -> tuple[str, ...]:
    """The packages that transformers needs to load a layout and that are not installed here."""
    return tuple(name for name in _READERS.get(layout, ()) if not _can_be_imported(name))


def _can_be_imported(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:  # it, or what it needs
        return False
    return True


def load_again(folder: Path, kind: Any, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The model that transformers loads from a folder, in eval mode.

    Raises:
        ExportRejected: it cannot.
    """
    try:
        with without_bars():
            model, info = kind.from_pretrained(
                folder, dtype=dtype, device_map={"": device}, output_loading_info=True, local_files_only=True
            )
    except Exception as error:  # the border to the libraries that read the format
        raise ExportRejected(f"transformers cannot load it: {' '.join(str(error).split())[:600]}") from error
    unknown = {key: sorted(names)[:3] for key, names in info.items() if names}
    if unknown:
        raise ExportRejected(f"transformers loads it incompletely: {json.dumps(unknown, default=str)}")
    loaded: nn.Module = model.eval()
    return loaded


def build_dense(
    contents: Contents, kind: Any, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> nn.Module:
    """A stock model with this state, in eval mode, on the CPU."""
    config = stock_config(contents.stock, dtype)
    config.tie_word_embeddings = contents.config.tie_word_embeddings
    with without_bars():
        model: nn.Module = kind.from_pretrained(None, config=config, state_dict=dict(tensors), dtype=dtype)
    return model.eval()


def round_no_inputs(model: nn.Module) -> None:
    """Let a model that compressed-tensors loaded multiply with its weights only."""
    for module in model.modules():
        if hasattr(module, "quantization_scheme"):
            module.quantization_enabled = False  # type: ignore[assignment]
