"""N:M pruning against brute force: which weights stay, that they stay, what is stored and what is said."""

from __future__ import annotations

import pytest
import torch
from harness_plugins.sparsity.nm_prune import METHOD, NmOptions, scores_of
from torch import nn

from harness.errors import ConfigError, NotApplicable, NumericalFailure
from harness.kernels import semi_structured as kernel
from harness.kernels import sparse_rows
from harness.measure.effect import measure_effect, snapshot
from harness.models.info import info_from_config
from harness.nn.n_of_m import keep_n_of_m
from harness.nn.semi_structured import SemiStructuredLinear
from harness.nn.surgery import block_linears, replace_module
from harness.testing import TinyTokenizer, make_context, tiny_model
from harness.training import TrainSettings

FAMILIES = ["llama", "opt", "gpt2", "bert", "encoder"]


def pruned(model: nn.Module, context=None, **options):
    """The model that the method makes, with its context."""
    context = context or make_context(model, tokenizer=TinyTokenizer)
    return METHOD.transform(model, METHOD.options.parse(options), context), context


def recorded(context) -> dict[str, float]:
    return {record.metric: record.value for record in context.records}


def sparse_layers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Dense weights of every linear layer inside the blocks, whatever it became."""
    names = [name for name, _ in block_linears(tiny_model(model.config.model_type))]
    return {name: weight_of(model.get_submodule(name)) for name in names}


def weight_of(layer: nn.Module) -> torch.Tensor:
    return layer.dense_weight() if isinstance(layer, SemiStructuredLinear) else layer.weight.detach()


# --- which weights stay -------------------------------------------------------------------------------


def test_survivors_of_normal_and_uniform_weights_hold_the_known_share():
    """Of the sum of |w|: normal 2:4 .744, 4:8 .768, 1:4 .459, unstructured .797; uniform 2:4 .70."""
    weight = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0)).abs()
    uniform = torch.rand(1024, 1024, generator=torch.Generator().manual_seed(0))

    def share(values, n, m):
        return float(values[keep_n_of_m(values, n, m)].sum() / values.sum())

    known = {(2, 4): 0.744, (4, 8): 0.768, (1, 4): 0.459}
    for (n, m), expected in known.items():
        assert share(weight, n, m) == pytest.approx(expected, abs=0.003)
    assert share(uniform, 2, 4) == pytest.approx(0.7, abs=0.002)
    best = float(weight.flatten().topk(weight.numel() // 2).values.sum() / weight.sum())
    assert share(weight, 2, 4) < share(weight, 4, 8) < best == pytest.approx(0.797, abs=0.003)


def test_scores_follow_their_papers():
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(6, 8, generator=generator), torch.randn(50, 8, generator=generator)
    x[:, 2] *= 9
    hessian = x.T @ x / 50
    assert torch.equal(scores_of(weight, "magnitude", None, 0.01), weight.abs())
    wanda = scores_of(weight, "wanda", hessian, 0.01)
    torch.testing.assert_close(wanda, weight.abs() * x.norm(dim=0) / 50**0.5)
    # From the definition: the j-th pivot of the inverse of the rest, columns eliminated in order.
    damped = (hessian + 0.01 * hessian.diagonal().mean() * torch.eye(8)).double()
    pivots = torch.stack([torch.linalg.inv(damped[j:, j:])[0, 0] for j in range(8)])
    # In float32, whose last digits depend on the machine's Cholesky factorisation.
    scores = scores_of(weight, "sparsegpt", hessian, 0.01)
    torch.testing.assert_close(scores, (weight.double().square() / pivots).float())


@pytest.mark.parametrize("score", ["wanda", "sparsegpt"])
def test_where_no_input_comes_the_magnitude_decides(score):
    weight = torch.randn(4, 8)
    assert torch.equal(scores_of(weight, score, torch.zeros(8, 8), 0.01), weight.abs())


@pytest.mark.parametrize("score", ["wanda", "sparsegpt"])
def test_calibrated_masks_are_those_of_the_inputs_that_were_seen(score):
    """The first block's inputs do not depend on any pruning."""
    model, original = tiny_model("opt"), tiny_model("opt")
    model, context = pruned(model, score=score)
    seen: list[torch.Tensor] = []
    layer = original.model.decoder.layers[0].self_attn.q_proj
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    for batch in make_context(original).calibration_batches():
        original(input_ids=batch)
    hook.remove()
    x = torch.cat(seen).flatten(0, 1)
    scores = scores_of(layer.weight, score, x.T @ x / len(x), 0.01)
    expected = layer.weight * keep_n_of_m(scores, 2, 4)
    found = weight_of(model.model.decoder.layers[0].self_attn.q_proj)
    assert (found != expected).float().mean() <= 0.002  # ties of rounding
    assert context.calibration_tokens > 0


# --- the model ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_targeted_layer_holds_the_pattern_and_nothing_else_changes(family, dtype):
    original = tiny_model(family).to(dtype)
    model, before = tiny_model(family).to(dtype), snapshot(original)
    model, _ = pruned(model)
    names = [name for name, _ in block_linears(original)]
    effects = {effect.module: effect for effect in measure_effect(before, model).effects}
    for name in names:
        weight = original.get_submodule(name).weight.detach()
        expected = weight * keep_n_of_m(weight.float().abs(), 2, 4)
        layer = model.get_submodule(name)
        assert torch.equal(layer.dense_weight(), expected)
        counts = (layer.dense_weight() != 0).view(len(weight), -1, 4).sum(-1)
        assert (counts == 2).all()
        effect = effects[name]
        assert (effect.sparsity, effect.nm_pattern, effect.simulated) == (0.5, "2:4", False)
        ratio = effect.stored_bits_per_weight / (8 * dtype.itemsize)
        assert ratio == (0.5625 if dtype == torch.bfloat16 else 0.53125)
    assert {name for name, effect in effects.items() if effect.changed} == set(names)
    for name, parameter in original.named_parameters():
        if name.rpartition(".")[0] not in names:
            assert torch.equal(parameter, model.get_parameter(name))


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "bert"])
def test_it_computes_what_the_zeroed_dense_model_computes(family):
    model, dense = tiny_model(family), tiny_model(family)
    model, _ = pruned(model)
    with torch.no_grad():
        for _, linear in block_linears(dense):
            linear.weight.mul_(keep_n_of_m(linear.weight.abs(), 2, 4))
        tokens = torch.randint(256, (2, 20), generator=torch.Generator().manual_seed(0))
        assert torch.equal(model(input_ids=tokens).logits, dense(input_ids=tokens).logits)


@pytest.mark.parametrize(("n", "m"), [(1, 4), (4, 8), (2, 8), (1, 16), (3, 8), (3, 4)])
def test_patterns_without_a_kernel_are_masks_and_say_so(n, m):
    before = snapshot(tiny_model("llama"))
    model, context = pruned(tiny_model("llama"), n=n, m=m)
    effect = measure_effect(before, model)
    assert effect.simulated
    for entry in effect.effects:
        assert (entry.nm_pattern, entry.sparsity) == (f"{n}:{m}", 1 - n / m)
        assert entry.bytes_after == entry.bytes_before
        assert entry.kernel == f"dense matmul over {n}:{m} zeros"
    note = next(record.note for record in context.records if record.metric == "bitmap_bytes")
    assert "no speed is claimed" in note
    places = sum(weight.numel() for weight in sparse_layers(model).values())
    assert recorded(context)["bitmap_bytes"] == pytest.approx(places * (4 * n / m + 1 / 8))
    assert recorded(context)["nm_groups"] == places / m


def test_before_another_method_and_with_backend_dense_the_layers_stay_plain():
    context = make_context(tiny_model("llama"))
    context.last_in_chain = False
    model, _ = pruned(tiny_model("llama"), context)
    assert {type(layer) for _, layer in block_linears(model)} == {nn.Linear}
    assert all(float((w == 0).float().mean()) == 0.5 for w in sparse_layers(model).values())
    model, _ = pruned(tiny_model("llama"), backend="dense")
    assert all(layer.simulated for _, layer in block_linears(model))


def test_targets_narrow_the_layers():
    model, _ = pruned(tiny_model("llama"), targets=r"mlp\.")
    for name, weight in sparse_layers(model).items():
        assert bool((weight == 0).any()) == ("mlp" in name)


def odd_model() -> nn.Module:
    """FFN widths that are a multiple of 4 but not of 16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=52,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=64,
        )
    ).eval()


def test_shapes_that_the_hardware_cannot_run_stay_dense_and_are_listed():
    model, original = odd_model(), odd_model()
    model, context = pruned(model)
    note = next(record.note for record in context.records if record.metric == "layers_left_dense")
    assert recorded(context)["layers_left_dense"] == 3
    for part in ("gate_proj", "up_proj", "down_proj"):
        name = f"model.layers.0.mlp.{part}"
        assert torch.equal(model.get_submodule(name).weight, original.get_submodule(name).weight)
        assert name in note
    assert "[52, 32]: both sizes must be multiples of 16" in note
    assert isinstance(model.model.layers[0].self_attn.q_proj, SemiStructuredLinear)
    model, context = pruned(odd_model(), backend="dense")  # as masks they can be had
    assert recorded(context)["layers_left_dense"] == 0
    with pytest.raises(NotApplicable, match="no layer can be pruned"):
        pruned(odd_model(), targets="mlp")


# --- retraining ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "bert"])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4)])
def test_zeros_stay_zero_through_retraining(family, n, m):
    """With momentum, weight decay and a high rate; the survivors do move."""
    model, original = tiny_model(family), tiny_model(family)
    settings = TrainSettings(batch_size=2, seq_len=16, weight_decay=0.3)
    context = make_context(model, settings=settings, tokenizer=TinyTokenizer)
    model, _ = pruned(model, context, n=n, m=m, steps=4, lr=1e-2)
    assert context.trained_steps == 4
    assert recorded(context)["pruned_share_of_targets"] == 1 - n / m
    for name, weight in sparse_layers(model).items():
        was = original.get_submodule(name).weight.detach()
        keep = keep_n_of_m(was.abs(), n, m)
        assert (weight[~keep] == 0).all()
        assert (weight[keep] != was[keep]).float().mean() > 0.9


def test_retraining_recovers_more_than_it_costs():
    tokens = torch.randint(256, (40,), generator=torch.Generator().manual_seed(0)).repeat(100)
    losses = {}
    for steps in (0, 30):
        model = tiny_model("opt")
        settings = TrainSettings(lr=3e-3, batch_size=4, seq_len=40)
        model, _ = pruned(model, make_context(model, tokens=tokens, settings=settings), steps=steps)
        with torch.no_grad():
            losses[steps] = float(model(input_ids=tokens[None, :80], labels=tokens[None, :80]).loss)
    assert losses[30] < losses[0] - 0.5


# --- bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"n": 5}, "n: of every m=4 weights fewer than m"),
        ({"n": 4}, "fewer than m"),
        ({"n": 0}, "n: "),
        ({"m": 1}, "m: "),
        ({"n": 1, "backend": "cusparselt"}, "2:4 alone, not 1:4"),
        ({"score": "random"}, "score"),
        ({"steps": -1}, "steps"),
        ({"damp": 0}, "damp"),
        ({"lr": 0}, "lr"),
    ],
)
def test_bad_options_are_named(bad, words):
    with pytest.raises(ConfigError, match=words):
        NmOptions.parse(bad)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"m": 24}, NotApplicable, "m=24 does not divide a width of 128"),
        ({"m": 512}, NotApplicable, "a width of 128 is narrower than a group of m=512"),
        ({"m": 24, "ragged": "skip"}, NotApplicable, "no layer can be pruned"),
        ({"targets": "nowhere"}, ConfigError, "nowhere"),
        ({"targets": "("}, ConfigError, "no regular expression"),
        ({"backend": "cusparselt"}, NotApplicable, "cuSPARSELt does not multiply float32 on cpu"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_changes(options, error, words):
    model, original = tiny_model("llama"), tiny_model("llama")
    with pytest.raises(error, match=words):
        pruned(model, **options)
    for name, parameter in original.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name))


def test_retraining_without_enough_text_is_refused_before_anything_changes():
    model, original = tiny_model("llama"), tiny_model("llama")
    context = make_context(model, tokens=torch.zeros(10, dtype=torch.int64))
    with pytest.raises(ConfigError, match="has 10 tokens; a window of 32 does not fit"):
        pruned(model, context, steps=3)
    with pytest.raises(NotApplicable, match="no head for masked tokens"):
        pruned(tiny_model("encoder"), steps=3)
    for name, parameter in original.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name))


def test_what_cannot_be_pruned_is_named():
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(NumericalFailure, match=r"layers\.1\.mlp\.up_proj: weights are NaN"):
        pruned(model)
    model, _ = pruned(tiny_model("llama"))
    with pytest.raises(NotApplicable, match="is left inside the blocks"):
        pruned(model)


def test_the_grid_knows_what_does_not_fit():
    info = info_from_config(tiny_model("llama").config, "llama")
    assert METHOD.applies(info, NmOptions()) is None
    assert "hidden size" in METHOD.applies(info, NmOptions(m=24))
    assert METHOD.applies(info, NmOptions(m=24, ragged="skip")) is None
    scratch = info_from_config(tiny_model("llama").config, "llama", scratch=True)
    assert "fill the zeros" in METHOD.applies(scratch, NmOptions())
    assert METHOD.needs_of(NmOptions()) == frozenset()
    assert METHOD.needs_of(NmOptions(score="wanda", steps=2)) == {"calibration", "training"}
    assert METHOD.needs_of(NmOptions(backend="cusparselt")) == {"cuda"}


def test_random_weights_are_never_retrained():
    model = tiny_model("llama")
    info = info_from_config(model.config, "shape:tiny", synthetic=True)
    context = make_context(model, info)
    pruned(model, context, steps=3)
    assert context.trained_steps == 0


def test_a_layer_swapped_in_later_is_measured_as_it_is():
    """The pattern is read from the weights, not from what the method says."""
    original = tiny_model("llama")
    before = snapshot(original)
    model, _ = pruned(tiny_model("llama"), n=1, m=4)
    name = "model.layers.0.mlp.up_proj"
    layer = model.get_submodule(name)
    with torch.no_grad():
        layer.weight[0, :4] = 1.0
    replace_module(model, name, layer)
    entry = next(each for each in measure_effect(before, model).effects if each.module == name)
    assert entry.nm_pattern is None


# --- on CUDA ------------------------------------------------------------------------------------------

needs_library = pytest.mark.skipif(
    not kernel.is_available(torch.device("cuda" if torch.cuda.is_available() else "cpu"), torch.bfloat16),
    reason="needs a CUDA device with cuSPARSELt",
)


@pytest.mark.gpu
@needs_library
@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "bert"])
@pytest.mark.parametrize("backend", ["auto", "cusparselt"])
def test_on_cuda_the_librarys_kernel_runs_what_the_dense_model_computes(family, backend):
    original = tiny_model(family).bfloat16().cuda()
    before = snapshot(original)
    model, _ = pruned(tiny_model(family).bfloat16().cuda(), backend=backend)
    effects = [e for e in measure_effect(before, model).effects if e.kind == "SemiStructuredLinear"]
    assert len(effects) == sum(1 for _ in block_linears(original))
    for effect in effects:
        assert effect.kernel in (kernel.KERNEL, sparse_rows.NAME)  # of one row
        assert (effect.nm_pattern, effect.sparsity) == ("2:4", 0.5)
        assert effect.stored_bits_per_weight <= 0.6 * 16
    tokens = torch.randint(256, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for _, linear in block_linears(original):
            linear.weight.mul_(keep_n_of_m(linear.weight.float().abs(), 2, 4))
        expected = original(input_ids=tokens.cuda()).logits.double()
        difference = (model(input_ids=tokens.cuda()).logits.double() - expected).norm() / expected.norm()
        assert difference <= 2e-2
        # A saved model loads where there is no such library.
        empty, _ = pruned(tiny_model(family).bfloat16())
        empty.load_state_dict(model.state_dict())
        difference = (empty(input_ids=tokens).logits.double() - expected.cpu()).norm() / expected.norm().cpu()
        assert difference <= 2e-2


@pytest.mark.gpu
@needs_library
def test_on_cuda_retraining_keeps_the_zeros():
    model = tiny_model("llama").bfloat16().cuda()
    model, context = pruned(model, steps=3, score="sparsegpt")
    assert context.trained_steps == 3
    for weight in sparse_layers(model).values():
        assert ((weight != 0).view(len(weight), -1, 4).sum(-1) <= 2).all()
