"""Token perplexity against a plain transformers loop, and the divergence against brute force."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from harness.errors import ConfigError, DiskFull, NumericalFailure
from harness.evaluate import reference as reference_module
from harness.evaluate import windows as windows_module
from harness.evaluate.reference import compute_reference, load_reference, save_reference
from harness.evaluate.windows import (
    affordable_batch,
    cut_windows,
    score_windows,
    window_length,
)

from .conftest import POSITIONS, VOCAB, make_llama

DOCUMENTS = ["In the beginning God created the heaven and the earth. " * 9, "And there was light. " * 12]


@pytest.fixture
def windows(tokenizer):
    cut = cut_windows(DOCUMENTS, tokenizer, 32)
    assert cut.tokens.shape[0] > 4
    return cut


def score(model, windows, batch_size=4, **more):
    return score_windows(model, windows, vocab_size=VOCAB, batch_size=batch_size, **more)


def plain_perplexity(model, tokenizer, documents, seq_len):
    """The loop of the GPTQ paper's code, with transformers' own loss."""
    ids = tokenizer("\n\n".join(documents), return_tensors="pt").input_ids
    count = ids.numel() // seq_len
    losses = []
    for number in range(count):
        batch = ids[:, number * seq_len : (number + 1) * seq_len]
        with torch.no_grad():
            losses.append(model(batch, labels=batch).loss.double() * seq_len)
    return float(torch.exp(torch.stack(losses).sum() / (count * seq_len)))


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_token_perplexity_is_that_of_a_plain_loop(model, tokenizer, windows, batch_size):
    nll = score(model, windows, batch_size).nll
    expected = plain_perplexity(model, tokenizer, DOCUMENTS, 32)
    assert math.exp(nll.mean()) == pytest.approx(expected, rel=1e-6)


def test_windows_do_not_overlap_and_the_rest_is_dropped(tokenizer, windows):
    ids = tokenizer("\n\n".join(DOCUMENTS))["input_ids"]
    used = windows.tokens.numel()
    assert windows.tokens.flatten().tolist() == ids[:used]
    assert windows.dropped_tokens == len(ids) - used < 32
    assert windows.scored_tokens == windows.tokens.shape[0] * 31
    assert (
        windows.note == f"seq_len=32, windows={len(windows.tokens)}, dropped_tokens={windows.dropped_tokens}"
    )


def test_a_short_text_is_one_short_window(tokenizer):
    windows = cut_windows(["God created the earth."], tokenizer, 128)
    assert windows.tokens.shape[0] == 1
    assert 2 <= windows.seq_len < 128
    assert windows.dropped_tokens == 0
    with pytest.raises(ConfigError, match="fewer than two tokens"):
        cut_windows([""], tokenizer, 128)


def test_window_length_is_bounded_by_the_model():
    assert window_length(1024) == 1024
    assert window_length(131072) == 2048


def test_batches_are_bounded_by_tokens_and_by_logits():
    assert affordable_batch(64, 12, 4096) == 64
    assert affordable_batch(64, 1024, 4096) == 8
    assert affordable_batch(64, 2048, 128256) == 1
    assert affordable_batch(1, 10**9, 10**6) == 1


def test_rows_in_chunks_change_nothing(model, windows, monkeypatch):
    whole = score(model, windows).nll
    monkeypatch.setattr(windows_module, "CHUNK_BYTES", 4 * VOCAB * 5)
    assert torch.allclose(score(model, windows).nll, whole, rtol=1e-12)


def test_tokens_outside_the_vocabulary_are_refused(windows):
    small = make_llama(vocab_size=64)
    with pytest.raises(ConfigError, match="outside the model's vocabulary of 64"):
        score_windows(small, windows, vocab_size=64, batch_size=4)


def test_nan_is_a_numerical_failure(model, windows):
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    with pytest.raises(NumericalFailure, match="NaN or infinite"):
        score(model, windows)
    with pytest.raises(NumericalFailure, match="baseline's logits are NaN"):
        compute_reference(model, windows, vocab_size=VOCAB, batch_size=4)


# --- against the baseline ----------------------------------------------------------------------------


@pytest.fixture
def other():
    """A variant: the same model with noise on one layer."""
    variant = make_llama()
    with torch.no_grad():
        weight = variant.model.layers[1].mlp.down_proj.weight
        weight += 0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    return variant


def reference_of(model, windows, batch_size=4):
    return compute_reference(model, windows, vocab_size=VOCAB, batch_size=batch_size)


def brute_force(base, other, windows):
    """KL and top-1 agreement at every scored position, float64 [windows, seq_len - 1]."""
    with torch.no_grad():
        p = base(windows.tokens).logits[:, :-1].double().log_softmax(-1)
        q = other(windows.tokens).logits[:, :-1].double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1), (p.argmax(-1) == q.argmax(-1)).double()


def test_divergence_is_that_of_brute_force(model, other, windows):
    kl, agreement = brute_force(model, other, windows)
    scores = score(other, windows, reference=reference_of(model, windows))
    assert scores.kl.tolist() == pytest.approx(kl.mean(1).tolist(), rel=1e-5)
    assert scores.agreement.tolist() == pytest.approx(agreement.mean(1).tolist())
    assert scores.positions.tolist() == [31.0] * len(windows.tokens)
    assert scores.kl.mean() > 0.01


def test_some_positions_evenly_spread_stand_for_all(model, other, windows, monkeypatch):
    monkeypatch.setattr(reference_module, "MAX_POSITIONS", 20)
    reference = reference_of(model, windows)
    places = (reference.windows * 31 + reference.offsets).tolist()
    gaps = {b - a for a, b in pairwise(places)}
    assert len(places) == 20
    assert max(gaps) - min(gaps) <= 1
    kl, _ = brute_force(model, other, windows)
    chosen = kl[reference.windows, reference.offsets]
    scores = score(other, windows, reference=reference)
    assert float((scores.kl * scores.positions).sum() / 20) == pytest.approx(float(chosen.mean()), rel=1e-5)


def test_the_baseline_is_at_distance_zero_from_itself(model, windows):
    scores = score(model, windows, reference=reference_of(model, windows))
    assert float(scores.kl.max()) < 1e-6
    assert float(scores.agreement.min()) == 1.0


def test_large_references_are_kept_in_half_precision(model, other, windows, monkeypatch):
    exact = score(other, windows, reference=reference_of(model, windows))
    monkeypatch.setattr(reference_module, "FLOAT32_BYTES", 0)
    reference = reference_of(model, windows)
    assert reference.log_probabilities.dtype == torch.float16
    rounded = score(other, windows, reference=reference)
    assert float(rounded.kl.mean()) == pytest.approx(float(exact.kl.mean()), rel=1e-3)
    assert float(score(model, windows, reference=reference).kl.mean()) < 1e-5
    assert float(score(model, windows, reference=reference).agreement.min()) == 1.0


def test_size_is_bounded_for_any_vocabulary():
    for vocab in (4096, 50257, 128256, 262144):
        places, dtype = reference_module._places(10**7, vocab)
        assert len(places) * vocab * dtype.itemsize < 1.11e9
        assert 2000 < len(places) <= 4096


def test_a_ruled_out_token_counts_nothing(model, windows):
    """A logit of minus infinity, as some models give for padding tokens, must not make NaN."""

    class Masked(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, tokens):
            logits = self.inner(tokens).logits.clone()
            logits[..., -1] = -torch.inf
            return logits

    assert int(windows.tokens.max()) < VOCAB - 1
    reference = reference_of(Masked(model), windows)
    assert float(score(Masked(model), windows, reference=reference).kl.max()) < 1e-6
    assert float(score(model, windows, reference=reference).kl.mean()) > 0


def test_a_variant_that_rules_out_what_the_baseline_says_fails(model, windows):
    reference = reference_of(model, windows)

    class Certain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = torch.nn.Parameter(torch.zeros(1))

        def forward(self, tokens):
            logits = torch.zeros(*tokens.shape, VOCAB)
            logits[..., 5] = -torch.inf
            return logits

    assert not bool((windows.tokens == 5).any())
    with pytest.raises(NumericalFailure, match="divergence from the baseline is inf"):
        score(Certain(), windows, reference=reference)


def test_a_reference_for_other_tokens_or_vocabulary_is_refused(model, tokenizer, windows):
    reference = reference_of(model, windows)
    with pytest.raises(ConfigError, match="made from other tokens"):
        score(model, cut_windows(DOCUMENTS[:1], tokenizer, 32), reference=reference)
    larger = make_llama(vocab_size=VOCAB + 8)
    with pytest.raises(ConfigError, match=f"vocabulary of {VOCAB + 8} is not the baseline's {VOCAB}"):
        score_windows(larger, windows, vocab_size=VOCAB + 8, batch_size=4, reference=reference)


def test_saved_and_loaded(model, other, windows, tmp_path):
    path = tmp_path / "deep" / "reference.safetensors"
    assert load_reference(path) is None
    reference = reference_of(model, windows)
    save_reference(path, reference)
    loaded = load_reference(path)
    assert loaded.fingerprint == reference.fingerprint
    before, after = (score(other, windows, reference=r) for r in (reference, loaded))
    assert torch.equal(before.kl, after.kl)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_half_a_file_counts_as_none(model, windows, tmp_path):
    path = tmp_path / "reference.safetensors"
    save_reference(path, reference_of(model, windows))
    content = path.read_bytes()
    for damaged in (b"", content[:100], content[:-1]):
        path.write_bytes(damaged)
        assert load_reference(path) is None


def test_a_killed_writer_leaves_nothing_that_is_read(model, windows, tmp_path, monkeypatch):
    path = tmp_path / "reference.safetensors"
    reference = reference_of(model, windows)

    def full(_tensors, file, _metadata):
        with open(file, "wb") as half:
            half.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(reference_module, "save_file", full)
    with pytest.raises(DiskFull, match=r"is full; free some space"):
        save_reference(path, reference)
    assert list(tmp_path.iterdir()) == []


def test_positions_of_the_model_are_enough(tokenizer, model):
    windows = cut_windows(DOCUMENTS, tokenizer, window_length(POSITIONS))
    assert windows.seq_len == POSITIONS
    assert score(model, windows).nll.isfinite().all()
