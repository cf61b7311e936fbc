"""A configuration that was read once is not read again: the same facts, without transformers."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from harness.models import known, loading
from harness.models.loading import describe, fetch
from harness.models.spec import parse_model


@pytest.fixture
def folder(tmp_path, monkeypatch, tiny_llama):
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    tiny_llama.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def reads(monkeypatch):
    """The folders whose configuration transformers reads."""
    found = []
    read = loading._read_config
    monkeypatch.setattr(loading, "_read_config", lambda *given: found.append(given[0]) or read(*given))
    return found


def swept(folder, **options):
    """Described, and fetched for the workers of a sweep."""
    description = describe(parse_model(str(folder), **options))
    fetch(description)
    return description


def test_the_second_description_is_the_first(folder, reads):
    first = swept(folder)
    assert swept(folder) == first
    assert len(reads) == 1


def test_describing_alone_writes_nothing(folder, reads, tmp_path):
    for _ in range(2):
        describe(parse_model(str(folder)))
    assert len(reads) == 2
    assert not (tmp_path / "cache").exists()


def test_what_belongs_to_the_call_is_the_calls(folder, reads):
    swept(folder)
    info = describe(parse_model(f"{folder}+outliers")).info
    assert (info.label, info.modifiers) == (f"{folder}+outliers", ("outliers",))
    assert len(reads) == 1


@pytest.mark.parametrize("change", ["configuration", "version", "spoilt", "another fact"])
def test_anything_else_is_read_again(folder, reads, tmp_path, monkeypatch, change):
    before = swept(folder).info
    kept = list((tmp_path / "cache" / "models").glob("*.json"))
    assert len(kept) == 1
    if change == "configuration":
        config = json.loads((folder / "config.json").read_text())
        config["max_position_embeddings"] = 77
        (folder / "config.json").write_text(json.dumps(config))
    elif change == "version":
        monkeypatch.setattr(known, "version", lambda name: "99.0")
    elif change == "spoilt":
        kept[0].write_text("{")
    else:
        kept[0].write_text(kept[0].read_text().replace("num_heads", "heads"))
    after = swept(folder).info
    assert len(reads) == 2
    assert swept(folder).info == after
    assert len(reads) == 2, "and kept again"
    assert after.max_positions == (77 if change == "configuration" else before.max_positions)


def test_a_model_with_code_of_its_own_is_always_read(folder, reads):
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "code.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    for _ in range(2):
        swept(folder, trust_remote_code=True)
    assert len(reads) == 2


def test_where_nothing_can_be_kept_it_is_read_each_time(folder, reads, tmp_path):
    (tmp_path / "cache").mkdir(exist_ok=True)
    (tmp_path / "cache" / "models").write_text("a file")
    assert swept(folder) == swept(folder)
    assert len(reads) == 2


def test_a_model_that_is_known_needs_no_transformers(folder):
    swept(folder)
    code = (
        "import sys\nfrom harness.models.loading import describe\n"
        "from harness.models.spec import parse_model\n"
        "describe(parse_model(sys.argv[1]))\nprint('transformers' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True
    )
    assert done.stdout.split()[-1] == "False"
