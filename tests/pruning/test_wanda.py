"""Wanda against brute force and a plain reference over whole models."""

from __future__ import annotations

import itertools

import pytest
import torch
from harness_plugins.pruning import magnitude_prune
from harness_plugins.pruning.wanda import METHOD, WandaOptions, wanda_keep

from harness.errors import ConfigError, NotApplicable, NumericalFailure
from harness.measure.effect import measure_effect, snapshot
from harness.models.info import info_from_config
from harness.nn.anatomy import blocks_of
from harness.nn.magnitude import count_of, keep_largest_of_rows
from harness.nn.outliers import inject_outliers
from harness.nn.surgery import block_linears
from harness.testing import make_context, tiny_model
from tests.zoo_models import training_tokens, zoo_model


def _apply(model, **options):
    context = make_context(model, calibration_samples=6, calibration_len=24)
    METHOD.transform(model, WandaOptions.parse(options), context)
    return context


def _masks(model) -> dict[str, torch.Tensor]:
    return {name: linear.weight != 0 for name, linear in block_linears(model)}


def _error(weight: torch.Tensor, keep: torch.Tensor, x: torch.Tensor) -> float:
    return float((x @ (weight * ~keep).T).square().sum())


# --- the core ---------------------------------------------------------------------------------------


def test_with_uncorrelated_inputs_no_mask_of_a_row_is_better():
    """All C(8, 4) = 70 masks of each row, with a diagonal second moment."""
    generator = torch.Generator().manual_seed(0)
    weight, norms = torch.randn(16, 8, generator=generator), torch.rand(8, generator=generator) + 0.1
    losses = (weight * norms).square()
    keep = wanda_keep(weight, norms)
    for row, kept in zip(losses, keep, strict=True):
        best = min(float(row[list(gone)].sum()) for gone in itertools.combinations(range(8), 4))
        assert float(row[~kept].sum()) == pytest.approx(best)
        assert int(kept.sum()) == 4


def test_equal_norms_are_magnitude_within_rows():
    weight = torch.randn(12, 30, generator=torch.Generator().manual_seed(1))
    keep = wanda_keep(weight, torch.full((30,), 3.0), sparsity=0.3)
    assert torch.equal(keep, keep_largest_of_rows(weight, 9))


def test_loud_channels_are_where_it_gains():
    """4 of 256 inputs 20 times as loud; with equally loud inputs it is no better than magnitude."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(256, 256, generator=generator)
    white = torch.randn(4096, 256, generator=generator)
    loud = white.clone()
    loud[:, [3, 77, 150, 201]] *= 20
    ratios = {}
    for name, x in (("white", white), ("loud", loud)):
        wanda, magnitude = wanda_keep(weight, x.norm(dim=0)), keep_largest_of_rows(weight, 128)
        ratios[name] = _error(weight, wanda, x) / _error(weight, magnitude, x)
    assert ratios["loud"] <= 0.3
    assert ratios["white"] == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8)])
def test_groups_compete_by_score(n, m):
    weight, norms = torch.randn(5, 16), torch.rand(16) + 0.1
    scores = weight.abs() * norms
    keep = wanda_keep(weight, norms, n=n, m=m)
    for group, kept in zip(scores.view(-1, m), keep.view(-1, m), strict=True):
        assert kept.sum() == n
        assert group[kept].min() >= group[~kept].max()


@pytest.mark.parametrize("spoilt", ["weight", "norms"])
def test_what_is_not_finite_is_refused(spoilt):
    tensors = {"weight": torch.ones(4, 8), "norms": torch.ones(8)}
    tensors[spoilt].view(-1)[3] = float("nan")
    with pytest.raises(NumericalFailure, match="NaN"):
        wanda_keep(**tensors)


# --- whole models -----------------------------------------------------------------------------------


def _squares(model, linears, tokens) -> dict[str, torch.Tensor]:
    """Sums of squares of the inputs of layers, by whole forward passes."""
    squares = dict.fromkeys(linears, torch.zeros((), dtype=torch.float64))

    def hook_of(name):
        def hook(_module, args):
            x = args[0].double()
            squares[name] = squares[name] + x.reshape(-1, x.shape[-1]).square().sum(0)

        return hook

    hooks = [linear.register_forward_pre_hook(hook_of(name)) for name, linear in linears.items()]
    with torch.no_grad():
        for batch in tokens.split(8):
            model(input_ids=batch)
    for hook in hooks:
        hook.remove()
    return squares


def _reference(model, tokens, options) -> None:
    """Wanda block after block, its masks by sorting in Python."""
    for _, block in blocks_of(model):
        linears = {n: m for n, m in block.named_modules() if isinstance(m, torch.nn.Linear)}
        for name, squares in _squares(model, linears, tokens).items():
            weight = linears[name].weight.data
            scores = weight.abs() * squares.sqrt().float()
            group = options.m or scores.shape[1]
            pruned = group - options.n if options.n else count_of(options.sparsity, group)
            for row, values in zip(weight, scores.tolist(), strict=True):
                for start in range(0, len(row), group):
                    places = sorted((values[i], i) for i in range(start, start + group))
                    row[[place for _, place in places[:pruned]]] = 0


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "bert", "encoder"])
@pytest.mark.parametrize("values", [{"sparsity": 0.4}, {"n": 2, "m": 4, "backend": "dense"}])
def test_it_is_the_plain_reference(family, values):
    model, original, expected = (tiny_model(family) for _ in range(3))
    options = WandaOptions.parse(values)
    context = make_context(model, calibration_samples=6, calibration_len=24)
    METHOD.transform(model, options, context)
    _reference(expected, context.calibration(), options)
    ours, theirs = _masks(model), _masks(expected)
    # Norms are added up in another order, which may turn one near-tie or two.
    assert sum(int((ours[name] != theirs[name]).sum()) for name in theirs) <= 4
    for name, before in block_linears(original):  # survivors are untouched
        assert torch.equal(model.get_submodule(name).weight, before.weight * ours[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_the_share_is_exact_in_every_row(family, dtype):
    model = tiny_model(family).to(dtype)
    context = _apply(model, sparsity=0.37)
    for _, linear in block_linears(model):
        assert linear.weight.dtype == dtype
        assert ((linear.weight == 0).sum(1) == count_of(0.37, linear.in_features)).all()
    recorded = {record.metric: record.value for record in context.records}
    assert recorded["pruned_share_of_targets"] == pytest.approx(0.37, abs=0.01)
    places = sum(linear.weight.numel() for _, linear in block_linears(model))
    width = 2 if dtype == torch.bfloat16 else 4
    assert recorded["bitmap_bytes"] == pytest.approx(places * (1 / 8 + 0.63 * width), rel=0.01)


def test_a_pattern_is_seen_by_the_effect():
    model = tiny_model("llama")
    before = snapshot(model)
    names = list(dict(block_linears(model)))
    _apply(model, n=2, m=4)
    effects = [effect for effect in measure_effect(before, model).effects if effect.changed]
    assert {effect.nm_pattern for effect in effects} == {"2:4"}
    assert len(effects) == len(names)


@pytest.mark.parametrize("name", ["llama-6m", "opt-4m"])
def test_planted_outliers_change_no_mask(name):
    """Outliers behind the norms multiply a channel and divide the weights that read it: scores are the
    same to the bit. What magnitude would prune does change."""
    models = {"plain": zoo_model(name), "planted": inject_outliers(zoo_model(name), k=64, channels=4)}
    weighed = {}
    for key, model in models.items():
        rows = {n: keep_largest_of_rows(lin.weight, lin.in_features // 2) for n, lin in block_linears(model)}
        context = make_context(model, tokens=training_tokens(), calibration_samples=4, calibration_len=64)
        METHOD.transform(model, WandaOptions(), context)
        weighed[key] = (_masks(model), rows)
    (plain, rows), (planted, other_rows) = weighed["plain"], weighed["planted"]
    assert all(torch.equal(plain[layer], planted[layer]) for layer in plain)
    assert any(not torch.equal(rows[layer], other_rows[layer]) for layer in rows)


def test_targets_and_no_sparsity():
    model, original = tiny_model("llama"), tiny_model("llama")
    _apply(model, targets=r"layers\.1\.mlp")
    for (name, linear), (_, before) in zip(block_linears(model), block_linears(original), strict=True):
        assert torch.equal(linear.weight, before.weight) == ("layers.1.mlp" not in name)
    model = tiny_model("opt")
    _apply(model, sparsity=0)
    for name, parameter in tiny_model("opt").named_parameters():
        assert torch.equal(parameter, model.get_parameter(name))


# --- what is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sparsity": 1.0}, "sparsity"),
        ({"sparsity": -0.1}, "sparsity"),
        ({"n": 5, "m": 4}, "n must be below m"),
        ({"n": 4, "m": 4}, "n must be below m"),
        ({"n": 0, "m": 4}, "n"),
        ({"n": 2}, "n and m together"),
        ({"m": 4}, "n and m together"),
        ({"n": 1, "m": 4, "sparsity": 0.5}, "not both"),
        ({"steps": 3}, "unknown option"),
    ],
)
def test_options_that_make_no_sense(values, message):
    with pytest.raises(ConfigError, match=message):
        WandaOptions.parse(values)


def test_a_pattern_implies_the_sparsity():
    options = WandaOptions.parse({"n": "1", "m": "4"})
    assert (options.n, options.m, options.sparsity) == (1, 4, 0.75)
    assert WandaOptions.parse(options.canonical()) == options
    assert options.non_default() == {"n": 1, "m": 4}
    assert WandaOptions.parse({"sparsity_ratio": 0.6}).non_default() == {"sparsity": 0.6}


def test_models_that_do_not_fit():
    info = info_from_config(tiny_model("llama").config, "tiny")
    assert METHOD.applies(info, WandaOptions()) is None
    assert METHOD.applies(info, WandaOptions(n=3, m=6, sparsity=0.5)) == (
        "groups of 6 do not divide the hidden size 128"
    )
    model, untouched = tiny_model("llama"), tiny_model("llama")
    with pytest.raises(NotApplicable, match=r"groups of 6 do not divide the 128 input columns of model"):
        _apply(model, n=3, m=6)
    with pytest.raises(NotApplicable, match="groups of 512"):
        _apply(model, n=4, m=512)
    for name, parameter in untouched.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name))
    scratch = info_from_config(model.config, "tiny", scratch=True)
    assert "scratch" in METHOD.applies(scratch, WandaOptions())


def test_missing_and_broken_calibration():
    model = tiny_model("llama")
    context = make_context(model)
    context.calibration_batches = lambda *_args, **_kwargs: []
    with pytest.raises(ConfigError, match=r"q_proj: no calibration tokens"):
        METHOD.transform(model, WandaOptions(), context)
    model.model.embed_tokens.weight.data[:] = float("nan")
    with pytest.raises(NumericalFailure, match=r"q_proj: calibration activations are NaN"):
        _apply(model)
    model = tiny_model("opt")
    model.model.decoder.layers[1].fc1.weight.data[0, 0] = float("inf")
    with pytest.raises(NumericalFailure, match=r"layers\.1\.fc1: weights are NaN"):
        _apply(model)


def test_magnitude_and_wanda_report_the_same_figures():
    recorded = []
    for method in (METHOD, magnitude_prune.METHOD):
        model = tiny_model("llama")
        context = make_context(model, calibration_samples=2, calibration_len=16)
        method.transform(model, method.options.parse({"sparsity": 0.5}), context)
        recorded.append({record.metric: record.value for record in context.records})
    assert recorded[0] == recorded[1]
