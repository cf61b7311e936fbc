"""The training loop and the token sources."""

from __future__ import annotations

import math

import pytest
import torch

from harness.errors import ConfigError, NumericalFailure
from harness.tokens import RandomTokens, TextTokens, read_text
from harness.training import TrainSettings, causal_loss, lr_factor, train


def _source():
    # A text with a strong pattern, so that a few steps must help.
    return TextTokens(torch.arange(4000) % 7, "pattern")


def _generator():
    return torch.Generator().manual_seed(0)


SETTINGS = TrainSettings(steps=12, lr=5e-3, batch_size=4, seq_len=16)


def test_training_learns_and_repeats_exactly(tiny_llama):
    state = {name: value.clone() for name, value in tiny_llama.state_dict().items()}
    first = train(tiny_llama, _source(), SETTINGS, _generator())
    trained = {name: value.clone() for name, value in tiny_llama.state_dict().items()}
    assert first.final_loss < 0.8 * first.losses[0]
    assert (first.steps, first.tokens) == (12, 12 * 4 * 16)
    assert not tiny_llama.training
    tiny_llama.load_state_dict(state)
    again = train(tiny_llama, _source(), SETTINGS, _generator())
    assert again.losses == first.losses
    for name, value in tiny_llama.state_dict().items():
        assert torch.equal(value, trained[name]), name


def test_zero_steps_change_nothing(tiny_llama):
    before = {name: value.clone() for name, value in tiny_llama.state_dict().items()}
    report = train(tiny_llama, _source(), TrainSettings(steps=0), _generator())
    assert report.steps == 0
    assert math.isnan(report.final_loss)
    assert all(torch.equal(value, before[n]) for n, value in tiny_llama.state_dict().items())


def test_only_the_given_parameters_move(tiny_llama):
    norm = tiny_llama.model.norm.weight
    before = {name: value.clone() for name, value in tiny_llama.state_dict().items()}
    train(tiny_llama, _source(), SETTINGS, _generator(), parameters=[norm])
    moved = [n for n, v in tiny_llama.state_dict().items() if not torch.equal(v, before[n])]
    assert moved == ["model.norm.weight"]
    assert all(parameter.requires_grad for parameter in tiny_llama.parameters())


def test_a_multiple_of_the_rate_moves_its_parameter_alone(tiny_llama):
    """The first step of Adam has the size of the rate, whatever the gradient."""
    settings = TrainSettings(steps=1, lr=1e-3, batch_size=4, seq_len=16, weight_decay=0.0)
    first, second = (layer.input_layernorm.weight for layer in tiny_llama.model.layers)
    train(tiny_llama, _source(), settings, _generator(), lr_multiples={second: 0.25})
    torch.testing.assert_close((first - 1).abs().amax(), torch.tensor(1e-3), rtol=1e-3, atol=0)
    torch.testing.assert_close((second - 1).abs().amax(), torch.tensor(2.5e-4), rtol=1e-3, atol=0)


def test_on_step_sees_every_step(tiny_llama):
    seen = []
    train(tiny_llama, _source(), SETTINGS, _generator(), on_step=lambda step, model: seen.append(step))
    assert seen == list(range(12))


def test_frozen_weights_of_float16_train_nothing_away_on_a_cpu(tiny_opt):
    """OPT's norms have biases; beside bfloat16 activations there are none of float16."""
    tiny_opt.half()
    before = {name: value.clone() for name, value in tiny_opt.state_dict().items()}
    trained = tiny_opt.model.decoder.layers[0].fc1.weight
    report = train(tiny_opt, _source(), SETTINGS, _generator(), parameters=[trained])
    assert report.steps == SETTINGS.steps
    moved = [n for n, v in tiny_opt.state_dict().items() if not torch.equal(v, before[n])]
    assert moved == ["model.decoder.layers.0.fc1.weight"]
    assert {value.dtype for value in tiny_opt.state_dict().values()} == {torch.float16}


def test_half_precision_models_come_back_in_their_type(tiny_llama):
    tiny_llama.to(torch.bfloat16)
    report = train(tiny_llama, _source(), SETTINGS, _generator())
    assert {parameter.dtype for parameter in tiny_llama.parameters()} == {torch.bfloat16}
    assert report.final_loss < report.losses[0]


def test_the_default_loss_is_the_mean_next_token_cross_entropy(tiny_llama):
    tokens = torch.randint(256, (2, 9), generator=_generator())
    log_probs = tiny_llama(tokens).logits.log_softmax(-1)
    by_hand = [-log_probs[b, t, tokens[b, t + 1]] for b in range(2) for t in range(8)]
    assert causal_loss(tiny_llama, tokens).item() == pytest.approx(
        torch.stack(by_hand).mean().item(), rel=1e-6
    )


def test_divergence_is_a_numerical_failure(tiny_llama):
    with pytest.raises(NumericalFailure, match="diverged"):
        train(
            tiny_llama,
            _source(),
            SETTINGS,
            _generator(),
            loss=lambda model, tokens: causal_loss(model, tokens) * float("nan"),
        )


@pytest.mark.parametrize(("scale", "diverges"), [(1.0, False), (4.0, True)])
def test_a_batch_with_nothing_to_predict_is_no_measure_of_divergence(tiny_llama, scale, diverges):
    factors = iter([0.0, 1.0, *[scale] * SETTINGS.steps])

    def run():
        return train(
            tiny_llama,
            _source(),
            SETTINGS,
            _generator(),
            loss=lambda model, tokens: causal_loss(model, tokens) * next(factors),
        )

    if diverges:
        with pytest.raises(NumericalFailure, match=r"rose from [1-9].* at step 2"):
            run()
    else:
        assert run().losses[0] == 0


def test_the_schedule_warms_up_and_ends_low():
    settings = TrainSettings(steps=100, warmup_share=0.1, final_share=0.05)
    factors = [lr_factor(step, settings) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert max(factors) == pytest.approx(1.0)
    assert factors[-1] == pytest.approx(0.05, abs=0.01)
    assert factors[10:] == sorted(factors[10:], reverse=True)


@pytest.mark.parametrize("bad", [{"steps": -1}, {"lr": 0.0}, {"batch_size": 0}, {"seq_len": 1}])
def test_bad_settings_are_refused(bad):
    with pytest.raises(ConfigError):
        TrainSettings(**bad)


def test_windows_are_slices_of_the_text_and_repeat():
    source = TextTokens(torch.arange(100), "numbers")
    windows = source.windows(5, 10, _generator())
    assert windows.shape == (5, 10)
    assert torch.equal(windows - windows[:, :1], torch.arange(10).expand(5, 10))
    assert torch.equal(windows, source.windows(5, 10, _generator()))


def test_a_window_longer_than_the_text_is_refused():
    with pytest.raises(ConfigError, match="does not fit"):
        TextTokens(torch.arange(5), "short").windows(1, 6, _generator())
    assert RandomTokens(7).windows(2, 3, _generator()).max() < 7


def test_packed_texts_are_read_and_damaged_ones_are_one_clear_error(tmp_path):
    import gzip
    import lzma

    for suffix, pack in ((".txt", bytes), (".gz", gzip.compress), (".xz", lzma.compress)):
        file = tmp_path / f"text{suffix}"
        packed = pack("Grüße. ".encode() * 200)
        file.write_bytes(packed)
        assert read_text(file) == "Grüße. " * 200
        # Damage in the middle: not the header, so the unpacker itself must fail.
        file.write_bytes(packed[: len(packed) // 2] + b"\xff" * 8 + packed[len(packed) // 2 + 8 :])
        with pytest.raises(ConfigError, match="cannot be read"):
            read_text(file)


# --- parts of a schedule ---------------------------------------------------------------------------


def _rates_seen(model, settings, **how):
    rates, states, optimizers = [], [], []

    def on_start(optimizer):
        optimizers.append(optimizer)
        states.append(len(optimizer.state))

    def on_step(step, model):
        rates.append((step, optimizers[0].param_groups[0]["lr"]))

    report = train(model, _source(), settings, _generator(), on_start=on_start, on_step=on_step, **how)
    return report, rates, states


def test_a_replay_has_the_rates_of_the_whole_run_from_its_first_step_on(tiny_llama):
    whole, rates, _ = _rates_seen(tiny_llama, SETTINGS)
    assert [rate for _, rate in rates] == [SETTINGS.lr * lr_factor(step, SETTINGS) for step in range(12)]
    replay, late_rates, states = _rates_seen(tiny_llama, SETTINGS, first_step=5)
    assert late_rates == rates[5:]
    assert states == [0]  # a fresh optimiser
    assert (replay.steps, replay.tokens, len(replay.losses)) == (7, 7 * 4 * 16, 7)
    assert whole.steps == 12


def test_a_replay_sees_the_batches_of_the_whole_run(tiny_llama):
    def batches(**how):
        seen = []

        def loss(model, tokens):
            seen.append(tokens.clone())
            return causal_loss(model, tokens)

        train(tiny_llama, _source(), SETTINGS, _generator(), loss=loss, **how)
        return seen

    whole, replay = batches(), batches(first_step=8)
    assert len(replay) == 4
    assert all(torch.equal(a, b) for a, b in zip(whole[8:], replay, strict=True))


@pytest.mark.parametrize("first_step", [12, 40])
def test_a_replay_of_nothing_changes_nothing(tiny_llama, first_step):
    before = {name: value.clone() for name, value in tiny_llama.state_dict().items()}
    report = train(tiny_llama, _source(), SETTINGS, _generator(), first_step=first_step)
    assert (report.steps, report.tokens, report.losses) == (0, 0, ())
    assert all(torch.equal(value, before[n]) for n, value in tiny_llama.state_dict().items())


def test_a_negative_first_step_is_refused(tiny_llama):
    with pytest.raises(ConfigError, match="first training step"):
        train(tiny_llama, _source(), SETTINGS, _generator(), first_step=-1)


def test_no_warm_up_and_a_final_share_of_one_is_a_constant_rate():
    settings = TrainSettings(steps=20, warmup_share=0.0, final_share=1.0)
    assert {lr_factor(step, settings) for step in range(20)} == {1.0}


def test_streams_of_a_context_differ_and_repeat(tiny_llama):
    from harness.testing import make_context

    context, seen = make_context(tiny_llama), {}
    for name in ("training", "other", "training"):
        batches = seen.setdefault(name, [])

        def loss(model, tokens, batches=batches):
            batches.append(tokens.clone())
            return causal_loss(model, tokens)

        context.train(tiny_llama, loss=loss, steps=1, stream=name)
    assert torch.equal(*seen["training"])
    assert not torch.equal(seen["training"][0], seen["other"][0])
