"""GPTQ against OBQ, brute force and its own accounting; then the method on whole models."""

from __future__ import annotations

import itertools

import pytest
import torch
from harness_plugins.quantization import _gptq
from harness_plugins.quantization._gptq import (
    Factor,
    Rounding,
    _round_columns,
    factorise,
    quantize_stack,
)
from harness_plugins.quantization.gptq import METHOD, gptq_quantize
from torch.utils._python_dispatch import TorchDispatchMode

from harness.errors import ConfigError, NotApplicable, NumericalFailure
from harness.kernels import gptq as kernels
from harness.models.info import info_from_config
from harness.nn.anatomy import anatomy_of, blocks_of
from harness.nn.hessian import inverse_root, output_error
from harness.nn.quantized import QuantizedLinear
from harness.nn.quantizer import Grid, group_grid, quantize_weight
from harness.nn.surgery import block_linears
from harness.testing.making import make_context
from harness.testing.models import tiny_model
from tests.quantization.obq import damped, obq


def correlated(columns: int, *, decay: float, seed: int = 0, tokens: int = 0) -> torch.Tensor:
    """The second moment of inputs whose eigenvalues fall as ``i^-decay``, float64."""
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(columns, columns, generator=generator, dtype=torch.float64))
    spectrum = torch.arange(1, columns + 1, dtype=torch.float64) ** -decay
    x = torch.randn(tokens or 4 * columns, columns, generator=generator, dtype=torch.float64)
    x = x * spectrum.sqrt() @ basis.T
    return x.T @ x / len(x)


def matrix(out: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 + seed)
    return torch.randn(out, columns, generator=generator, dtype=torch.float64)


def error(weight: torch.Tensor, quantized, hessian: torch.Tensor, damp: float = 0.01) -> float:
    return output_error(weight - quantized.dequantize(torch.float64), damped(hessian, damp))


FORMS = [
    {"bits": 4},
    {"bits": 3, "sym": True},
    {"bits": 2, "act_order": True},
    {"bits": 4, "group_size": 16},
    {"bits": 3, "group_size": 24},  # blocks of 64 and 128 straddle group starts
    {"bits": 2, "group_size": 16, "act_order": True},
    {"bits": 2, "group_size": 16, "act_order": True, "static_groups": True},
    {"bits": 3, "group_size": 16, "clip": "mse"},
    {"bits": 2, "clip": "mse", "act_order": True},
]


# --- the core, exactly --------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_the_errors_add_up_to_the_damped_output_error(form):
    weight, hessian = matrix(24, 144), correlated(144, decay=1)
    result = gptq_quantize(weight, hessian, **form)
    assert result.loss == pytest.approx(error(weight, result.quantized, hessian), rel=1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_the_block_size_changes_nothing(form):
    weight, hessian = matrix(24, 144), correlated(144, decay=1)
    results = [gptq_quantize(weight, hessian, block_size=size, **form) for size in (1, 64, 128, 1000)]
    for other in results[1:]:
        assert torch.equal(other.quantized.codes, results[0].quantized.codes)
        assert torch.equal(other.quantized.scale, results[0].quantized.scale)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("sym", [True, False])
def test_it_is_obq_in_the_given_order(bits, sym):
    weight, hessian = matrix(8, 48), correlated(48, decay=1)
    quantized = gptq_quantize(weight, hessian, bits=bits, sym=sym).quantized
    reference = obq(weight, hessian, group_grid(weight, bits=bits, sym=sym, group_size=-1), greedy=False)
    torch.testing.assert_close(quantized.dequantize(torch.float64), reference, rtol=0, atol=1e-12)


@pytest.mark.parametrize("decay", [0.5, 1.0])
def test_greedy_obq_is_no_worse(decay):
    weight, hessian = matrix(32, 64), correlated(64, decay=decay)
    grid = group_grid(weight, bits=3, sym=False, group_size=-1)
    greedy = output_error(weight - obq(weight, hessian, grid, greedy=True), damped(hessian, 0.01))
    fixed = error(weight, gptq_quantize(weight, hessian, bits=3).quantized, hessian)
    assert greedy <= fixed


@pytest.mark.parametrize("group_size", [-1, 16])
def test_without_correlations_it_is_rounding(group_size):
    weight = matrix(16, 64)
    quantized = gptq_quantize(
        weight, 3.7 * torch.eye(64, dtype=torch.float64), bits=3, group_size=group_size
    ).quantized
    rounded = quantize_weight(weight, bits=3, group_size=group_size, sym=False)
    assert torch.equal(quantized.dequantize(), rounded.dequantize())


def test_it_lies_between_rounding_and_the_optimum():
    """All 4^6 quantized rows, 200 draws: never below the best, nearly always better than rounding."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.tensor(list(itertools.product(range(4), repeat=6)), dtype=torch.uint8)
    sums = {"best": 0.0, "gptq": 0.0, "rtn": 0.0}
    no_worse = 0
    for draw in range(200):
        mix = torch.randn(6, 6, generator=generator, dtype=torch.float64)
        x = torch.randn(64, 6, generator=generator, dtype=torch.float64) @ mix
        hessian, weight = x.T @ x / 64, matrix(1, 6, seed=draw)
        grid = group_grid(weight, bits=2, sym=False, group_size=-1)
        differences = grid.decode(codes, torch.float64) - weight
        best = float(((differences @ damped(hessian, 0.01)) * differences).sum(1).min())
        gptq = error(weight, gptq_quantize(weight, hessian, bits=2).quantized, hessian)
        rtn = error(weight, quantize_weight(weight, bits=2, sym=False), hessian)
        assert gptq >= best * (1 - 1e-9)
        no_worse += gptq <= rtn * (1 + 1e-9)
        sums = {"best": sums["best"] + best, "gptq": sums["gptq"] + gptq, "rtn": sums["rtn"] + rtn}
    assert sums["gptq"] / sums["rtn"] <= 0.95
    assert sums["best"] <= sums["gptq"]
    assert no_worse >= 0.85 * 200


def test_the_loss_is_bounded_where_nothing_is_clipped():
    """``E <= sum (s / 2)^2 / U_jj^2``: two uncorrelated columns of ±9 keep all others inside the range."""
    weight, hessian = matrix(16, 66), torch.eye(66, dtype=torch.float64)
    hessian[:64, :64] = correlated(64, decay=1)
    weight[:, 64], weight[:, 65] = 9, -9
    result = gptq_quantize(weight, hessian, bits=3)
    root, _ = inverse_root(hessian, 0.01)
    step = result.quantized.scale.double()
    bound = float((step**2 / 4 / root.diagonal() ** 2).sum())
    assert 0.1 * bound < result.loss <= bound


def held_obq(weight: torch.Tensor, keep: torch.Tensor, hessian: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Column after column by the inverse of what is left of the damped Hessian; zero outside `keep`."""
    rest, hessian = weight.clone(), damped(hessian, 0.01)
    for j in range(weight.shape[1]):
        inverse = torch.linalg.inv(hessian[j:, j:])
        new = grid.round(rest[:, j : j + 1])[:, 0] * keep[:, j]
        rest[:, j + 1 :] -= torch.outer((rest[:, j] - new) / inverse[0, 0], inverse[0, 1:])
        rest[:, j] = new
    return rest


@pytest.mark.parametrize("sym", [True, False])
def test_what_was_pruned_is_rounded_to_zero_and_made_up_for(sym):
    weight, hessian = matrix(8, 48), correlated(48, decay=1)
    keep = matrix(8, 48, seed=1) > 0
    pruned = weight * keep
    result = gptq_quantize(pruned, hessian, bits=3, sym=sym)
    grid = group_grid(pruned, bits=3, sym=sym, group_size=-1)
    expected = held_obq(pruned, keep, hessian, grid)
    assert bool((expected[keep] != 0).any())
    torch.testing.assert_close(result.quantized.dequantize(torch.float64), expected, rtol=0, atol=1e-12)
    assert result.loss < error(pruned, quantize_weight(pruned, bits=3, sym=sym), hessian)


@pytest.mark.parametrize("form", FORMS)
def test_zeros_stay_zero_and_the_errors_still_add_up(form):
    weight, hessian = matrix(24, 144), correlated(144, decay=1)
    weight = weight * (matrix(24, 144, seed=1).abs() > 0.7)
    results = [gptq_quantize(weight, hessian, block_size=size, **form) for size in (1, 64, 1000)]
    values = results[0].quantized.dequantize(torch.float64)
    assert bool((values[weight == 0] == 0).all())
    assert results[0].loss == pytest.approx(error(weight, results[0].quantized, hessian), rel=1e-9)
    assert all(torch.equal(other.quantized.codes, results[0].quantized.codes) for other in results[1:])


def test_beside_a_pruned_matrix_others_are_rounded_as_if_alone():
    weights, hessian = [matrix(8, 32, seed=seed) for seed in range(3)], correlated(32, decay=1)
    weights[1] = weights[1] * (weights[1].abs() > 1)
    weights[2][0, 0] = 0.0  # one zero is no pruning
    factor, rounding = factorise(hessian, damp=0.01), Rounding(bits=3)
    together = quantize_stack(weights, factor, rounding)
    for weight, result in zip(weights, together, strict=True):
        assert torch.equal(result.quantized.codes, gptq_quantize(weight, hessian, bits=3).quantized.codes)


@pytest.mark.parametrize("bits", [3, 4])
def test_correlated_inputs_are_where_it_gains(bits):
    weight = matrix(256, 256)
    rounded = quantize_weight(weight, bits=bits, sym=False)

    def ratio(decay: float, **options) -> float:
        hessian = correlated(256, decay=decay, tokens=8192)
        quantized = gptq_quantize(weight, hessian, bits=bits, **options).quantized
        return output_error(weight - quantized.dequantize(torch.float64), hessian) / output_error(
            weight - rounded.dequantize(torch.float64), hessian
        )

    plain = ratio(1.0)
    assert plain <= 0.55
    assert ratio(1.0, act_order=True) <= 1.05 * plain
    assert ratio(1.5) <= 0.25
    assert 0.93 <= ratio(0.0) <= 1.01  # white inputs: nothing to gain


@pytest.mark.parametrize("group_size", [-1, 32])
def test_clipping_lowers_the_loss_at_few_bits(group_size):
    weight, hessian = matrix(64, 128), correlated(128, decay=1)
    loss = {
        clip: gptq_quantize(weight, hessian, bits=2, group_size=group_size, clip=clip).loss
        for clip in ("absmax", "mse")
    }
    assert loss["mse"] < 0.85 * loss["absmax"]


def test_group_scales_follow_from_corrected_weights():
    weight, hessian = matrix(16, 64), correlated(64, decay=1)
    moving = gptq_quantize(weight, hessian, bits=3, group_size=16).quantized
    static = gptq_quantize(weight, hessian, bits=3, group_size=16, static_groups=True).quantized
    given = group_grid(weight, bits=3, group_size=16, sym=False)
    assert torch.equal(static.scale, given.scale)
    assert torch.equal(moving.scale[:, 0], given.scale[:, 0])  # nothing was corrected before
    assert not torch.equal(moving.scale[:, 3], given.scale[:, 3])


def test_an_order_is_stored_only_where_groups_follow_it():
    weight, hessian = matrix(8, 64), correlated(64, decay=1)
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    moving = gptq_quantize(weight, hessian, bits=4, group_size=16, act_order=True).quantized
    assert moving.order.tolist() == order.tolist()
    assert moving.order.dtype == torch.int32
    for options in ({"group_size": -1}, {"group_size": 16, "static_groups": True}):
        assert gptq_quantize(weight, hessian, bits=4, act_order=True, **options).quantized.order is None


def test_columns_without_input_become_zeros():
    weight, hessian = matrix(8, 32), correlated(32, decay=1)
    hessian[5], hessian[:, 5] = 0, 0
    result = gptq_quantize(weight, hessian, bits=4, group_size=16)
    assert bool((result.quantized.dequantize()[:, 5] == 0).all())
    assert bool(torch.isfinite(result.quantized.dequantize()).all())


def test_a_shorter_last_group():
    weight, hessian = matrix(8, 40), correlated(40, decay=1)
    quantized = gptq_quantize(weight, hessian, bits=4, group_size=16).quantized
    assert quantized.codes.shape == (8, 48)
    assert quantized.scale.shape == (8, 3)
    assert quantized.dequantize().shape == (8, 40)
    assert error(weight, quantized, hessian) < error(
        weight, quantize_weight(weight, bits=4, sym=False, group_size=16, pad=True), hessian
    )


def test_single_rows_and_columns():
    for out, columns in ((1, 1), (5, 1), (1, 9)):
        weight = matrix(out, columns)
        quantized = gptq_quantize(weight, torch.eye(columns, dtype=torch.float64), bits=4).quantized
        rounded = quantize_weight(weight, bits=4, sym=False)
        assert torch.equal(quantized.dequantize(), rounded.dequantize())


def test_what_is_not_finite_is_refused():
    weight, hessian = matrix(4, 8), correlated(8, decay=1)
    spoilt = weight.clone()
    spoilt[0, 0] = float("nan")
    with pytest.raises(NumericalFailure, match="weights"):
        gptq_quantize(spoilt, hessian, bits=4)
    spoilt = hessian.clone()
    spoilt[2, 2] = float("inf")
    with pytest.raises(NumericalFailure, match="Hessian"):
        gptq_quantize(weight, spoilt, bits=4)
    with pytest.raises(ConfigError, match="damp"):
        gptq_quantize(weight, hessian, bits=4, damp=0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_stack_of_matrices_is_each_of_them(form, dtype):
    """Layers that read the same input are quantized as one; one of them needs scales of the larger range."""
    hessian = correlated(144, decay=1).to(dtype)
    hessian[7], hessian[:, 7] = 0, 0
    weights = [matrix(out, 144, seed=out).to(dtype) for out in (24, 8, 40)]
    weights[1] *= 1e6
    rounding = {name: value for name, value in form.items() if name != "act_order"}
    factor = factorise(hessian, damp=0.01, act_order=form.get("act_order", False))
    stack = quantize_stack(weights, factor, Rounding(**rounding))
    for weight, result in zip(weights, stack, strict=True):
        alone = gptq_quantize(weight, hessian, **form)
        for name in ("codes", "scale", "zero", "order"):
            ours, expected = (getattr(each.quantized, name) for each in (result, alone))
            assert (ours is None) == (expected is None)
            assert ours is None or (ours.dtype == expected.dtype and torch.equal(ours, expected)), name
        assert result.loss == pytest.approx(alone.loss, rel=1e-6)
    assert [result.quantized.scale.dtype for result in stack] == [
        torch.float16,
        torch.bfloat16,
        torch.float16,
    ]


def on_meta(form, out: int, columns: int):
    """Arguments of `_round_columns` without values."""
    rounding = Rounding(**{name: value for name, value in form.items() if name != "act_order"})
    groups = 1 if rounding.group_size == -1 else -(-columns // rounding.group_size)
    with torch.device("meta"):
        order = torch.empty(columns, dtype=torch.int64) if form.get("act_order") else None
        factor = Factor(torch.empty(columns, columns), order, torch.empty(columns, dtype=torch.bool), 0.01)
        scale = torch.empty(out, groups, dtype=torch.float16)
        zero = None if rounding.sym else torch.empty(out, groups, dtype=torch.uint8)
        return torch.empty(out, columns), factor, rounding, scale, zero


@pytest.mark.parametrize("form", FORMS)
def test_no_value_is_read_inside_the_loops(form):
    """Tensors without values cannot be read: whatever would wait for a GPU raises here."""
    codes, losses = _round_columns(*on_meta(form, 24, 144))
    assert (codes.shape, losses.shape) == ((24, 144), (24,))
    with pytest.raises(RuntimeError, match="meta"):
        float(losses.sum())


def test_few_launches_for_a_block_of_columns(monkeypatch):
    """Besides the two kernels, some ten operators for 128 columns, whatever their number of rows."""
    launched = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if not func.is_view:
                launched.append(func.name())
            return func(*args, **(kwargs or {}))

    def columns_kernel(block, root, scale, zero, groups, bits, keep):
        return torch.empty_like(block, dtype=torch.uint8), torch.empty_like(block)

    def search_kernel(values, importance, factors, bits, sym, scale_dtype):
        shape = (*values.shape[:-1], 1)
        return Grid(
            bits, values.new_empty(shape, dtype=scale_dtype), values.new_empty(shape, dtype=torch.uint8)
        )

    monkeypatch.setattr(_gptq, "quantize_columns", columns_kernel)
    monkeypatch.setattr(kernels, "search_grid", search_kernel)
    arguments = on_meta({"bits": 4, "group_size": 128, "clip": "mse"}, 4096, 4096)
    with Count():
        _round_columns(*arguments)
    blocks = 4096 // 128
    assert launched.count("aten::addmm_") == blocks
    assert len(launched) <= 13 * blocks


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize(
    "form",
    [
        {"bits": 4, "group_size": 128, "clip": "mse"},
        {"bits": 3, "group_size": 64, "sym": True, "act_order": True},
        {"bits": 2, "group_size": 128, "static_groups": True, "act_order": True, "clip": "mse"},
        {"bits": 4, "clip": "mse"},
    ],
)
def test_on_cuda_nothing_waits_and_the_result_is_that_of_the_cpu(form):
    """Products of float32 matrices differ in their last bits, which tips a few codes to the next one."""
    weight, hessian = matrix(300, 512).float(), correlated(512, decay=1).float()
    expected = gptq_quantize(weight, hessian, **form)
    result = gptq_quantize(weight.cuda(), hessian.cuda(), **form)
    assert result.loss == pytest.approx(expected.loss, rel=1e-2)
    codes = result.quantized.codes.cpu().int() - expected.quantized.codes.int()
    assert float((codes != 0).float().mean()) < 0.02
    assert float((codes.abs() > 1).float().mean()) < 0.002

    # What waits: the checks of the given weights, before the columns, and reading the losses, after them.
    rounding = Rounding(**{name: value for name, value in form.items() if name != "act_order"})
    factor = factorise(hessian.cuda(), damp=0.01, act_order=form.get("act_order", False))
    stored = result.quantized
    scale, zero = stored.scale.clone(), None if stored.zero is None else stored.zero.clone()
    given = weight.cuda()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        _, losses = _round_columns(given, factor, rounding, scale, zero)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert float(losses.sum()) == pytest.approx(result.loss, rel=1e-5)


# --- the method on models -------------------------------------------------------------------------


def quantized_layers(model) -> dict[str, QuantizedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "bert", "encoder"])
def test_every_block_linear_is_replaced(apply, weights, logits, family):
    names = set(weights(tiny_model(family)))
    model = apply(METHOD, tiny_model(family), group_size=64)
    layers = quantized_layers(model)
    assert set(layers) == names
    assert {layer.bits for layer in layers.values()} == {4}
    assert bool(torch.isfinite(logits(model)).all())


@pytest.mark.parametrize(
    "options", [{"group_size": 32, "act_order": True}, {"group_size": 32, "true_sequential": False}]
)
def test_other_orders(apply, logits, options):
    original = logits(tiny_model("llama"))
    changed = logits(apply(METHOD, tiny_model("llama"), **options))
    assert float((changed - original).norm() / original.norm()) < 0.15


def test_layers_see_the_rounding_of_those_before_them():
    """The core, given the inputs that the already quantized model feeds a layer, gives that very layer."""
    model = tiny_model("opt")
    context = make_context(model, calibration_samples=4, calibration_len=32)
    originals = {name: linear.weight.detach().clone() for name, linear in block_linears(model)}
    model = METHOD.transform(model, METHOD.options.parse({"bits": 2, "group_size": 64}), context)
    for name in ("model.decoder.layers.0.fc1", "model.decoder.layers.1.self_attn.out_proj"):
        seen = []
        layer = model.get_submodule(name)
        handle = layer.register_forward_pre_hook(lambda _m, args, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            model(input_ids=context.calibration())
        handle.remove()
        x = seen[0].reshape(-1, layer.in_features)
        expected = gptq_quantize(
            originals[name], x.T @ x / len(x), bits=2, group_size=64, clip="mse"
        ).quantized.dequantize()
        same = (layer.dequantize() == expected).float().mean()
        assert float(same) > 0.99, name  # float32 sums in another order may tip a few codes


def passes_over_blocks(model) -> list[str]:
    """The names of the blocks that are run from now on, one for each batch."""
    passes: list[str] = []
    for name, block in blocks_of(model):
        block.register_forward_pre_hook(lambda *_, name=name: passes.append(name))
    return passes


def on_original(cache_dir, family="llama", **options):
    """A quantized tiny model, how often its blocks were run meanwhile, and what was recorded."""
    model = tiny_model(family)
    passes = passes_over_blocks(model)
    context = make_context(model, calibration_samples=20, calibration_len=16, cache_dir=cache_dir)
    parsed = METHOD.options.parse({"group_size": 32, "calibrate_on": "original", **options})
    METHOD.transform(model, parsed, context)
    (record,) = context.records
    assert context.calibration_tokens == 20 * 16
    return model, len(passes), record.value


def same_state(one, other) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_hessians_of_the_original_serve_every_configuration(tmp_path, family):
    _, passes, _ = on_original(tmp_path / "one", family)
    batches, blocks = 3, len(blocks_of(tiny_model(family)))
    assert passes == batches * (1 + blocks)  # the first block's inputs are found by entering it
    again, passes, error = on_original(tmp_path / "one", family, bits=3, act_order=True)
    assert passes == 0
    afresh, passes, expected = on_original(tmp_path / "two", family, bits=3, act_order=True)
    assert passes > 0
    assert same_state(again, afresh)
    assert error == expected


def test_hessians_of_the_original_are_kept_by_input(tmp_path):
    """Layers that read the same input share an entry, and what is missing or spoilt is computed again."""
    everything, _, _ = on_original(tmp_path)
    assert len(list(tmp_path.rglob("*.pt"))) == 2 * 4
    assert on_original(tmp_path, targets="k_proj")[1] == 0
    some = tmp_path / "some"
    on_original(some, targets=r"layers\.0\.mlp")
    assert len(list(some.rglob("*.pt"))) == 2
    completed, passes, _ = on_original(some)
    assert passes > 0
    assert same_state(completed, everything)
    for entry in some.rglob("*.pt"):
        entry.write_bytes(b"not a tensor")
    repaired, passes, _ = on_original(some)
    assert passes > 0
    assert same_state(repaired, everything)


def test_other_tokens_have_other_hessians(tmp_path):
    for seed in (0, 1):
        model = tiny_model("llama")
        passes = passes_over_blocks(model)
        tokens = torch.randint(256, (2000,), generator=torch.Generator().manual_seed(seed))
        context = make_context(model, tokens=tokens, cache_dir=tmp_path)
        context.identity = {}
        METHOD.transform(model, METHOD.options.parse({"calibrate_on": "original"}), context)
        assert passes


def test_original_means_the_inputs_of_the_untouched_model(tmp_path):
    model = tiny_model("llama")
    linears = dict(block_linears(tiny_model("llama")))
    name = "model.layers.1.mlp.down_proj"
    seen = []
    layer = model.get_submodule(name)
    handle = layer.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    context = make_context(model, calibration_samples=20, calibration_len=16)
    with torch.no_grad():
        model(input_ids=context.calibration())
    handle.remove()
    x = seen[0].reshape(-1, layer.in_features)
    expected = gptq_quantize(linears[name].weight.detach(), x.T @ x / len(x), bits=2, group_size=32)
    quantized, _, _ = on_original(tmp_path, bits=2, clip="absmax")
    same = (quantized.get_submodule(name).dequantize() == expected.quantized.dequantize()).float().mean()
    assert float(same) > 0.99


def test_a_pass_for_each_step_stops_where_it_has_seen_enough():
    model = tiny_model("llama")
    counts = dict.fromkeys(anatomy_of(model).linears, 0)
    hooked = dict(block_linears(model, targets=r"layers\.1\."))
    context = make_context(model, calibration_samples=24, calibration_len=16)
    # The layers are replaced while they are calibrated: what is counted is the runs before that.
    for name, linear in hooked.items():
        short = name.removeprefix("model.layers.1.")
        linear.register_forward_hook(lambda *_, short=short: counts.update({short: counts[short] + 1}))
    METHOD.transform(model, METHOD.options.parse({"group_size": 32}), context)
    batches = 3
    assert counts["self_attn.q_proj"] == 1  # the first batch of the first pass runs to the end
    assert counts["self_attn.o_proj"] == 2
    assert counts["mlp.up_proj"] == 3
    assert counts["mlp.down_proj"] == 4
    assert counts["self_attn.k_proj"] in (1, batches)


def test_stored_bits(apply):
    for name, layer in quantized_layers(apply(METHOD, tiny_model("opt"))).items():
        stored = sum(t.numel() * t.element_size() for n, t in layer.state_dict().items() if n != "bias")
        bits = 8 * stored / (layer.in_features * layer.out_features)
        assert bits == pytest.approx(4 + (16 + 4) / 128, abs=0.001), name
        assert bits <= 4.6


def test_it_reports_the_error_it_made():
    model = tiny_model("llama")
    errors = {}
    for bits in (2, 4):
        model = tiny_model("llama")
        context = make_context(model, calibration_samples=4, calibration_len=32)
        METHOD.transform(model, METHOD.options.parse({"bits": bits}), context)
        (record,) = context.records
        assert record.metric == "gptq_relative_error"
        errors[bits] = record.value
    assert 0 < errors[4] < errors[2] < 1


def test_targets_limit_it(apply):
    model = apply(METHOD, tiny_model("llama"), targets=r"layers\.0\.self_attn")
    assert len(quantized_layers(model)) == 4


def test_what_it_refuses(apply):
    quantized = apply(METHOD, tiny_model("llama"))
    with pytest.raises(NotApplicable, match="quantized already"):
        apply(METHOD, quantized)
    with pytest.raises(NotApplicable, match="96 does not divide the 128 columns"):
        apply(METHOD, tiny_model("llama"), group_size=96)
    info = info_from_config(tiny_model("llama").config, "tiny")
    assert "does not divide" in METHOD.applies(info, METHOD.options.parse({"group_size": 96}))
    assert METHOD.applies(info, METHOD.options.parse({})) is None
    spoilt = tiny_model("llama")
    spoilt.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(NumericalFailure, match=r"layers\.1\.mlp\.up_proj: weights are NaN"):
        apply(METHOD, spoilt)


def test_no_calibration_tokens_is_an_error():
    model = tiny_model("llama")
    context = make_context(model)
    context.calibration_batches = lambda *_args, **_kwargs: []
    with pytest.raises(ConfigError, match=r"q_proj: no calibration tokens"):
        METHOD.transform(model, METHOD.options.parse({}), context)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"group_size": 0}, "group_size"),
        ({"damp": 0}, "damp"),
        ({"bits": 6}, "bits"),
        ({"block_size": 0}, "block_size"),
    ],
)
def test_options_that_make_no_sense(values, message):
    with pytest.raises(ConfigError, match=message):
        METHOD.options.parse(values)


def test_usual_names_are_understood():
    parsed = METHOD.options.parse({"wbits": 3, "desc_act": True, "percdamp": 0.05, "groupsize": 64})
    assert (parsed.bits, parsed.act_order, parsed.damp, parsed.group_size) == (3, True, 0.05, 64)
