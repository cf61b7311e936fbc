"""The written form of models."""

from __future__ import annotations

import pytest

from harness.errors import ConfigError, UnknownName
from harness.models.loading import describe, resolve_model
from harness.models.registry import ModelEntry
from harness.models.spec import parse_model


@pytest.mark.parametrize(
    ("text", "source", "name", "revision"),
    [
        ("zoo:llama-6m", "zoo", "llama-6m", None),
        ("shape:llama-7b", "shape", "llama-7b", None),
        ("meta-llama/Llama-3.1-8B", "hub", "meta-llama/Llama-3.1-8B", None),
        ("org/name@abc123", "hub", "org/name", "abc123"),
        ("org/name@refs/pr/1", "hub", "org/name", "refs/pr/1"),
        ("short-name", "plugin", "short-name", None),
    ],
)
def test_sources(text, source, name, revision):
    spec = parse_model(text)
    assert (spec.source, spec.name, spec.revision) == (source, name, revision)
    assert spec.label == text


def test_modifiers_carry_their_options():
    spec = parse_model("zoo:a+outliers:k=32:sites=ffn/vo")
    assert spec.modifiers == (("outliers", (("k", "32"), ("sites", "ffn/vo"))),)


def test_a_directory_may_have_a_plus_sign(tmp_path, monkeypatch):
    (tmp_path / "a+b").mkdir()
    monkeypatch.chdir(tmp_path)
    assert parse_model("./a+b").source == "local"
    spec = parse_model("./a+b+outliers")
    assert spec.source == "local"
    assert spec.modifiers == (("outliers", ()),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("./missing", "does not exist"),
        ("zooo:a", "did you mean 'zoo'"),
        ("zoo:", "a name must follow"),
        ("zoo:a+outlier", "did you mean 'outliers'"),
        ("zoo:a+outliers:k", "name=value"),
        ("not a model", "neither a hub id (organisation/name) nor a directory"),
        ("~\0/model", "null character"),
    ],
)
def test_bad_texts(text, message):
    with pytest.raises(ConfigError) as caught:
        parse_model(text)
    assert message in str(caught.value)


def test_registered_names_stand_for_their_spec():
    entries = {"mine": ModelEntry("mine", "shape:llama-160m")}
    spec = resolve_model("mine+outliers", entries)
    assert (spec.source, spec.name, spec.label) == ("shape", "llama-160m", "mine+outliers")
    assert spec.modifiers == (("outliers", ()),)
    with pytest.raises(UnknownName, match="did you mean 'mine'"):
        resolve_model("mime", entries)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama-15m", 15_191_712),
        ("llama-7b", 6_738_415_616),
        ("llama-13b", 13_015_864_320),
        ("opt-6.7b", 6_658_473_984),
    ],
)
def test_shapes_have_the_published_sizes(name, parameters):
    import torch
    from transformers import AutoModelForCausalLM

    from harness.models.shapes import build_config

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(build_config("shape", name))
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("shape:llama-7c", "did you mean 'llama-7b'"),
        ("scratch:none", "unknown scratch model"),
        ("zoo:none", "unknown zoo model"),
        ("shape:llama-160m+outliers:q=1", "unknown option of +outliers"),
        ("shape:llama-160m+outliers:k=x", "cannot be read"),
    ],
)
def test_names_that_do_not_exist(text, message):
    with pytest.raises(ConfigError) as caught:
        describe(resolve_model(text, {}))
    assert message in str(caught.value)


def test_a_directory_must_hold_a_checkpoint(tmp_path):
    with pytest.raises(ConfigError, match=r"no config\.json"):
        describe(parse_model(str(tmp_path)))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match=r"no model\.safetensors"):
        describe(parse_model(str(tmp_path)))


def test_the_identity_follows_the_files(tmp_path, tiny_llama):
    tiny_llama.save_pretrained(tmp_path)
    first = describe(parse_model(str(tmp_path)))
    assert first.info.num_layers == 2
    assert describe(parse_model(str(tmp_path))).identity == first.identity
    assert describe(parse_model(f"{tmp_path}+outliers")).identity != first.identity
    weights = tmp_path / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    assert describe(parse_model(str(tmp_path))).identity != first.identity
