"""A checkpoint on the disk, looked at before anything of it is trusted or loaded.

A checkpoint may come from anywhere. Nothing outside of its folder is read on its say-so, nothing is unpickled
or run unless the user asked, and a file that is cut short or lies about its size is refused by name. Only
headers and small files are read here, so this costs milliseconds whatever the size of the model.

A link inside the folder is followed (the hub's own cache is made of links): what it points to is read as
safetensors or JSON only, and its content is in the identity.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from harness.errors import ConfigError
from harness.keys import file_stamps, tree_hash

__all__ = [
    "CONTENT_SUFFIXES",
    "PICKLE_ADVICE",
    "check_checkpoint",
    "checkpoint_hash",
    "checkpoint_stamps",
    "needs_remote_code",
    "read_json",
    "refuse_quantized",
    "weight_candidates",
]

CONTENT_SUFFIXES = (".json", ".safetensors", ".bin", ".pt", ".model", ".txt", ".jinja", ".tiktoken", ".py")
"""The files that can decide what a model computes."""

PICKLE_ADVICE = (
    "it has pickled weights, which can run code when they are loaded: pass --allow-pickle to trust them"
)
_SINGLE = {".safetensors": "model.safetensors", ".bin": "pytorch_model.bin"}
_ATTENTION = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
_LARGEST_JSON_BYTES = 1 << 28
_JSON_FILES = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json",
)  # fmt: skip


def checkpoint_hash(directory: Path) -> str:
    """One hash over the files of a folder that can decide what its model computes.

    Raises:
        ConfigError: a file cannot be read.
    """
    try:
        return tree_hash(directory, _content_names(directory))
    except OSError as error:
        raise ConfigError(f"model directory {directory} cannot be read: {error.strerror}") from None


def checkpoint_stamps(directory: Path) -> tuple[tuple[str, int, int, int], ...]:
    """What tells without reading them that the files of `checkpoint_hash` are as they were.

    Raises:
        ConfigError: a file cannot be looked at.
    """
    try:
        return file_stamps(directory, _content_names(directory))
    except OSError as error:
        raise ConfigError(f"model directory {directory} cannot be read: {error.strerror}") from None


def _content_names(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir() if path.suffix in CONTENT_SUFFIXES and path.is_file()]


def check_checkpoint(directory: Path, *, allow_pickle: bool, trust_remote_code: bool) -> None:
    """Check what can be checked without loading a weight.

    Args:
        allow_pickle: take pickled weights where there are no safetensors.
        trust_remote_code: the checkpoint may bring Python code of its own.

    Raises:
        ConfigError: no checkpoint, pickled weights or code that nobody asked for, an index that points
            outside of the folder, a file that is cut short, sizes that the files cannot hold.
    """
    where = f"model directory {directory}"
    if not (directory / "config.json").is_file():
        raise ConfigError(f"{where} is no checkpoint in Hugging Face format: it has no config.json")
    if (directory / "adapter_config.json").exists():
        raise ConfigError(
            f"{where} holds an adapter (adapter_config.json), not a whole model; merge it first"
        )
    config = read_json(directory / "config.json")
    if config.get("transformers_weights") is not None:
        raise ConfigError(
            f"{where}: config.json names a weights file (transformers_weights); only the usual names load"
        )
    if needs_remote_code(config) and trust_remote_code:
        _refuse_foreign_code(config, where)
    kernel = next((config[key] for key in _ATTENTION if "/" in str(config.get(key))), None)
    if kernel is not None and not trust_remote_code:
        raise ConfigError(
            f"{where}: config.json asks for the foreign kernel {kernel!r}: pass --trust-remote-code"
        )
    for name in _JSON_FILES:
        if (directory / name).is_file():
            read_json(directory / name)
    files = _weight_files(directory, allow_pickle=allow_pickle)
    if all(file.suffix == ".safetensors" for file in files):
        shapes = [shape for file in files for shape in _tensor_shapes(file)]
        _check_scale(config, shapes, where)


def needs_remote_code(config: Mapping[str, Any]) -> bool:
    """Whether a checkpoint brings code of its own."""
    return bool(config.get("auto_map"))


def refuse_quantized(config: Mapping[str, Any], where: str) -> None:
    """Refuse weights that another program quantized.

    transformers gives them back as plain matrices, at the first pass or at once: they would be weighed and
    timed as such, under the name of the small checkpoint, and a method would meet layers without a weight.

    Raises:
        ConfigError: config.json says that they are.
    """
    for key in ("quantization_config", "compression_config"):
        if found := config.get(key):
            kind = found.get("quant_method") if isinstance(found, dict) else None
            raise ConfigError(
                f"{where}: its weights are quantized already ({key} in config.json"
                + (f": {kind}" if kind else "")
                + "), and the harness compresses and measures plain ones; name the model that it was made of"
            )


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object in a file.

    Raises:
        ConfigError: unreadable, too large, not JSON, not an object.
    """
    try:
        if file.stat().st_size > _LARGEST_JSON_BYTES:
            raise ConfigError(f"{file} is larger than {_LARGEST_JSON_BYTES:,} bytes")
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, a number of thousands of digits
        raise ConfigError(f"{file} is no JSON: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{file} must hold a JSON object")
    return content


def weight_candidates(folder: Path, *, allow_pickle: bool) -> list[list[str]]:
    """The files that may hold the weights, where an index of shards is there and the weights are not yet.

    Raises:
        ConfigError: an index that cannot be read or points outside of the folder.
    """
    candidates = []
    for suffix in _suffixes(allow_pickle):
        index = folder / f"{_SINGLE[suffix]}.index.json"
        candidates.append(_shard_names(index, suffix) if index.is_file() else [_SINGLE[suffix]])
    return candidates


def _suffixes(allow_pickle: bool) -> tuple[str, ...]:
    return (".safetensors", ".bin") if allow_pickle else (".safetensors",)


def _refuse_foreign_code(config: Mapping[str, Any], where: str) -> None:
    references = config["auto_map"].values() if isinstance(config["auto_map"], dict) else [config["auto_map"]]
    if any("--" in str(reference) for reference in references):
        raise ConfigError(
            f"{where}: its code lies in another repository (auto_map in config.json), so no revision pins "
            "it; copy the code beside the weights"
        )


def _weight_files(directory: Path, *, allow_pickle: bool) -> list[Path]:
    """The files that hold the weights, in the order in which transformers looks for them."""
    for suffix in _suffixes(allow_pickle):
        single = directory / _SINGLE[suffix]
        if single.is_file():
            return [single]
        index = directory / f"{_SINGLE[suffix]}.index.json"
        if index.is_file():
            shards = [directory / name for name in _shard_names(index, suffix)]
            if missing := next((shard.name for shard in shards if not shard.is_file()), None):
                raise ConfigError(f"{index} names {missing!r}, which is missing")
            return shards
    if not allow_pickle and any(directory.glob("*.bin")):
        raise ConfigError(f"model directory {directory} has no model.safetensors; {PICKLE_ADVICE}")
    looked_for = " nor pytorch_model.bin" if allow_pickle else ""
    raise ConfigError(
        f"model directory {directory} has no model.safetensors{looked_for} (nor an index of shards)"
    )


def _shard_names(index: Path, suffix: str) -> list[str]:
    index_content = read_json(index)
    listed = index_content.get("weight_map")
    if not (isinstance(listed, dict) and listed and all(isinstance(name, str) for name in listed.values())):
        raise ConfigError(f"{index} has no weight_map from the names of weights to files")
    if not isinstance(index_content.get("metadata"), dict):
        raise ConfigError(f"{index} has no metadata")
    names = sorted(set(listed.values()))
    for name in names:
        if PurePosixPath(name).name != name or "\\" in name or "\0" in name:
            raise ConfigError(f"{index} points outside of its folder: {name!r}")
        if not name.endswith(suffix):
            raise ConfigError(f"{index} names {name!r}, which is no {suffix} file")
    return names


def _tensor_shapes(file: Path) -> list[tuple[int, ...]]:
    """The shapes in a file, by its header; safetensors checks that the tensors cover the file exactly."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as opened:
            return [tuple(opened.get_slice(name).get_shape()) for name in opened.keys()]  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise ConfigError(f"{file} is cut short or no safetensors file: {error}") from None


def _check_scale(config: Mapping[str, Any], shapes: Sequence[tuple[int, ...]], where: str) -> None:
    """Refuse a configuration that is far larger than its weights before memory is asked for.

    The exact comparison, tensor by tensor, comes when the model is loaded; by then an absurd one has asked
    for all of the memory.
    """
    held = sum(math.prod(shape) for shape in shapes)
    layers, width, words = (config.get(name) for name in ("num_hidden_layers", "hidden_size", "vocab_size"))
    if isinstance(layers, int) and layers > len(shapes):
        raise ConfigError(
            f"{where}: config.json says {layers} layers, and the files hold {len(shapes)} tensors"
        )
    if isinstance(width, int) and isinstance(words, int) and width * words > held:
        raise ConfigError(
            f"{where}: config.json says {words} embeddings of {width} numbers, and the files hold "
            f"{held} in all"
        )
