"""The content-keyed cache."""

from __future__ import annotations

import os
import time
from unittest.mock import Mock

import pytest
import torch

from harness.cache import ContentCache
from harness.errors import ConfigError
from harness.keys import content_key


def test_computed_once_and_read_back_equal(tmp_path):
    cache, calls = ContentCache(tmp_path), []

    def compute():
        calls.append(1)
        return {"hessian": torch.eye(3), "n": 5}

    first = cache.get_or_compute({"model": "a", "bits": 4}, compute)
    second = ContentCache(tmp_path).get_or_compute({"bits": 4, "model": "a"}, compute)
    assert len(calls) == 1
    assert torch.equal(first["hessian"], second["hessian"])
    assert second["n"] == 5


def test_writing_leaves_no_global_changed(tmp_path):
    before = torch.serialization.get_crc32_options()
    ContentCache(tmp_path).get_or_compute({"k": 1}, lambda: torch.ones(3))
    assert torch.serialization.get_crc32_options() == before


def test_what_was_read_may_be_changed(tmp_path):
    """Entries are mapped into memory; changes stay with the one who makes them."""
    cache = ContentCache(tmp_path)
    for _ in range(3):
        cache.get_or_compute({"k": 1}, lambda: torch.ones(3)).zero_()
    assert torch.equal(cache.get_or_compute({"k": 1}, lambda: None), torch.ones(3))


def test_another_model_is_another_entry(tmp_path):
    cache = ContentCache(tmp_path)
    assert cache.get_or_compute({"model": "a"}, lambda: 1) == 1
    assert cache.get_or_compute({"model": "b"}, lambda: 2) == 2


def test_a_damaged_entry_is_computed_again(tmp_path):
    cache = ContentCache(tmp_path)
    cache.get_or_compute({"k": 1}, lambda: 1)
    cache.path({"k": 1}).write_bytes(b"not a tensor")
    assert cache.get_or_compute({"k": 1}, lambda: 2) == 2
    assert cache.get_or_compute({"k": 1}, lambda: 3) == 2


def test_an_entry_that_is_damaged_anywhere_is_computed_again(tmp_path):
    """Damage inside the pickled part is met by torch's reader at a place of its own each time."""
    cache = ContentCache(tmp_path)
    value = {"weight": torch.arange(4.0), "name": "text", "parts": [1, (2, 3.5)]}
    cache.get_or_compute({"k": 1}, lambda: value)
    path = cache.path({"k": 1})
    whole = path.read_bytes()
    for place in range(whole.index(b"data.pkl"), whole.index(b"weight") + 300):
        path.write_bytes(whole[:place] + b"\x85" + whole[place + 1 :])
        cache.get_or_compute({"k": 1}, lambda: value)
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes(100) + whole[place + 100 :])
        cache.get_or_compute({"k": 1}, lambda: value)


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("unable to mmap 8 bytes from file <f>: Cannot allocate memory (12)")],
)
def test_an_entry_that_does_not_fit_into_memory_stays(tmp_path, monkeypatch, error):
    cache = ContentCache(tmp_path)
    cache.get_or_compute({"k": 1}, lambda: 1)
    with monkeypatch.context() as patched:
        patched.setattr(torch, "load", Mock(side_effect=error))
        with pytest.raises(type(error)):
            cache.get_or_compute({"k": 1}, lambda: 2)
    assert cache.get_or_compute({"k": 1}, lambda: 3) == 1


def test_a_folder_that_cannot_be_made_is_a_clear_error(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(ConfigError, match="HARNESS_CACHE"):
        ContentCache(blocked / "cache").get_or_compute({"k": 1}, lambda: 1)
    assert blocked.read_text() == ""


def test_keys_refuse_what_has_no_canonical_form():
    with pytest.raises(ValueError, match="JSON"):
        content_key({"x": float("nan")})
    with pytest.raises(TypeError):
        content_key({"x": object()})


def test_what_a_killed_process_left_is_removed_a_day_later(tmp_path):
    cache = ContentCache(tmp_path)
    path = cache.path({"a": 1})
    path.parent.mkdir()
    old, new = (path.parent / f".{path.name}.{end}" for end in ("killed", "writing"))
    for file, hours in ((old, 25), (new, 23)):
        file.write_bytes(b"half")
        os.utime(file, times=(time.time() - hours * 3600,) * 2)
    cache.get_or_compute({"b": 2}, lambda: 2)
    assert not old.exists()
    assert new.exists()
    assert cache.get_or_compute({"b": 2}, lambda: 3) == 2
