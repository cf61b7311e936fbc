"""SparseGPT against the plain equations, brute force and its own accounting; then whole models."""

from __future__ import annotations

import itertools

import pytest
import torch
from harness_plugins.pruning.sparsegpt import METHOD, SparseGptOptions, sparsegpt_prune

from harness.errors import ConfigError, NotApplicable, NumericalFailure
from harness.measure.effect import measure_effect, snapshot
from harness.models.info import info_from_config
from harness.nn.hessian import output_error
from harness.nn.magnitude import count_of, keep_largest
from harness.nn.n_of_m import keep_n_of_m
from harness.nn.quantized import QuantizedLinear
from harness.nn.quantizer import group_grid, quantize_weight
from harness.nn.surgery import block_linears
from harness.testing import make_context, tiny_model

FORMS = [
    {"sparsity": 0.5},
    {"sparsity": 0.3, "block_size": 32},
    {"n": 2, "m": 4},
    {"n": 1, "m": 8, "block_size": 20},
    {"sparsity": 0.5, "bits": 4, "group_size": 16},
    {"sparsity": 0.4, "bits": 3, "sym": True},
    {"sparsity": 0.5, "bits": 4, "group_size": 72, "block_size": 48},
    {"n": 2, "m": 4, "bits": 3, "group_size": 16},
]


def _matrix(out: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 + seed)
    return torch.randn(out, columns, generator=generator, dtype=torch.float64)


def _correlated(columns: int, *, decay: float, seed: int = 0, tokens: int = 0) -> torch.Tensor:
    """The second moment of inputs whose eigenvalues fall as ``i^-decay``, float64."""
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(columns, columns, generator=generator, dtype=torch.float64))
    spectrum = torch.arange(1, columns + 1, dtype=torch.float64) ** -decay
    x = torch.randn(tokens or 4 * columns, columns, generator=generator, dtype=torch.float64)
    x = x * spectrum.sqrt() @ basis.T
    return x.T @ x / len(x)


def _damped(hessian: torch.Tensor, damp: float = 0.01) -> torch.Tensor:
    return hessian + damp * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=hessian.dtype)


def _plain(weight: torch.Tensor, hessian: torch.Tensor, *, block: int, sparsity=0.5, n=None, m=None):
    """SparseGPT by explicit inverses: the cost of a weight and the answer of the weights after it are
    read off the inverse of what is left of the Hessian, computed afresh for every column."""
    weight, hessian = weight.clone(), _damped(hessian)
    out, columns = weight.shape
    keep = torch.ones_like(weight, dtype=torch.bool)
    inverses = [torch.linalg.inv(hessian[j:, j:]) for j in range(columns)]
    costs = torch.stack([inverse[0, 0] for inverse in inverses])
    for j in range(columns):
        if m is None and j % block == 0:
            end = min(j + block, columns)
            scores = (weight[:, j:end].square() / costs[j:end]).flatten()
            pruned = count_of(sparsity, out * end) - count_of(sparsity, out * j)
            gone = sorted(range(len(scores)), key=lambda place: (float(scores[place]), place))[:pruned]
            flat = torch.ones(len(scores), dtype=torch.bool)
            flat[gone] = False
            keep[:, j:end] = flat.view(out, -1)
        if m is not None and j % m == 0:
            keep[:, j : j + m] = keep_n_of_m(weight[:, j : j + m].square() / costs[j : j + m], n, m)
        lost = weight[:, j] * ~keep[:, j]
        weight[:, j:] -= torch.outer(lost / costs[j], inverses[j][0])
        weight[:, j] *= keep[:, j]  # what is left of it is rounding
    return weight, keep


# --- the core ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form", [{"block": 16, "sparsity": 0.5}, {"block": 48, "sparsity": 0.7}, {"block": 16, "n": 2, "m": 4}]
)
def test_it_is_what_the_equations_say(form):
    weight, hessian = _matrix(12, 48), _correlated(48, decay=1)
    expected, keep = _plain(weight, hessian, **form)
    options = dict(form)
    result = sparsegpt_prune(weight, hessian, block_size=options.pop("block"), **options)
    assert torch.equal(result.keep, keep)
    torch.testing.assert_close(result.weight, expected, rtol=0, atol=1e-10)
    assert bool((result.weight[~keep] == 0).all())


@pytest.mark.parametrize("form", FORMS)
def test_the_errors_add_up_to_the_damped_output_error(form):
    weight, hessian = _matrix(24, 144), _correlated(144, decay=1)
    result = sparsegpt_prune(weight, hessian, **form)
    assert result.loss == pytest.approx(output_error(weight - result.weight, _damped(hessian)), rel=1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_the_share_is_exact(form):
    weight = _matrix(24, 144)
    result = sparsegpt_prune(weight, _correlated(144, decay=1), **form)
    assert bool((result.weight[~result.keep] == 0).all())
    if "m" in form:
        assert (result.keep.view(-1, form["m"]).sum(1) == form["n"]).all()
    else:
        assert int((~result.keep).sum()) == count_of(form["sparsity"], 24 * 144)
    if "bits" in form:
        assert torch.equal(result.quantized.dequantize(torch.float64), result.weight)
        assert result.quantized.group_size == form.get("group_size", -1)


def test_patterns_do_not_depend_on_the_block_size():
    weight, hessian = _matrix(16, 64), _correlated(64, decay=1)
    results = [
        sparsegpt_prune(weight, hessian, n=2, m=4, block_size=size, bits=bits, group_size=16)
        for bits in (16, 4)
        for size in (1, 4, 20, 64, 500)
    ]
    for results_of_bits in (results[:5], results[5:]):
        for other in results_of_bits[1:]:
            torch.testing.assert_close(other.weight, results_of_bits[0].weight, rtol=0, atol=1e-10)


def test_no_sparsity_changes_no_bit():
    for dtype in (torch.float32, torch.float64):
        weight, hessian = _matrix(8, 64).to(dtype), _correlated(64, decay=1)
        hessian[5], hessian[:, 5] = 0, 0
        result = sparsegpt_prune(weight, hessian, sparsity=0)
        assert torch.equal(result.weight, weight)
        assert result.loss == 0


def test_without_correlations_it_is_magnitude_in_each_block():
    weight = _matrix(16, 64)
    result = sparsegpt_prune(weight, 2.5 * torch.eye(64, dtype=torch.float64), block_size=16, sparsity=0.4)
    for start in range(0, 64, 16):
        block = weight[:, start : start + 16]
        pruned = count_of(0.4, 16 * (start + 16)) - count_of(0.4, 16 * start)
        assert torch.equal(result.keep[:, start : start + 16], keep_largest([block], pruned)[0])
    assert torch.equal(result.weight, weight * result.keep)


def test_it_lies_between_magnitude_and_the_optimum():
    """All 20 masks of half of a row of 6, each with its own least-squares answer; 100 draws."""
    generator = torch.Generator().manual_seed(0)
    sums = {"best": 0.0, "sparsegpt": 0.0, "magnitude": 0.0}
    for draw in range(100):
        x = torch.randn(64, 6, generator=generator, dtype=torch.float64)
        x = x @ torch.randn(6, 6, generator=generator, dtype=torch.float64)
        hessian, weight = x.T @ x / 64, _matrix(1, 6, seed=draw)
        metric, losses = _damped(hessian), []
        for kept in itertools.combinations(range(6), 3):
            gone = [place for place in range(6) if place not in kept]
            rest = list(kept)
            refit = weight.clone()
            refit[0, rest] += torch.linalg.solve(
                metric[rest][:, rest], metric[rest][:, gone] @ weight[0, gone]
            )
            refit[0, gone] = 0
            losses.append(output_error(weight - refit, metric))
        result = sparsegpt_prune(weight, hessian)
        assert result.loss >= min(losses) * (1 - 1e-9)
        magnitude = weight * keep_largest([weight], 3)[0]
        sums["best"] += min(losses)
        sums["sparsegpt"] += result.loss
        sums["magnitude"] += output_error(weight - magnitude, metric)
    assert sums["best"] < sums["sparsegpt"] < 0.65 * sums["magnitude"]


@pytest.mark.parametrize(("form", "most"), [({"sparsity": 0.5}, 0.65), ({"n": 2, "m": 4}, 0.6)])
def test_correlated_inputs_are_where_it_gains(form, most):
    weight, hessian = _matrix(256, 256), _correlated(256, decay=1, tokens=8192)
    result = sparsegpt_prune(weight, hessian, **form)
    keep = keep_n_of_m(weight.abs(), 2, 4) if "m" in form else keep_largest([weight], weight.numel() // 2)[0]
    ratio = output_error(weight - result.weight, hessian) / output_error(weight * ~keep, hessian)
    assert 0.2 < ratio <= most


def test_rounding_in_the_same_pass_beats_rounding_afterwards():
    weight, hessian = _matrix(64, 128), _correlated(128, decay=1)
    joint = sparsegpt_prune(weight, hessian, bits=3)
    pruned = sparsegpt_prune(weight, hessian)
    after = quantize_weight(pruned.weight, bits=3, sym=False).dequantize(torch.float64)
    metric = _damped(hessian)
    assert output_error(weight - joint.weight, metric) < 0.9 * output_error(weight - after, metric)
    grid = group_grid(weight, bits=3, sym=False, group_size=-1)
    torch.testing.assert_close(grid.round(joint.weight), joint.weight, rtol=0, atol=1e-12)


def test_columns_without_input_go_first_and_cost_nothing():
    weight, hessian = _matrix(8, 32), _correlated(32, decay=1)
    hessian[5], hessian[:, 5] = 0, 0
    weight[:, 5] = 100
    result = sparsegpt_prune(weight, hessian, sparsity=0.25)
    assert bool((result.weight[:, 5] == 0).all())
    live = [place for place in range(32) if place != 5]
    difference = (weight - result.weight)[:, live]
    filled = hessian.clone()
    filled[5, 5] = 1
    assert result.loss == pytest.approx(output_error(difference, _damped(filled)[live][:, live]), rel=1e-9)


def test_what_is_not_finite_is_refused():
    weight, hessian = _matrix(4, 8), _correlated(8, decay=1)
    spoilt = weight.clone()
    spoilt[0, 0] = float("nan")
    with pytest.raises(NumericalFailure, match="weights"):
        sparsegpt_prune(spoilt, hessian)
    spoilt = hessian.clone()
    spoilt[2, 2] = float("inf")
    with pytest.raises(NumericalFailure, match="Hessian"):
        sparsegpt_prune(weight, spoilt)
    with pytest.raises(ConfigError, match="damp"):
        sparsegpt_prune(weight, hessian, damp=0)
    with pytest.raises(ConfigError, match="groups of 6"):
        sparsegpt_prune(weight, hessian, n=3, m=6)
    with pytest.raises(ConfigError, match="group_size=6"):
        sparsegpt_prune(weight, hessian, n=2, m=4, bits=4, group_size=6)


# --- whole models -----------------------------------------------------------------------------------


def _apply(model, **options):
    context = make_context(model, calibration_samples=6, calibration_len=24)
    METHOD.transform(model, SparseGptOptions.parse(options), context)
    return context


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "bert", "encoder"])
def test_every_layer_is_pruned_and_nothing_else(family, dtype):
    model, original = tiny_model(family).to(dtype), tiny_model(family).to(dtype)
    context = _apply(model, sparsity=0.4)
    layers = dict(block_linears(original))
    for name, linear in block_linears(model):
        # Exact in number but for survivors that happen to be zero.
        zeros = int((linear.weight == 0).sum())
        assert count_of(0.4, linear.weight.numel()) <= zeros <= count_of(0.4, linear.weight.numel()) + 3
        assert linear.weight.dtype == dtype
        assert not torch.equal(linear.weight, layers[name].weight * (linear.weight != 0))  # and corrected
    weights = {f"{name}.weight" for name in layers}
    for name, parameter in original.named_parameters():
        if name not in weights:
            assert torch.equal(parameter, model.get_parameter(name))
    recorded = {record.metric: record.value for record in context.records}
    assert recorded["pruned_share_of_targets"] == pytest.approx(0.4, abs=1e-3)
    assert 0 < recorded["sparsegpt_relative_error"] < 0.4


def test_the_last_layer_sees_what_pruned_layers_before_it_give():
    """The reference for one layer: inputs by a whole forward pass of the model pruned up to it."""
    model = tiny_model("llama")
    last = "model.layers.1.mlp.down_proj"
    original = model.get_submodule(last).weight.detach().clone()
    context = make_context(model, calibration_samples=16, calibration_len=24)
    METHOD.transform(model, SparseGptOptions(), context)
    seen = []
    handle = model.get_submodule(last).register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    with torch.no_grad():
        model(input_ids=context.calibration())
    handle.remove()
    x = seen[0].reshape(-1, original.shape[1]).double()
    expected = sparsegpt_prune(original.double(), x.T @ x / len(x))
    pruned = model.get_submodule(last).weight.detach()
    assert float(((pruned != 0) == expected.keep).float().mean()) > 0.999
    assert float((pruned - expected.weight).norm() / expected.weight.norm()) < 0.02


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_joint_rounding_is_stored_packed_with_its_zeros(family):
    model = tiny_model(family)
    before = snapshot(model)
    context = _apply(model, n=2, m=4, bits=4, group_size=32)
    packed = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    assert len(packed) == len(dict(block_linears(tiny_model(family))))
    for layer in packed:
        kept = (layer.dequantize() != 0).reshape(-1, 4).sum(1)
        assert int(kept.max()) <= 2
        assert float(kept.float().mean()) > 1.7  # some survivors round to zero
    effect = measure_effect(before, model)
    changed = [each for each in effect.effects if each.changed]
    assert sum(each.bytes_after for each in changed) < 0.25 * sum(each.bytes_before for each in changed)
    recorded = {record.metric: record.value for record in context.records}
    places = sum(layer.in_features * layer.out_features for layer in packed)
    assert recorded["bitmap_bytes"] == pytest.approx(places * (1 + 0.5 * 4) / 8)


def test_steps_inside_a_block_see_each_other():
    models = [tiny_model("llama") for _ in range(2)]
    for model, stepwise in zip(models, (True, False), strict=True):
        _apply(model, true_sequential=stepwise)
    layers = [model.model.layers[0] for model in models]
    assert torch.equal(*(layer.self_attn.q_proj.weight for layer in layers))
    assert not torch.equal(*(layer.mlp.down_proj.weight for layer in layers))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sparsity": 1.0}, "sparsity"),
        ({"n": 5, "m": 4}, "n must be below m"),
        ({"m": 4}, "n and m together"),
        ({"damp": 0}, "damp"),
        ({"bits": 5}, "bits"),
        ({"block_size": 0}, "block_size"),
        ({"group_size": 0, "bits": 4}, "group_size"),
        ({"group_size": 6, "bits": 4, "n": 2, "m": 4}, "does not divide group_size"),
    ],
)
def test_options_that_make_no_sense(values, message):
    with pytest.raises(ConfigError, match=message):
        SparseGptOptions.parse(values)


def test_usual_names_are_understood():
    parsed = SparseGptOptions.parse({"wbits": "4", "percdamp": 0.05, "groupsize": 64, "sparsity_ratio": 0.3})
    assert (parsed.bits, parsed.damp, parsed.group_size, parsed.sparsity) == (4, 0.05, 64, 0.3)


def test_models_that_do_not_fit():
    info = info_from_config(tiny_model("llama").config, "tiny")
    assert METHOD.applies(info, SparseGptOptions()) is None
    assert "groups of 6" in METHOD.applies(info, SparseGptOptions(n=3, m=6, sparsity=0.5))
    assert "group_size 96" in METHOD.applies(info, SparseGptOptions(bits=4, group_size=96))
    for options, message in (
        ({"n": 3, "m": 6}, "groups of 6 do not divide the 128"),
        ({"bits": 4, "group_size": 96}, "group_size 96 does not divide the 128 columns of model"),
        ({"targets": "nowhere"}, "nowhere"),
    ):
        model, untouched = tiny_model("llama"), tiny_model("llama")
        with pytest.raises((NotApplicable, ConfigError), match=message):
            _apply(model, **options)
        for name, parameter in untouched.named_parameters():
            assert torch.equal(parameter, model.get_parameter(name))
    _apply(model := tiny_model("llama"), bits=4)
    with pytest.raises(NotApplicable, match="quantized already"):
        _apply(model)


def test_missing_and_broken_calibration():
    model = tiny_model("llama")
    context = make_context(model)
    context.calibration_batches = lambda *_args, **_kwargs: []
    with pytest.raises(ConfigError, match=r"q_proj: no calibration tokens"):
        METHOD.transform(model, SparseGptOptions(), context)
    model.model.embed_tokens.weight.data[:] = float("nan")
    with pytest.raises(NumericalFailure, match=r"q_proj: calibration activations are NaN"):
        _apply(model)
    model = tiny_model("opt")
    model.model.decoder.layers[1].fc1.weight.data[0, 0] = float("inf")
    with pytest.raises(NumericalFailure, match=r"layers\.1\.fc1: weights are NaN"):
        _apply(model)
