"""From a spec to the facts about a model (parent, configuration only) and to the model (worker)."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from harness.errors import ConfigError, MissingExtra, NotApplicable, UnknownName
from harness.models import hub
from harness.models.checkpoint import (
    check_checkpoint,
    checkpoint_hash,
    checkpoint_stamps,
    needs_remote_code,
    read_json,
    refuse_quantized,
)
from harness.models.info import ModelInfo, info_from_config
from harness.models.known import known_info, remember_info
from harness.models.registry import ModelEntry
from harness.models.shapes import build_config
from harness.models.spec import ModelSpec, parse_model
from harness.models.verifying import (
    broken_checkpoint_errors,
    check_loaded,
    check_tokenizer,
    is_mismatch,
    told,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from torch import nn

__all__ = ["LoadedModel", "ModelDescription", "describe", "fetch", "load", "resolve_model", "zoo_names"]

ZOO_DIR = Path(__file__).parent.parent / "zoo" / "checkpoints"


@dataclass(frozen=True)
class ModelDescription:
    """What the grid knows of a model before any weight is loaded.

    `identity` decides what the model computes: the hash of its files, its revision, or its shape. `stamps`
    are those of the files that were hashed (see `checkpoint_stamps`).
    """

    spec: ModelSpec
    info: ModelInfo
    identity: str
    stamps: tuple[tuple[str, int, int, int], ...] = ()


@dataclass
class LoadedModel:
    """A model ready to be transformed; `tokenizer` is None where text makes no sense."""

    model: nn.Module
    tokenizer: Any
    info: ModelInfo


def zoo_names() -> list[str]:
    """The bundled checkpoints."""
    return sorted(path.parent.name for path in ZOO_DIR.glob("*/config.json"))


def resolve_model(
    text: str,
    entries: Mapping[str, ModelEntry],
    *,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> ModelSpec:
    """Parse the written form, looking plain names up among those that plugins registered.

    Raises:
        ConfigError, UnknownName: as `parse_model`, and for a plain name that nothing registers.
    """
    options: dict[str, Any] = {
        "trust_remote_code": trust_remote_code,
        "allow_pickle": allow_pickle,
    }
    spec = parse_model(text, **options)
    if spec.source != "plugin":
        return spec
    if spec.name not in entries:
        known = [*entries, *(f"zoo:{name}" for name in zoo_names())]
        hint = "(a hub model is organisation/name, a directory ./name)"
        if os.path.isdir(spec.name):
            hint = f"(the folder of this name is written ./{spec.name})"
        raise UnknownName("model", spec.name, known, hint)
    base = parse_model(entries[spec.name].spec, **options)
    return replace(base, label=spec.label, modifiers=(*base.modifiers, *spec.modifiers))


def describe(spec: ModelSpec, *, by_plugin: bool = False) -> ModelDescription:
    """Read the configuration and name the content, without loading weights.

    Args:
        by_plugin: a plugin may load it, which may know weights that transformers would make plain ones of.

    Raises:
        ConfigError: a directory without a checkpoint, a hub model that cannot be reached, weights that are
            quantized already.
        UnknownName: no such zoo, shape or scratch model.
        MissingExtra: the model's package is not installed.
    """
    stamps: tuple[tuple[str, int, int, int], ...] = ()
    if spec.source in ("shape", "scratch"):
        config = build_config(spec.source, spec.name)
        identity = f"{spec.source}:{json.dumps(config.to_dict(), sort_keys=True, default=str)}"
        info = _info(config, spec)
    elif spec.source == "hub":
        commit = hub.resolve_commit(spec.name, spec.revision)
        directory = hub.fetch_description(spec.name, commit, trust_remote_code=spec.trust_remote_code)
        if not by_plugin:
            refuse_quantized(read_json(directory / "config.json"), f"model {spec.name!r}")
        hub.remember(spec.name, spec.revision, "model", commit)
        info, remote = _read_info(directory, spec)
        identity = f"hub:{spec.name}@{commit}{remote}"
        spec = replace(spec, revision=commit)  # what is loaded later is what was described now
    else:
        directory = _directory(spec)
        check_checkpoint(directory, allow_pickle=spec.allow_pickle, trust_remote_code=spec.trust_remote_code)
        if not by_plugin:
            refuse_quantized(read_json(directory / "config.json"), f"model directory {directory}")
        info, remote = _read_info(directory, spec)
        stamps = checkpoint_stamps(directory)  # before they are hashed: a change meanwhile is seen
        identity = f"files:{checkpoint_hash(directory)}{remote}"
    return ModelDescription(spec, info, f"{identity}{_modifier_identity(spec)}", stamps)


def _read_info(directory: Path, spec: ModelSpec) -> tuple[ModelInfo, str]:
    """What the configuration says, and what the identity says of code that comes with the model.

    Code may read a configuration in its own way, so nothing is known beforehand of what has some.
    """
    has_code = _has_code(directory)
    known = None if has_code else known_info(directory, spec.label, tuple(name for name, _ in spec.modifiers))
    info = known or _info(_read_config(directory, spec), spec)
    return info, "+code" if has_code and spec.trust_remote_code else ""


def _info(config: Any, spec: ModelSpec) -> ModelInfo:
    try:
        return info_from_config(
            config,
            spec.label,
            synthetic=spec.source == "shape",
            scratch=spec.source == "scratch",
            modifiers=tuple(name for name, _ in spec.modifiers),
        )
    except AttributeError as error:
        raise ConfigError(
            f"model {spec.label!r}: architecture {config.model_type!r} is no Transformer "
            f"that the harness knows ({error})"
        ) from None


def fetch(description: ModelDescription) -> None:
    """Download what `load` will read, where it lies on the hub; once, before the workers start.

    What the configuration says is kept from here on: describing a model alone writes nothing.

    Raises:
        ConfigError: the download broke, or what came is no checkpoint that may be loaded.
    """
    spec = description.spec
    if spec.source in ("shape", "scratch"):
        return
    directory = _checked_files(spec)
    if not _has_code(directory):
        remember_info(directory, description.info)


def load(description: ModelDescription, device: torch.device, dtype: torch.dtype, seed: int) -> LoadedModel:
    """Load the model onto the device, in eval mode, with its modifiers applied.

    Raises:
        ConfigError: the checkpoint cannot be loaded, does not hold the model that its config.json
            describes, or was changed since it was described.
        NumericalFailure: a weight is NaN or infinite.
    """
    from harness.nn.outliers import inject_outliers
    from harness.nn.surgery import conv1d_to_linear

    spec = description.spec
    if spec.source in ("shape", "scratch"):
        model = _random_model(spec, device, dtype, seed)
    else:
        model = _pretrained(spec, device, dtype)
    conv1d_to_linear(model)
    for name, options in spec.modifiers:
        if name == "outliers":
            model = inject_outliers(model, **_outlier_options(options))
    tokenizer = _tokenizer(spec, description.info)
    _require_described(description)
    return LoadedModel(model.eval(), tokenizer, description.info)


def _require_described(description: ModelDescription) -> None:
    """Raise `ConfigError` where files were changed since they were described: what they give would be stored
    under the key of what they were. Asked after they were read, so that no change comes in between."""
    spec = description.spec
    if not description.stamps or checkpoint_stamps(_directory(spec)) == description.stamps:
        return
    if describe(spec, by_plugin=True).identity != description.identity:  # else it was only copied or touched
        raise ConfigError(
            f"the files of model {spec.label!r} were changed since the sweep began; "
            "run the same command again"
        )


# --- where the files are -----------------------------------------------------------------------------


def _directory(spec: ModelSpec) -> Path:
    if spec.source == "zoo":
        if spec.name not in zoo_names():
            raise UnknownName("zoo model", spec.name, zoo_names())
        return ZOO_DIR / spec.name
    if spec.source == "package":
        found = importlib.util.find_spec(spec.name)
        if found is None:
            raise MissingExtra(spec.name.replace("_", "-"), "encoders")
        # A built-in or a single file has no folder of its own: `package:sys` must not find ./model here.
        if not found.submodule_search_locations:
            raise ConfigError(
                f"model {spec.label!r}: {spec.name} is a module, not a package with a folder model"
            )
        return Path(next(iter(found.submodule_search_locations))) / "model"
    return Path(spec.name)


def _checked_files(spec: ModelSpec) -> Path:
    """The folder of the checkpoint, whole and checked; downloads what is missing."""
    if spec.source != "hub":
        directory = _directory(spec)
    else:
        assert spec.revision is not None
        directory = hub.fetch_weights(spec.name, spec.revision, allow_pickle=spec.allow_pickle)
        check_checkpoint(directory, allow_pickle=spec.allow_pickle, trust_remote_code=spec.trust_remote_code)
    refuse_quantized(read_json(directory / "config.json"), f"model {spec.name!r}")
    return directory


def _has_code(directory: Path) -> bool:
    """Whether a model brings code of its own."""
    return needs_remote_code(read_json(directory / "config.json"))


def _read_config(directory: Path, spec: ModelSpec) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(
            str(directory), trust_remote_code=spec.trust_remote_code, local_files_only=True
        )
    except broken_checkpoint_errors() as error:
        if not spec.trust_remote_code and _has_code(directory):
            raise ConfigError(
                f"model {spec.label!r} brings code of its own (auto_map in config.json), which is not run "
                "unless you trust it: pass --trust-remote-code"
            ) from None
        raise ConfigError(f"model {spec.label!r}: its config.json cannot be used: {told(error)}") from None


# --- weights ------------------------------------------------------------------------------------------


def _random_model(spec: ModelSpec, device: torch.device, dtype: torch.dtype, seed: int) -> nn.Module:
    import torch

    config = build_config(spec.source, spec.name)
    with _seeded(device, seed), torch.device(device):
        model: nn.Module = _auto_class(config).from_config(config, dtype=dtype)
    return model


@contextmanager
def _seeded(device: torch.device, seed: int) -> Iterator[None]:
    import torch

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _pretrained(spec: ModelSpec, device: torch.device, dtype: torch.dtype) -> nn.Module:
    directory = _checked_files(spec)
    config = _read_config(directory, spec)
    try:
        model, found = _auto_class(config).from_pretrained(
            str(directory),
            dtype=dtype,
            device_map=str(device) if device.type == "cuda" else None,
            use_safetensors=None if spec.allow_pickle else True,
            weights_only=True,  # a pickle may hold tensors, never code
            trust_remote_code=spec.trust_remote_code,
            local_files_only=True,
            output_loading_info=True,
        )
    except broken_checkpoint_errors() as error:
        raise ConfigError(f"model {spec.label!r} cannot be loaded: {told(error)}") from None
    except RuntimeError as error:
        if is_mismatch(error):
            raise ConfigError(
                f"model {spec.label!r}: its weights have other shapes than its config.json says"
            ) from error
        raise  # out of memory, a driver: the worker knows these
    check_loaded(spec.label, model, found)
    return cast("nn.Module", model)


def _auto_class(config: Any) -> Any:
    """The class to load with: a causal language model, or the bare encoder."""
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

    if info_from_config(config, "").kind == "decoder":
        return AutoModelForCausalLM
    names = getattr(config, "architectures", None) or []
    return AutoModelForMaskedLM if any("ForMaskedLM" in name for name in names) else AutoModel


# The older ones are only a vocabulary: GPT-2's vocab.json with merges.txt, BERT's vocab.txt, SentencePiece's.
_OF_TOKENIZERS = ("*token*", "vocab.*", "*.model", "*.tiktoken")


def _tokenizer(spec: ModelSpec, info: ModelInfo) -> Any:
    from transformers import AutoTokenizer

    if spec.source == "shape":
        return None
    if spec.source == "scratch":
        names = zoo_names()
        if not names:
            raise NotApplicable("scratch models use the zoo's tokenizer, and the zoo is empty")
        return AutoTokenizer.from_pretrained(ZOO_DIR / names[0])
    directory = _checked_files(spec)
    if spec.source == "local" and not any(any(directory.glob(name)) for name in _OF_TOKENIZERS):
        return None  # speed and memory can be measured without one
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(directory), trust_remote_code=spec.trust_remote_code, local_files_only=True
        )
    except broken_checkpoint_errors() as error:
        raise ConfigError(
            f"model {spec.label!r} has no tokenizer that can be loaded: {told(error)}"
        ) from None
    check_tokenizer(spec.label, tokenizer, info.vocab_size)
    return tokenizer


# --- modifiers ----------------------------------------------------------------------------------------

_LARGEST_SEED = 2**63 - 1


def _number(kind: Callable[[str], Any], least: float, most: float) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        value = kind(text)
        if not least <= value <= most:  # a NaN is in no range
            raise ValueError(f"out of range: {text}")
        return value

    return read


def _sites(text: str) -> tuple[str, ...]:
    from harness.nn.outliers import SITES

    sites = tuple(text.split("/"))
    if set(sites) - set(SITES) or len(set(sites)) != len(sites):
        raise ValueError(f"not some of {', '.join(SITES)}: {text}")
    return sites


_OUTLIER_READERS: Mapping[str, Callable[[str], Any]] = {
    "k": _number(float, 1e-9, 1e9),
    "channels": _number(int, 1, 2**20),
    "sites": _sites,
    "seed": _number(int, 0, _LARGEST_SEED),
}


def _outlier_options(written: tuple[tuple[str, str], ...]) -> dict[str, Any]:
    options = {}
    for name, value in written:
        if name not in _OUTLIER_READERS:
            raise UnknownName("option of +outliers", name, _OUTLIER_READERS)
        try:
            options[name] = _OUTLIER_READERS[name](value)
        except ValueError:
            raise ConfigError(f"+outliers: {name}={value[:50]!r} cannot be read") from None
    return options


def _modifier_identity(spec: ModelSpec) -> str:
    for name, options in spec.modifiers:
        if name == "outliers":
            _outlier_options(options)  # refuse bad values before anything is loaded
    return "".join(f"+{name}{json.dumps(options)}" for name, options in spec.modifiers)
