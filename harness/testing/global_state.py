"""What a transform must leave as it found it."""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

__all__ = ["unchanged_globals"]


@contextmanager
def unchanged_globals(who: str) -> Iterator[None]:
    """Fail where the block changes the process: random state, defaults, hooks, registries.

    Registries of attention functions may gain names; a name that was there must keep its function.

    Raises:
        AssertionError: names everything that changed.
    """
    before = _observe()
    attention_before = _attention_functions()
    yield
    after = _observe()
    changed = [name for name, value in before.items() if not _same(value, after[name])]
    attention_after = _attention_functions()
    changed += [
        f"attention function {name!r}"
        for name, function in attention_before.items()
        if attention_after.get(name) is not function
    ]
    if changed:
        raise AssertionError(f"{who} changed the process: {', '.join(changed)}")


def _observe() -> Mapping[str, Any]:
    import numpy as np

    module: Any = nn.modules.module
    return {
        "torch's random state": torch.get_rng_state(),
        "Python's random state": random.getstate(),
        "NumPy's random state": list(np.random.get_state(legacy=True)),
        "the default dtype": torch.get_default_dtype(),
        "the default device": torch.get_default_device(),
        "the gradient mode": torch.is_grad_enabled(),
        "the inference mode": torch.is_inference_mode_enabled(),
        "the deterministic mode": torch.are_deterministic_algorithms_enabled(),
        "the number of threads": torch.get_num_threads(),
        "the precision of float32 products": torch.get_float32_matmul_precision(),
        "the environment": dict(os.environ),
        "the working directory": os.getcwd(),
        "the warning filters": list(warnings.filters),
        "global module hooks": [
            len(getattr(module, name)) for name in ("_global_forward_hooks", "_global_forward_pre_hooks")
        ],
        "nn.Linear": (nn.Linear.forward, nn.Linear.__init__),
        "nn.Module": (nn.Module.__call__, nn.Module.__setattr__),
        "scaled_dot_product_attention": nn.functional.scaled_dot_product_attention,
    }


def _attention_functions() -> dict[str, Any]:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    masks = {f"mask of {name}": value for name, value in ALL_MASK_ATTENTION_FUNCTIONS.items()}
    return {**dict(ALL_ATTENTION_FUNCTIONS.items()), **masks}


def _same(before: Any, after: Any) -> bool:
    if isinstance(before, torch.Tensor):
        return torch.equal(before, after)
    if isinstance(before, list):
        return len(before) == len(after) and all(map(_same, before, after))
    if type(before).__module__ == "numpy":
        return bool((before == after).all())
    return bool(before == after)
