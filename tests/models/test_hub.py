"""Models from the hub, through the library that talks to the real one, against a loopback server."""

from __future__ import annotations

import json
import logging
import os
import time

import pytest
import torch

from harness.errors import ConfigError
from harness.models.hub import NotOnHub, remember, resolve_commit
from harness.models.loading import describe, fetch, load
from harness.models.spec import parse_model
from tests.models.hub_server import serve_hub

CPU = torch.device("cpu")


def _describe(text="org/tiny", **options):
    return describe(parse_model(text, **options))


def _load(description):
    return load(description, CPU, torch.float32, 0)


def _offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def _cached(tmp_path, name="model.safetensors"):
    return [path for path in (tmp_path / "hub-cache").rglob(name) if ".no_exist" not in path.parts]


def test_what_is_loaded_is_what_was_described(hub, checkpoint, tiny_llama):
    first = hub.add("org/tiny", checkpoint).head
    described = _describe()
    assert described.identity == f"hub:org/tiny@{first}"
    assert described.spec.revision == first
    assert not hub.asked("model.safetensors")  # a description costs no weights
    fetch(described)
    # The branch moves between the description and the loading: the described commit is loaded.
    hub.repositories["org/tiny"].commit({"config.json": b"{}"})
    loaded = _load(described)
    assert loaded.tokenizer is not None
    for name, parameter in tiny_llama.named_parameters():
        assert torch.equal(parameter, loaded.model.get_parameter(name))


def test_a_new_commit_is_another_model_and_a_pinned_revision_is_not(hub, checkpoint):
    repository = hub.add("org/tiny", checkpoint)
    first = repository.head
    branch, pinned = _describe().identity, _describe(f"org/tiny@{first}").identity
    assert pinned == branch
    (checkpoint / "generation_config.json").write_text('{"max_length": 7}')
    second = repository.commit(checkpoint)
    assert second != first
    assert _describe().identity == f"hub:org/tiny@{second}" != branch
    assert _describe(f"org/tiny@{first}").identity == pinned
    repository.names["v1"] = first
    assert _describe("org/tiny@v1").identity == pinned


def test_the_cache_serves_without_the_hub(hub, checkpoint, monkeypatch, caplog):
    sha = hub.add("org/tiny", checkpoint).head
    described = _describe()
    fetch(described)
    # A hub that is down: the commit that the cache knows, and a line that says so.
    hub.repositories.clear()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with caplog.at_level(logging.WARNING, "harness.models"):
        assert _describe().identity == described.identity
    assert f"local cache at commit {sha[:12]}" in caplog.text
    _offline(monkeypatch)
    asked = len(hub.requests)
    offline = _describe()
    assert offline.identity == described.identity
    assert _load(offline).tokenizer is not None
    assert len(hub.requests) == asked


@pytest.mark.parametrize("status", [403, 520])
@pytest.mark.parametrize("file", ["tokenizer_config.json", "tokenizer.json", "model.safetensors"])
def test_a_file_that_the_hub_refuses_is_not_left_out(hub, checkpoint, file, status):
    hub.add("org/tiny", checkpoint)
    hub.refused[f"/{file}"] = status
    with pytest.raises(NotOnHub, match=rf"{file} cannot be downloaded.*the hub answers {status}"):
        fetch(_describe())
    hub.refused.clear()
    described = _describe()
    fetch(described)
    assert _load(described).tokenizer is not None


@pytest.mark.parametrize("status", [403, 503, 520])
def test_a_model_whose_files_are_not_listed_is_not_taken_for_one_without_any(hub, checkpoint, status):
    sha = hub.add("org/tiny", checkpoint).head
    hub.refused[f"/revision/{sha}"] = status
    with pytest.raises(NotOnHub, match=f"does not list its files.*{status}"):
        _describe()
    hub.refused.clear()
    described = _describe()
    fetch(described)
    # What is all in the cache needs no list.
    hub.refused[f"/revision/{sha}"] = status
    assert _load(_describe(f"org/tiny@{sha}")).tokenizer is not None


def test_the_note_of_a_revision_is_never_seen_half_written(hub, checkpoint, tmp_path, monkeypatch):
    first = hub.add("org/tiny", checkpoint).head
    _describe()
    (note,) = (tmp_path / "hub-cache").rglob("refs/main")
    (checkpoint / "generation_config.json").write_text('{"max_length": 7}')
    second = hub.repositories["org/tiny"].commit(checkpoint)
    seen, replace = [], os.replace

    def watching(source, target):
        seen.append(note.read_text())
        replace(source, target)

    monkeypatch.setattr(os, "replace", watching)
    remember("org/tiny", None, "model", second)
    assert (seen[-1:], note.read_text()) == ([first], second)
    assert [path.name for path in note.parent.iterdir()] == ["main"]


def test_offline_without_the_weights_is_one_clear_error(hub, checkpoint, monkeypatch):
    hub.add("org/tiny", checkpoint)
    described = _describe()
    _offline(monkeypatch)
    with pytest.raises(ConfigError, match="not all in the local cache, and HF_HUB_OFFLINE is set"):
        fetch(described)
    with pytest.raises(NotOnHub, match=r"'org/none' is not in the local cache.*HF_HUB_OFFLINE is set"):
        _describe("org/none")


@pytest.mark.parametrize("honour_ranges", [True, False])
def test_a_download_that_breaks_is_never_half_used(hub, checkpoint, tmp_path, monkeypatch, honour_ranges):
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _seconds: None)
    hub.add("org/tiny", checkpoint)
    hub.honour_ranges = honour_ranges
    described = _describe()
    size = (checkpoint / "model.safetensors").stat().st_size
    hub.cut_after["model.safetensors"] = size // 2
    with pytest.raises(NotOnHub, match=r"model\.safetensors: the download broke off.*run the same command"):
        fetch(described)
    assert not _cached(tmp_path)
    with pytest.raises(ConfigError):
        _load(described)
    hub.cut_after.clear()
    fetch(described)
    (whole,) = _cached(tmp_path)
    assert whole.read_bytes() == (checkpoint / "model.safetensors").read_bytes()
    _load(described)


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (404, "RepoNotFound", "is not on the hub, or is private"),
        (401, "RepoNotFound", "is not on the hub, or is private"),
        (401, "GatedRepo", "is gated: accept its terms"),
        (403, "GatedRepo", "is gated: accept its terms"),
        (403, None, "the hub answers 403"),
        (418, None, "the hub answers 418"),
    ],
)
def test_what_the_hub_refuses_is_said_plainly(hub, checkpoint, status, code, message):
    repository = hub.add("org/tiny", checkpoint)
    repository.status, repository.error_code = status, code
    with pytest.raises(NotOnHub) as caught:
        _describe()
    assert message in str(caught.value)
    assert "'org/tiny'" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_revision_that_does_not_exist(hub, checkpoint):
    hub.add("org/tiny", checkpoint)
    with pytest.raises(NotOnHub, match="has no branch, tag or commit 'v9'"):
        _describe("org/tiny@v9")


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_hub_is_asked_again_but_not_for_long(hub, checkpoint, status):
    hub.add("org/tiny", checkpoint)
    hub.statuses = [(status, {}), (status, {})]
    assert _describe().info.num_layers == 2
    hub.statuses = [(status, {})] * 50
    hub.requests.clear()
    with pytest.raises(NotOnHub, match=f"'org/other' is not in the local cache.*answers {status}"):
        _describe("org/other")
    assert len(hub.requests) == 3


def test_a_hub_that_asks_to_wait_for_an_hour_is_not_waited_for(hub, monkeypatch):
    # As the first use of the hub in a process, when its client asks for a list of its own as well.
    monkeypatch.setattr("huggingface_hub.utils._detect_agent._registry", None)
    monkeypatch.setattr("huggingface_hub.constants.AGENT_HARNESSES_PATH", "/nonexistent")
    hub.statuses = [(429, {"Retry-After": "3600"})] * 5
    start = time.monotonic()
    with pytest.raises(NotOnHub, match="asks to wait for 3600 s"):
        resolve_commit("org/tiny", None)
    assert time.monotonic() - start < 2
    assert len(hub.requests) == 1


def test_a_hub_that_nobody_runs_is_given_up_soon(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()
    with pytest.raises(NotOnHub, match=r"127\.0\.0\.1 cannot be reached"):
        resolve_commit("org/tiny", None)
    assert time.monotonic() - start < 3


@pytest.mark.parametrize("sha", [None, "main", "../../../../tmp/x", "a" * 39, 5])
def test_a_hub_whose_commit_is_none_is_not_believed(hub, checkpoint, sha):
    repository = hub.add("org/tiny", checkpoint)
    repository.commits[sha] = repository.commits[repository.head]
    repository.names["main"] = sha
    with pytest.raises(NotOnHub, match="the hub names no commit"):
        _describe()


def test_a_token_stays_with_the_hub(hub, checkpoint, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with serve_hub() as storage:
        hub.add("org/tiny", checkpoint)
        storage.repositories = hub.repositories
        hub.elsewhere = storage
        # Another name of this machine is another host.
        storage.endpoint = storage.endpoint.replace("127.0.0.1", "localhost")
        fetch(_describe())
        assert {request.token for request in hub.requests} == {"Bearer hf_secret"}
        assert storage.asked("model.safetensors")
        assert {request.token for request in storage.requests} == {None}


def test_pickled_weights_on_the_hub_are_refused_unless_asked_for(hub, checkpoint, tiny_llama):
    (checkpoint / "model.safetensors").unlink()
    torch.save(tiny_llama.state_dict(), checkpoint / "pytorch_model.bin")
    hub.add("org/tiny", checkpoint)
    with pytest.raises(ConfigError, match="pass --allow-pickle"):
        fetch(_describe())
    assert not hub.asked("pytorch_model.bin")
    _load(_describe(allow_pickle=True))


def test_quantized_weights_on_the_hub_are_refused_before_they_are_fetched(hub, checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "quantization_config": {"bits": 4}}))
    hub.add("org/tiny", checkpoint)
    with pytest.raises(ConfigError, match="'org/tiny': its weights are quantized already"):
        _describe()
    assert not hub.asked("model.safetensors")


def test_shards_are_fetched_and_an_index_cannot_point_elsewhere(hub, checkpoint, tiny_llama):
    (checkpoint / "model.safetensors").unlink()
    tiny_llama.save_pretrained(checkpoint, max_shard_size="200KB")
    index = checkpoint / "model.safetensors.index.json"
    shards = set(json.loads(index.read_text())["weight_map"].values())
    assert len(shards) > 1
    hub.add("org/tiny", checkpoint)
    described = _describe()
    fetch(described)
    assert all(hub.asked(shard) for shard in shards)
    _load(described)
    content = json.loads(index.read_text())
    content["weight_map"] = dict.fromkeys(content["weight_map"], "../../../../other/model.safetensors")
    index.write_text(json.dumps(content))
    hub.repositories["org/tiny"].commit(checkpoint)
    with pytest.raises(ConfigError, match="points outside of its folder"):
        fetch(_describe())


def test_only_files_of_the_model_are_fetched(hub, checkpoint):
    for name in ("consolidated.safetensors", "evil.py", "README.md", "onnx/config.json"):
        (checkpoint / name).parent.mkdir(exist_ok=True)
        (checkpoint / name).write_bytes(b"{}")
    hub.add("org/tiny", checkpoint)
    fetch(_describe())
    got = {request.path.rpartition("/")[2] for request in hub.requests if "/resolve/" in request.path}
    assert not got & {"consolidated.safetensors", "evil.py", "README.md"}
    assert not hub.asked("onnx/config.json")
