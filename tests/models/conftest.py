"""A loopback hub, and this process's client of it."""

from __future__ import annotations

import shutil

import pytest

from harness.models.loading import ZOO_DIR
from tests.models.hub_server import serve_hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that this process's library talks to, with a cache of its own."""
    import huggingface_hub
    from huggingface_hub import constants

    with serve_hub() as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.endpoint)
        template = served.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr("harness.models.hub_client.WAIT_S", 0.02)
        yield served
        huggingface_hub.close_session()


@pytest.fixture
def checkpoint(tmp_path, tiny_llama):
    """The folder of a tiny model with a tokenizer whose tokens it has embeddings for."""
    tiny_llama.resize_token_embeddings(4096)
    tiny_llama.save_pretrained(tmp_path / "checkpoint")
    for file in (ZOO_DIR / "llama-6m").glob("tokenizer*"):
        shutil.copy(file, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"
