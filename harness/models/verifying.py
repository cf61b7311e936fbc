"""Whether what was loaded is the model that its files describe.

`from_pretrained` fills weights that a checkpoint lacks with random numbers and goes on; such a model would be
measured without anybody knowing. Here it is an error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from harness.errors import ConfigError, NumericalFailure

if TYPE_CHECKING:
    from torch import nn

__all__ = ["broken_checkpoint_errors", "check_loaded", "check_tokenizer", "is_mismatch", "told"]

_LONGEST = 300
_IN_A_BLOCK = re.compile(r"(^|\.)(layers?|h|blocks?)\.\d+\.")


def broken_checkpoint_errors() -> tuple[type[Exception], ...]:
    """What transformers and its readers raise for files that hold something else than they should."""
    import pickle

    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    return (
        ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, RecursionError,
        SyntaxError, TypeError, ValueError, pickle.UnpicklingError, SafetensorError, StrictDataclassError,
    )  # fmt: skip


def told(error: BaseException) -> str:
    """What an error says, in one line of a bearable length; the type too where the text is only a name."""
    text = " ".join(str(error).split())
    if len(text) > _LONGEST:
        text = text[:_LONGEST] + "…"
    return f"{type(error).__name__}: {text}" if isinstance(error, LookupError) or not text else text


def is_mismatch(error: RuntimeError) -> bool:
    """Whether transformers says that weights and configuration differ in their shapes."""
    return "mismatch" in str(error)


def check_loaded(label: str, model: nn.Module, found: Mapping[str, Any]) -> None:
    """Compare what a checkpoint held with what the model needs.

    Args:
        found: transformers' loading information: ``missing_keys``, ``unexpected_keys``, ``mismatched_keys``.

    Raises:
        ConfigError: weights are missing (and were filled with random numbers), have other shapes, or belong
            to blocks that the configuration does not describe so. Heads for other purposes may be left over.
        NumericalFailure: a weight is NaN or infinite.
    """
    if missing := sorted(map(str, found["missing_keys"])):
        raise ConfigError(
            f"model {label!r}: its files lack {_some(missing)}; a model loaded in part is not measured"
        )
    if mismatched := sorted(str(entry[0]) for entry in found["mismatched_keys"]):
        raise ConfigError(f"model {label!r}: its config.json gives other shapes to {_some(mismatched)}")
    extra = sorted(name for name in map(str, found["unexpected_keys"]) if _IN_A_BLOCK.search(name))
    if extra:
        raise ConfigError(f"model {label!r}: its config.json describes no place for {_some(extra)}")
    _check_finite(label, model)


def _some(names: Sequence[str]) -> str:
    rest = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]}{rest}"


def _check_finite(label: str, model: nn.Module) -> None:
    import torch

    for name, parameter in model.named_parameters():
        if parameter.numel() and parameter.is_floating_point():
            # The extremes of a tensor pass a NaN on, and need no mask of its size.
            extremes = torch.stack(torch.aminmax(parameter.detach()))
            if not bool(torch.isfinite(extremes).all()):
                raise NumericalFailure(f"model {label!r}: the weight {name} holds NaN or infinity")


def check_tokenizer(label: str, tokenizer: Any, vocab_size: int) -> None:
    """Refuse a tokenizer that makes tokens for which the model has no embedding.

    A token that only fills up batches may lie outside: no text holds it.

    Raises:
        ConfigError: tokens without an embedding.
    """
    beyond = {token: number for token, number in tokenizer.get_vocab().items() if number >= vocab_size}
    beyond.pop(tokenizer.pad_token, None)
    if beyond:
        token = min(beyond, key=lambda each: beyond[each])
        raise ConfigError(
            f"model {label!r}: its tokenizer makes {len(beyond)} tokens, such as {token!r} "
            f"({beyond[token]}), that its vocabulary of {vocab_size} has no place for"
        )
