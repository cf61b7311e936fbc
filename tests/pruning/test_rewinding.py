"""Weight and learning-rate rewinding: what they start from, at which rates, and what is refused."""

from __future__ import annotations

import pytest
import torch
from harness_plugins.pruning import lottery_rewind, lr_rewind
from harness_plugins.pruning._rewinding import even_cycles
from harness_plugins.pruning.lottery_rewind import LotteryOptions, random_masks
from harness_plugins.pruning.lr_rewind import LrRewindOptions

from harness.errors import ConfigError
from harness.models.info import info_from_config
from harness.models.loading import describe
from harness.models.spec import parse_model
from harness.nn.held_masks import HeldMasks
from harness.nn.magnitude import count_of
from harness.nn.surgery import block_linears
from harness.testing import make_context, tiny_model
from harness.training import TrainSettings, lr_factor

T = 8
SETTINGS = TrainSettings(steps=T, lr=1e-2, batch_size=2, seq_len=16, weight_decay=0.3)


def _context(model, settings=SETTINGS, **how):
    return make_context(
        model, info_from_config(model.config, "scratch:x", scratch=True), settings=settings, **how
    )


def _values(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def _dense_run(family="llama", dtype=torch.float32):
    """The parameters before the first step and after each one, float32, of plain training."""
    model = tiny_model(family).to(dtype)
    history = [{name: value.float() for name, value in _values(model).items()}]
    _context(model).train(model, on_step=lambda _step, model: history.append(_values(model)))
    return model, history


def _global_masks(model, sparsity) -> dict[str, torch.Tensor]:
    """By a plain sort over all layers."""
    weights = {f"{name}.weight": linear.weight.detach().float() for name, linear in block_linears(model)}
    flat = torch.cat([weight.abs().flatten() for weight in weights.values()])
    keep = torch.ones(len(flat), dtype=torch.bool)
    keep[flat.sort(stable=True).indices[: count_of(sparsity, len(flat))]] = False
    parts = keep.split([weight.numel() for weight in weights.values()])
    return {name: part.view(weights[name].shape) for name, part in zip(weights, parts, strict=True)}


def _watched(method, options, model, settings=SETTINGS):
    """Run a method; its replay's first weights, rates, batches, optimiser states and zero counts."""
    context = _context(model, settings)
    seen = {"start": [], "rates": [], "states": [], "zeros": [], "first_batch": []}
    train = context.train

    def watching(model, *, on_start=None, on_step=None, **how):
        if on_start is None:  # the dense run
            return train(model, on_step=on_step, **how)
        optimizers = []

        def start(optimizer):
            on_start(optimizer)
            optimizers.append(optimizer)
            seen["start"].append(_values(model))
            seen["states"].append(len(optimizer.state))
            seen["rates"].append([])

        def step(number, model):
            on_step(number, model)
            seen["rates"][-1].append((number, optimizers[0].param_groups[0]["lr"]))
            seen["zeros"].append(sum(int((linear.weight == 0).sum()) for _, linear in block_linears(model)))

        return train(model, on_start=start, on_step=step, **how)

    context.train = watching
    method.transform(model, options, context)
    return seen, context


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
@pytest.mark.parametrize("k", [0, 2])
def test_a_ticket_starts_from_the_early_weights_under_the_mask(family, k):
    trained, history = _dense_run(family)
    masks = _global_masks(trained, 0.6)
    seen, context = _watched(lottery_rewind.METHOD, LotteryOptions(sparsity=0.6, k=k), tiny_model(family))
    (start,) = seen["start"]
    for name, value in start.items():
        assert torch.equal(value, history[k][name] * masks.get(name, 1)), name
    assert seen["states"] == [0]
    assert seen["rates"] == [[(i, 1e-2 * lr_factor(i, SETTINGS)) for i in range(k, T)]]
    assert set(seen["zeros"]) == {sum(int((~mask).sum()) for mask in masks.values())}
    assert context.trained_steps == T + T - k
    recorded = {record.metric: record.value for record in context.records}
    assert recorded["rewound_to_step"] == k
    assert recorded["dense_training_loss"] > 0


def test_early_weights_of_a_half_precision_model_are_those_of_the_run_to_the_bit():
    model = tiny_model("llama").to(torch.bfloat16)
    trained, history = _dense_run(dtype=torch.bfloat16)
    masks = _global_masks(trained, 0.6)
    seen, _ = _watched(lottery_rewind.METHOD, LotteryOptions(sparsity=0.6, k=3), model)
    for name, value in seen["start"][0].items():
        assert value.dtype == torch.float32
        assert torch.equal(value, history[3][name] * masks.get(name, 1))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    zeros = sum(int((linear.weight == 0).sum()) for _, linear in block_linears(model))
    assert zeros >= sum(int((~mask).sum()) for mask in masks.values())


def test_without_pruning_a_replay_from_the_start_is_the_run_itself():
    trained, _ = _dense_run()
    model = tiny_model("llama")
    lottery_rewind.METHOD.transform(model, LotteryOptions(sparsity=0.0, k=0), _context(model))
    assert all(torch.equal(p, trained.get_parameter(name)) for name, p in model.named_parameters())


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
@pytest.mark.parametrize("t", [3, T])
def test_learning_rate_rewinding_keeps_the_trained_weights(family, t):
    trained, history = _dense_run(family)
    masks = _global_masks(trained, 0.6)
    seen, _ = _watched(lr_rewind.METHOD, LrRewindOptions(sparsity=0.6, t=t), tiny_model(family))
    (start,) = seen["start"]
    for name, value in start.items():
        assert torch.equal(value, history[T][name] * masks.get(name, 1)), name
    assert seen["states"] == [0]
    assert seen["rates"] == [[(i, 1e-2 * lr_factor(i, SETTINGS)) for i in range(T - t, T)]]
    assert set(seen["zeros"]) == {sum(int((~mask).sum()) for mask in masks.values())}


def test_replaying_nothing_only_prunes():
    trained, _ = _dense_run()
    masks = _global_masks(trained, 0.6)
    model = tiny_model("llama")
    context = _context(model)
    lr_rewind.METHOD.transform(model, LrRewindOptions(sparsity=0.6, t=0), context)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, trained.get_parameter(name) * masks.get(name, 1))
    assert context.trained_steps == T


@pytest.mark.parametrize("method", [lottery_rewind, lr_rewind])
def test_cycles_prune_an_even_share_and_nothing_comes_back(monkeypatch, method):
    masks, change = [], HeldMasks.change

    def watched(self, new):
        change(self, new)
        masks.append({name: mask.clone() for name, mask in self.masks.items()})

    monkeypatch.setattr(HeldMasks, "change", watched)
    assert even_cycles(1 - 0.8**3, 3) == pytest.approx([0.2, 0.36, 0.488])
    options = method.METHOD.options.parse({"sparsity": 0.75, "cycles": 2})
    seen, context = _watched(method.METHOD, options, tiny_model("llama"))
    shares = [
        sum(int((~mask).sum()) for mask in each.values()) / sum(mask.numel() for mask in each.values())
        for each in masks[1:]
    ]
    assert shares == pytest.approx([0.5, 0.75], abs=1e-5)
    assert not any((masks[2][name] & ~keep).any() for name, keep in masks[1].items())
    assert len(seen["start"]) == 2
    assert len({record.metric for record in context.records}) == len(context.records)


def test_the_controls_change_the_mask_or_the_weights_and_nothing_else():
    trained, history = _dense_run()
    masks = _global_masks(trained, 0.6)
    starts = {}
    for control in ("random-mask", "random-init"):
        options = LotteryOptions(sparsity=0.6, k=2, control=control)
        seen, _ = _watched(lottery_rewind.METHOD, options, tiny_model("llama"))
        (starts[control],) = seen["start"]
        assert seen["rates"] == [[(i, 1e-2 * lr_factor(i, SETTINGS)) for i in range(2, T)]]
    for name, mask in masks.items():
        random = starts["random-mask"][name] != 0
        assert int(random.sum()) == int(mask.sum())
        assert not torch.equal(random, mask)
        assert torch.equal(starts["random-mask"][name], history[2][name] * random)
        assert torch.equal(starts["random-init"][name] != 0, mask)
        assert not torch.equal(starts["random-init"][name], history[2][name] * mask)
        assert starts["random-init"][name][mask].std().item() == pytest.approx(0.02, rel=0.05)  # the family's


def test_random_masks_are_drawn_from_what_is_left():
    held = {"a": torch.rand(20, 20) < 0.5}
    masks = {"a": torch.zeros(20, 20, dtype=torch.bool)}
    masks["a"].view(-1)[:77] = True
    drawn = random_masks(masks, held, torch.Generator().manual_seed(0))["a"]
    assert int(drawn.sum()) == 77
    assert not (drawn & ~held["a"]).any()


def test_the_default_is_a_fiftieth_of_the_run_and_at_least_one_step():
    for steps, expected in ((3, 1), (100, 2)):
        model = tiny_model("llama", layers=1)
        settings = TrainSettings(steps=steps, lr=1e-3, batch_size=1, seq_len=4)
        context = _context(model, settings)
        lottery_rewind.METHOD.transform(model, LotteryOptions(), context)
        assert {record.metric: record.value for record in context.records}["rewound_to_step"] == expected


# --- what is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [lottery_rewind, lr_rewind])
def test_only_a_run_that_is_made_here_can_be_rewound(method):
    options = method.METHOD.options()
    assert method.METHOD.applies(describe(parse_model("scratch:llama-nano")).info, options) is None
    for name in ("zoo:llama-6m", "zoo:opt-4m", "shape:llama-15m"):
        reason = method.METHOD.applies(describe(parse_model(name)).info, options)
        assert "use a scratch: model" in reason
        assert "\n" not in reason
    encoder = info_from_config(tiny_model("bert").config, "bert", scratch=True)
    assert "encoders" in method.METHOD.applies(encoder, options)


@pytest.mark.parametrize("method", [lottery_rewind, lr_rewind])
@pytest.mark.parametrize(
    ("bad", "text"),
    [
        ({"sparsity": 1.0}, "sparsity"),
        ({"cycles": 0}, "cycles"),
        ({"cycles": 51}, "cycles"),
        ({"sparsity": 0.995}, "sparsity=0.995 cannot be reached"),
        ({"steps": 0}, "steps"),
        ({"scope": "block"}, "scope"),
        ({"control": "none at all", "t": -1}, "control|t"),
    ],
)
def test_bad_options_are_named(method, bad, text):
    with pytest.raises(ConfigError, match=text) as caught:
        method.METHOD.options.parse(bad)
    assert "\n" not in str(caught.value)


def test_steps_outside_the_run_are_refused_before_it_begins():
    with pytest.raises(ConfigError, match="k=8 must be before the end of the run of 8 steps"):
        LotteryOptions.parse({"k": 8, "steps": 8})
    with pytest.raises(ConfigError, match="t=9 is more than the run has, 8 steps"):
        LrRewindOptions.parse({"t": 9, "steps": 8})
    model = tiny_model("llama")
    before = _values(model)
    for method, options, text in (
        (lottery_rewind, LotteryOptions(k=8), "k=8 must be before"),
        (lr_rewind, LrRewindOptions(t=9), "t=9 is more than"),
    ):
        with pytest.raises(ConfigError, match=text):
            method.METHOD.transform(model, options, _context(model))
        with pytest.raises(ConfigError, match="needs at least 1 step"):
            method.METHOD.transform(model, method.METHOD.options(), _context(model, TrainSettings(steps=0)))
        with pytest.raises(ConfigError, match="the text has 5 tokens"):
            method.METHOD.transform(model, method.METHOD.options(), _context(model, tokens=torch.arange(5)))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
