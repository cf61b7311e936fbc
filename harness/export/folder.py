"""Writing a checkpoint so that it is there whole or not at all.

Everything is written into a folder beside the one that was asked for, which is renamed at the end. What goes
wrong, a full disk or a signal, leaves what was there before. Only `kill -9` or a power cut can leave the
folder behind, named ``.NAME.`` and eight letters.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from harness.errors import ConfigError, DiskFull
from harness.export.contents import Contents
from harness.folders import raise_if_full

__all__ = [
    "MANIFEST",
    "StoredTensors",
    "check_target",
    "folder_bytes",
    "replacing_folder",
    "write_checkpoint",
]

MANIFEST = "harness.json"
"""The file that says where a checkpoint comes from; its presence marks a folder as an export."""

_SHARD = "5GB"
_TAKEN = frozenset({errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR})
_ROOM = 64 << 20  # for the tokenizer and whatever else is small


def check_target(folder: Path, *, force: bool) -> None:
    """Whether a folder may be written.

    Raises:
        ConfigError: its parent does not exist, it is a file, or it holds something; with `force` an earlier
            export may be replaced, nothing else.
    """
    parent = folder.absolute().parent
    if not parent.is_dir():
        raise ConfigError(f"{folder}: the folder {parent} does not exist")
    if not os.access(parent, os.W_OK):
        raise ConfigError(f"{folder}: the folder {parent} may not be written")
    if folder.is_symlink():
        raise ConfigError(f"{folder} is a link; name the folder itself")
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ConfigError(f"{folder} is a file; name a folder that is new or empty")
    if not any(folder.iterdir()):
        return
    if not (folder / MANIFEST).is_file():
        raise ConfigError(f"{folder} holds files that no export wrote; name a folder that is new or empty")
    if not force:
        raise ConfigError(f"{folder} holds an earlier export; --force replaces it")


@contextmanager
def replacing_folder(folder: Path, *, needed_bytes: int) -> Iterator[Path]:
    """A new folder beside this one, which takes its place when all went well.

    Args:
        needed_bytes: asked of the disk before anything is written.

    Raises:
        ConfigError: something else was written there meanwhile, which stays.
        DiskFull: there is no room for it, or no longer.
    """
    folder = folder.absolute()
    earlier = _seen(folder)
    free = shutil.disk_usage(folder.parent).free
    if free < needed_bytes + _ROOM:
        raise DiskFull(
            f"{folder.parent} has {free / 1e9:.1f} GB free, and the checkpoint takes "
            f"{(needed_bytes + _ROOM) / 1e9:.1f} GB; nothing was written"
        )
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        try:
            yield partial
        except Exception as error:
            _say_full(error, partial)
            raise
        _give_usual_modes(partial)
        _put_in_place(partial, folder, earlier)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _give_usual_modes(folder: Path) -> None:
    """mkdtemp's folders and safetensors' files are for their owner only."""
    umask = os.umask(0)
    os.umask(umask)
    folder.chmod(0o777 & ~umask)
    for file in folder.rglob("*"):
        file.chmod((0o777 if file.is_dir() else 0o666) & ~umask)


def _seen(folder: Path) -> tuple[int, int] | None:
    """What tells a folder with something in it from a later one; None where nothing would be lost."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return None
    about = folder.stat()
    return about.st_ino, about.st_mtime_ns  # a number may be given again to another folder


def _put_in_place(partial: Path, folder: Path, earlier: tuple[int, int] | None) -> None:
    """Rename the folder, in place of nothing or of what was there when it was begun (`earlier`)."""
    meanwhile = ConfigError(
        f"{folder} was written by something else meanwhile; it was left as it is, and nothing was exported"
    )
    if earlier is None or not folder.is_dir():
        try:
            os.rename(partial, folder)  # an empty folder gives way
        except OSError as error:
            if error.errno in _TAKEN:
                raise meanwhile from None
            raise
        return
    old = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        os.rename(folder, old)
        try:
            if _seen(old) != earlier:
                raise meanwhile
            os.rename(partial, folder)
        except BaseException:
            if partial.exists():
                os.rename(old, folder)
            raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _say_full(error: BaseException, folder: Path) -> None:
    try:
        raise_if_full(error, folder)
    except DiskFull:
        raise DiskFull(
            f"the disk of {folder.parent} became full; nothing of the checkpoint was left, and what was "
            "there before still is"
        ) from None


def write_checkpoint(contents: Contents, folder: Path, *, model: Any, tokenizer: Any) -> None:
    """Write weights, configuration, tokenizer (with its chat template) and generation settings."""
    from huggingface_hub import save_torch_state_dict

    tensors: dict[str, torch.Tensor] = {}
    addresses: set[int] = set()

    def add(name: str, tensor: torch.Tensor) -> None:
        plain = tensor.detach().cpu().contiguous()
        # Layers may share a tensor (an input scale); each gets its own, or only one would be written. A part
        # of a larger tensor (the scales that GPTQ finds) is not written unless it is copied.
        is_part = plain.untyped_storage().nbytes() != plain.numel() * plain.element_size()
        tensors[name] = plain.clone() if is_part or plain.data_ptr() in addresses else plain
        addresses.add(tensors[name].data_ptr())

    for name, tensor in contents.rest.items():
        add(name, tensor)
    for layer in contents.layers:
        # One layer at a time: only its stored form stays, in main memory.
        for name, tensor in contents.tensors_of(layer).items():
            add(name, tensor)
    save_torch_state_dict(tensors, folder, max_shard_size=_SHARD)
    config = contents.config
    if (quantization := contents.quantization_config) is not None:
        config.quantization_config = quantization
    config.save_pretrained(folder)
    generation = getattr(model, "generation_config", None)
    if generation is not None and model.can_generate():
        try:
            generation.save_pretrained(folder)
        except ValueError:
            # It loads settings that contradict each other, as Llama 2's do (a temperature without sampling),
            # and refuses to write them: the original's travel as they are.
            generation.to_json_file(folder / "generation_config.json", use_diff=True)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


class StoredTensors(Mapping[str, torch.Tensor]):
    """The tensors of a written checkpoint by name, each read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        from safetensors import safe_open

        self._file_of: dict[str, Path] = {}
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, framework="pt") as opened:
                self._file_of |= dict.fromkeys(opened.keys(), file)

    def __getitem__(self, name: str) -> torch.Tensor:
        from safetensors import safe_open

        with safe_open(self._file_of[name], framework="pt") as opened:
            tensor: torch.Tensor = opened.get_tensor(name)
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._file_of  # without reading it

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)


def folder_bytes(folder: Path) -> Mapping[str, int]:
    """Bytes of the weight files (``weights``) and of all files together (``all``)."""
    sizes = {file: file.stat().st_size for file in folder.rglob("*") if file.is_file()}
    weights = sum(size for file, size in sizes.items() if file.suffix == ".safetensors")
    return {"weights": weights, "all": sum(sizes.values())}
