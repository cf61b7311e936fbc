"""From a spec to the facts about a model (parent, configuration only) and to the model (worker)."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.errors import ConfigError, MissingExtra, NotApplicable, UnknownName
from harness.keys import tree_hash
from harness.models.info import ModelInfo, info_from_config
from harness.models.registry import ModelEntry
from harness.models.shapes import build_config
from harness.models.spec import ModelSpec, parse_model

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from torch import nn

__all__ = ["LoadedModel", "ModelDescription", "describe", "load", "resolve_model", "zoo_names"]

ZOO_DIR = Path(__file__).parent.parent / "zoo" / "checkpoints"


@dataclass(frozen=True)
class ModelDescription:
    """What the grid knows of a model before any weight is loaded.

    `identity` decides what the model computes: the hash of its files, its revision, or its shape.
    """

    spec: ModelSpec
    info: ModelInfo
    identity: str


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
        raise UnknownName("model", spec.name, known, hint)
    base = parse_model(entries[spec.name].spec, **options)
    return replace(base, label=spec.label, modifiers=(*base.modifiers, *spec.modifiers))


def describe(spec: ModelSpec) -> ModelDescription:
    """Read the configuration and name the content, without loading weights.

    Raises:
        ConfigError: a directory without a checkpoint, a hub model that cannot be reached.
        UnknownName: no such zoo, shape or scratch model.
        MissingExtra: the model's package is not installed.
    """
    modifiers = tuple(name for name, _ in spec.modifiers)
    if spec.source in ("shape", "scratch"):
        config = build_config(spec.source, spec.name)
        identity = f"{spec.source}:{json.dumps(config.to_dict(), sort_keys=True, default=str)}"
    elif spec.source == "hub":
        config, commit = _hub_config(spec)
        identity = f"hub:{spec.name}@{commit}"
        spec = replace(spec, revision=commit)  # what is loaded later is what was described now
    else:
        directory = _directory(spec)
        config = _local_config(directory, spec)
        identity = f"files:{_checkpoint_hash(directory)}"
    try:
        info = info_from_config(
            config,
            spec.label,
            synthetic=spec.source == "shape",
            scratch=spec.source == "scratch",
            modifiers=modifiers,
        )
    except AttributeError as error:
        raise ConfigError(
            f"model {spec.label!r}: architecture {config.model_type!r} is no Transformer "
            f"that the harness knows ({error})"
        ) from None
    return ModelDescription(spec, info, f"{identity}{_modifier_identity(spec)}")


def load(description: ModelDescription, device: torch.device, dtype: torch.dtype, seed: int) -> LoadedModel:
    """Load the model onto the device, in eval mode, with its modifiers applied.

    Raises:
        ConfigError: the checkpoint cannot be loaded.
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
    return LoadedModel(model.eval(), _tokenizer(spec), description.info)


# --- where the files are -----------------------------------------------------------------------------


def _directory(spec: ModelSpec) -> Path:
    if spec.source == "zoo":
        if spec.name not in zoo_names():
            raise UnknownName("zoo model", spec.name, zoo_names())
        return ZOO_DIR / spec.name
    if spec.source == "package":
        found = importlib.util.find_spec(spec.name)
        if found is None or found.origin is None:
            raise MissingExtra(spec.name.replace("_", "-"), "encoders")
        return Path(found.origin).parent / "model"
    return Path(spec.name)


def _checkpoint_hash(directory: Path) -> str:
    names = [
        path.name
        for path in directory.iterdir()
        if path.suffix in (".json", ".safetensors", ".bin", ".model", ".txt")
    ]
    return tree_hash(directory, names)


def _local_config(directory: Path, spec: ModelSpec) -> Any:
    from transformers import AutoConfig

    if not (directory / "config.json").is_file():
        raise ConfigError(
            f"model directory {directory} is no checkpoint in Hugging Face format: it has no config.json"
        )
    if not any(directory.glob("*.safetensors")):
        pickled = any(directory.glob("*.bin"))
        if not (pickled and spec.allow_pickle):
            advice = "; it has pickled weights: pass --allow-pickle to load them" if pickled else ""
            raise ConfigError(f"model directory {directory} has no *.safetensors weights{advice}")
    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=spec.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"model directory {directory}: {_first_line(error)}") from None


def _hub_config(spec: ModelSpec) -> tuple[Any, str]:
    """The configuration and the commit that the revision stands for now."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(
            spec.name, revision=spec.revision, trust_remote_code=spec.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"model {spec.label!r} from the hub: {_first_line(error)}") from None
    return config, getattr(config, "_commit_hash", None) or spec.revision or "main"


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]


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
    from transformers import AutoConfig

    where = spec.name if spec.source == "hub" else str(_directory(spec))
    common = {"revision": spec.revision, "trust_remote_code": spec.trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(where, **common)
        model: nn.Module = _auto_class(config).from_pretrained(
            where,
            dtype=dtype,
            device_map=str(device) if device.type == "cuda" else None,
            use_safetensors=None if spec.allow_pickle else True,
            **common,
        )
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"model {spec.label!r} cannot be loaded: {_first_line(error)}") from None
    return model


def _auto_class(config: Any) -> Any:
    """The class to load with: a causal language model, or the bare encoder."""
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

    if info_from_config(config, "").kind == "decoder":
        return AutoModelForCausalLM
    names = getattr(config, "architectures", None) or []
    return AutoModelForMaskedLM if any("ForMaskedLM" in name for name in names) else AutoModel


def _tokenizer(spec: ModelSpec) -> Any:
    from transformers import AutoTokenizer

    if spec.source == "shape":
        return None
    if spec.source == "scratch":
        names = zoo_names()
        if not names:
            raise NotApplicable("scratch models use the zoo's tokenizer, and the zoo is empty")
        return AutoTokenizer.from_pretrained(ZOO_DIR / names[0])
    where = spec.name if spec.source == "hub" else str(_directory(spec))
    if spec.source == "local" and not any(Path(where).glob("*token*")):
        return None  # speed and memory can be measured without one
    try:
        return AutoTokenizer.from_pretrained(
            where, revision=spec.revision, trust_remote_code=spec.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"model {spec.label!r} has no tokenizer that can be loaded: {_first_line(error)}"
        ) from None


# --- modifiers ----------------------------------------------------------------------------------------

_OUTLIER_READERS: Mapping[str, Callable[[str], Any]] = {
    "k": float,
    "channels": int,
    "sites": lambda text: tuple(text.split("/")),
    "seed": int,
}


def _outlier_options(written: tuple[tuple[str, str], ...]) -> dict[str, Any]:
    options = {}
    for name, value in written:
        if name not in _OUTLIER_READERS:
            raise UnknownName("option of +outliers", name, _OUTLIER_READERS)
        try:
            options[name] = _OUTLIER_READERS[name](value)
        except ValueError:
            raise ConfigError(f"+outliers: {name}={value!r} cannot be read") from None
    return options


def _modifier_identity(spec: ModelSpec) -> str:
    for name, options in spec.modifiers:
        if name == "outliers":
            _outlier_options(options)  # refuse bad values before anything is loaded
    return "".join(f"+{name}{json.dumps(options)}" for name, options in spec.modifiers)
