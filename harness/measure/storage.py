"""Which memory a tensor, a module or a cache really holds.

Bytes are counted by storage, so that tied weights and views count once and a view that keeps a large
tensor alive counts as large. Tensor subclasses (packed, semi-structured) and sparse layouts are
taken apart into the plain tensors that they are made of.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = [
    "bytes_per_tensor",
    "own_tensors",
    "plain_tensors",
    "storage_bytes",
    "tensor_key",
    "tensors_in",
]


def plain_tensors(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The dense tensors that a tensor consists of; itself where it is one."""
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        for name in names:
            yield from plain_tensors(getattr(tensor, name))
    elif tensor.layout == torch.sparse_coo:
        yield from (tensor._indices(), tensor._values())
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        yield from (tensor.crow_indices(), tensor.col_indices(), tensor.values())
    elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        yield from (tensor.ccol_indices(), tensor.row_indices(), tensor.values())
    else:
        yield tensor


def own_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """A module's own parameters and buffers (non-persistent ones too), without its children's."""
    yield from module.named_parameters(recurse=False, remove_duplicate=False)
    yield from module.named_buffers(recurse=False, remove_duplicate=False)


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the unique storages behind the tensors."""
    sizes: dict[tuple[str, int], int] = {}
    for tensor in tensors:
        for plain in plain_tensors(tensor):
            storage = plain.untyped_storage()
            sizes[_storage_key(plain)] = storage.nbytes()
    return sum(sizes.values())


def bytes_per_tensor(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the elements of the tensors, each distinct tensor once.

    For the share of one module: unlike `storage_bytes` it does not charge a slice of a shared
    storage with the whole of it. Elements that an expanded tensor repeats count once.
    """
    sizes: dict[tuple[Any, ...], int] = {}
    for tensor in tensors:
        for plain in plain_tensors(tensor):
            held = plain.numel() * plain.element_size()
            sizes[tensor_key(plain)] = min(held, plain.untyped_storage().nbytes())
    return sum(sizes.values())


def tensor_key(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Equal for two tensors that are the same elements of the same memory."""
    return (
        *_storage_key(tensor),
        tensor.storage_offset(),
        tuple(tensor.shape),
        tensor.stride(),
        tensor.dtype,
    )


def tensors_in(value: Any) -> list[torch.Tensor]:
    """Every tensor reachable from a value: a cache, its layers, their lists and attributes.

    Configurations and modules that a cache refers to are not its memory and are left out.
    """
    found: list[torch.Tensor] = []
    seen: set[int] = set()
    pending = [value]
    while pending:
        item = pending.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            found.append(item)
        elif isinstance(item, dict):
            pending.extend(item.values())
        elif isinstance(item, (list, tuple, set, frozenset)):
            pending.extend(item)
        elif _may_hold_tensors(item):
            pending.extend(vars(item).values())
    return found


def _may_hold_tensors(item: Any) -> bool:
    if isinstance(item, (type, nn.Module)) or callable(item) or not hasattr(item, "__dict__"):
        return False
    return not type(item).__name__.endswith("Config")


def _storage_key(tensor: torch.Tensor) -> tuple[str, int]:
    storage = tensor.untyped_storage()
    # Meta and empty tensors have no address; their storage object tells them apart.
    return str(tensor.device), storage.data_ptr() or storage._cdata
