"""The method on whole models: caches, incremental decoding, causality, what it leaves alone."""

from __future__ import annotations

import copy

import pytest
import torch
from harness_plugins.attention.block_local import METHOD, BlockLocalOptions, bands_of
from harness_plugins.attention.mqa import MQA
from harness_plugins.distillation.distilbert import METHOD as DISTILBERT
from transformers import DynamicCache, StaticCache

from harness.errors import ConfigError, NotApplicable
from harness.measure.generation import decode_logits_match
from harness.method import Method
from harness.models.info import info_from_config
from harness.nn.blocks import iterate_blocks
from harness.nn.ring_cache import DynamicRingLayer, StaticRingLayer
from harness.testing import make_context, tiny_model

from .oracle import pattern

DECODERS = ("llama", "opt", "gpt2")
MODES = {
    "sliding": {"mode": "sliding", "window": 8},
    "block": {"mode": "block", "block_size": 8},
    "lookback": {"mode": "lookback", "block_size": 8, "lookback": 1},
    "mixed": {"mode": "sliding", "window": 8, "dense_every": 2},
}
B = 8


def _local(family: str, mode: str = "sliding", **options):
    model = tiny_model(family)
    given = BlockLocalOptions.parse({**MODES[mode], **options})
    return METHOD.transform(model, given, make_context(model))


def _tokens(length: int, batch: int = 2) -> torch.Tensor:
    return torch.randint(3, 256, (batch, length), generator=torch.Generator().manual_seed(length))


@torch.no_grad()
def _logits(model, tokens, **kwargs):
    return model(input_ids=tokens, **kwargs).logits


@torch.no_grad()
def _reference(family: str, mode: str, tokens: torch.Tensor) -> torch.Tensor:
    """The untouched model under prepared 4-D masks, one a layer, from the written definition."""
    model = tiny_model(family).double()
    options = BlockLocalOptions.parse(MODES[mode])
    causal = family in DECODERS
    bands = bands_of(options, 2, causal=causal)
    length = tokens.shape[1]
    everything = torch.ones(length, length, dtype=torch.bool)
    masks = [
        (everything.tril() if causal else everything) if band is None else pattern(band, length)
        for band in bands
    ]
    attention_names = [name for name, _ in model.named_modules() if name.endswith(_ATTENTION[family])]
    assert len(attention_names) == 2
    for name, mask in zip(attention_names, masks, strict=True):

        def use(_module, args, kwargs, mask=mask):
            return args, {**kwargs, "attention_mask": mask[None, None]}

        model.get_submodule(name).register_forward_pre_hook(use, with_kwargs=True)
    output = model(input_ids=tokens)
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


_ATTENTION = {
    "llama": ".self_attn",
    "opt": ".self_attn",
    "gpt2": ".attn",
    "bert": "attention.self",
    "encoder": "attention.self",
}


@pytest.mark.parametrize("family", [*DECODERS, "bert"])
@pytest.mark.parametrize("mode", MODES)
def test_the_model_computes_the_pattern(family, mode):
    model = _local(family, mode)
    for length in (1, B - 1, B, 3 * B + 5, 100):
        tokens = _tokens(length)
        difference = _logits(model, tokens) - _reference(family, mode, tokens)
        assert difference.abs().max() <= 1e-4


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("wide", [{"window": 128}, {"mode": "block", "block_size": 128}])
def test_a_pattern_that_covers_everything_changes_no_logit(family, wide):
    tokens = _tokens(100)
    assert torch.equal(_logits(_local(family, **wide), tokens), _logits(tiny_model(family), tokens))


def _caches(model, length: int):
    static = StaticCache(config=model.config, max_cache_len=length)
    growing = DynamicCache(config=model.config)
    return {"dynamic": growing, "static": static, "plain": DynamicCache()}


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cache_kind", ["dynamic", "static", "plain"])
def test_token_by_token_equals_one_shot(family, mode, cache_kind):
    """C4: any prefill, then one token at a time; also in two chunks and after a reset."""
    model, length = _local(family, mode), 3 * B + 5
    tokens = _tokens(length)
    expected = _logits(model, tokens)
    for chunks in ([0], [1], [B - 1], [B], [B + 3], [4, B + 1], [B + 3, 5]):
        cache = _caches(model, length)[cache_kind]
        for _ in range(2 if cache_kind == "static" else 1):
            sizes = [size for size in chunks if size]
            sizes += [1] * (length - sum(sizes))
            seen, pieces = 0, []
            for size in sizes:
                # As any caller of a static cache does: positions and a mask of full width.
                kwargs = {
                    "position_ids": torch.arange(seen, seen + size)[None],
                    "attention_mask": torch.ones(2, length if cache_kind == "static" else seen + size),
                }
                piece = tokens[:, seen : seen + size]
                pieces.append(_logits(model, piece, past_key_values=cache, **kwargs))
                seen += size
            assert (torch.cat(pieces, 1) - expected).abs().max() <= 1e-4, (chunks, cache_kind)
            cache.reset()


def _shallower(family: str, method: Method, **options):
    """Four layers, of which every second is dense, and then only those in the middle: dense, local."""
    model = tiny_model(family, layers=4)
    model = METHOD.transform(model, BlockLocalOptions.parse(MODES["mixed"]), make_context(model))
    untouched = make_context(tiny_model(family, layers=4))
    model = DISTILBERT.transform(
        model, DISTILBERT.options.parse({"layer_map": [1, 2], "steps": 0, **options}), untouched
    )
    return model if method is DISTILBERT else method.transform(model, method.options(steps=0), untouched)


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize(
    ("method", "options"), [(DISTILBERT, {}), (DISTILBERT, {"init": "random"}), (MQA, {})]
)
def test_layers_that_are_left_keep_their_patterns(family, method, options):
    model, tokens = _shallower(family, method, **options), _tokens(30)
    assert [layer.keys.shape[2] for layer in _filled(model, tokens).layers] == [30, B]
    cache = DynamicCache(config=model.config)
    pieces = [_logits(model, piece, past_key_values=cache) for piece in tokens.split(1, 1)]
    assert (torch.cat(pieces, 1) - _logits(model, tokens)).abs().max() <= 1e-4


def _filled(model, tokens: torch.Tensor) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    _logits(model, tokens, past_key_values=cache)
    return cache


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("prompt_len", [3, B, 20])
def test_the_timed_decode_step_computes_the_model(family, mode, prompt_len):
    model = _local(family, mode)
    assert decode_logits_match(model, _tokens(prompt_len), 2 * B) <= 1e-5


@pytest.mark.parametrize("family", DECODERS)
def test_generate_agrees_with_recomputing_everything(family):
    model = _local(family)
    tokens, padding = _tokens(12), torch.ones(2, 12, dtype=torch.int64)
    padding[1, :4] = 0
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "attention_mask": padding}
    expected = model.generate(tokens, use_cache=False, **options)
    assert torch.equal(model.generate(tokens, **options), expected)
    assert torch.equal(model.generate(tokens, cache_implementation="static", **options), expected)


@pytest.mark.parametrize(("mode", "reach"), [("sliding", B), ("block", B), ("lookback", 2 * B)])
def test_caches_stop_growing_at_the_reach(mode, reach):
    """C5: the ring's bytes are constant from there on: 2 · kv heads · d · reach, per layer."""
    model = _local("llama", mode)
    per_token = 2 * 4 * 32 * 4  # keys and values, 4 heads of 32, float32
    for length in (reach // 2, reach, reach + 1, 100):
        cache = DynamicCache(config=model.config)
        _logits(model, _tokens(length, batch=1), past_key_values=cache)
        _logits(model, _tokens(1, batch=1), past_key_values=cache)
        held = min(length + 1, reach)
        for layer in cache.layers:
            assert layer.keys.nbytes + layer.values.nbytes == per_token * held
            assert layer.get_seq_length() == length + 1
    static = StaticCache(config=model.config, max_cache_len=100)
    _logits(model, _tokens(20, batch=1), past_key_values=static)
    for layer in static.layers:
        assert layer.keys.nbytes + layer.values.nbytes == per_token * reach


def test_dense_layers_keep_everything():
    model = _local("llama", "mixed")
    cache = DynamicCache(config=model.config)
    _logits(model, _tokens(50, batch=1), past_key_values=cache)
    assert isinstance(cache.layers[0], DynamicRingLayer)
    assert [layer.keys.shape[2] for layer in cache.layers] == [B, 50]


def test_a_static_decode_step_reads_nothing_back_from_its_counter():
    """What a CUDA graph needs: the same kernels whatever the position; here: no host read."""
    model, length = _local("llama"), 40
    cache = StaticCache(config=model.config, max_cache_len=length)
    tokens = _tokens(length, batch=1)
    expected = _logits(model, tokens)
    _logits(model, tokens[:, :12], past_key_values=cache)
    layer = cache.layers[0]
    assert isinstance(layer, StaticRingLayer)
    for seen in range(12, length):

        class NoRead(torch.Tensor):
            def __int__(self):
                raise AssertionError("read back from the device")

            __bool__ = item = __index__ = __int__

        counter = layer.cumulative_length
        layer.cumulative_length = counter.as_subclass(NoRead)
        logits = _logits(
            model,
            tokens[:, seen : seen + 1],
            past_key_values=cache,
            position_ids=torch.tensor([[seen]]),
        )
        logits = logits.as_subclass(torch.Tensor)  # everything computed from the counter is a NoRead
        assert (logits[:, 0] - expected[:, seen]).abs().max() <= 1e-4
        assert int(counter) == seen + 1
        layer.cumulative_length = counter


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("mode", MODES)
def test_logits_do_not_depend_on_later_tokens(family, mode):
    model, length = _local(family, mode), 3 * B + 5
    tokens = _tokens(length)
    before = _logits(model, tokens)
    for t in (0, B - 1, B, length // 2, length - 2):
        changed = tokens.clone()
        changed[:, t + 1 :] = 255 - changed[:, t + 1 :]
        assert (_logits(model, changed) - before)[:, : t + 1].abs().max() <= 1e-6


def test_an_encoder_sees_both_sides():
    model = _local("encoder", "sliding")
    tokens = _tokens(30)
    changed = tokens.clone()
    changed[:, 14] = 7
    with torch.no_grad():
        difference = model(input_ids=changed).last_hidden_state - model(input_ids=tokens).last_hidden_state
    touched = (difference.abs().amax((0, 2)) > 1e-6).nonzero().flatten().tolist()
    assert touched == list(range(14 - 8, 14 + 8 + 1))  # two layers, 4 tokens to each side a layer


def test_right_padding_of_an_encoder_changes_nothing_else():
    model = _local("encoder", "sliding")
    short, long = _tokens(20, batch=1), _tokens(100, batch=1)
    batch = torch.cat([torch.nn.functional.pad(short, (0, 80)), long])
    mask = torch.ones(2, 100, dtype=torch.int64)
    mask[0, 20:] = 0
    with torch.no_grad():
        both = model(input_ids=batch, attention_mask=mask).last_hidden_state
        alone = model(input_ids=short).last_hidden_state
    assert (both[0, :20] - alone[0]).abs().max() <= 1e-5


def test_packed_sequences_stay_apart():
    model = _local("llama", "sliding")
    first, second = _tokens(9, batch=1), _tokens(30, batch=1)
    positions = torch.cat([torch.arange(9), torch.arange(30)])[None]
    packed = _logits(model, torch.cat([first, second], 1), position_ids=positions, use_cache=False)
    apart = torch.cat([_logits(model, first), _logits(model, second)], 1)
    assert (packed - apart).abs().max() <= 1e-5


def test_other_models_are_not_touched():
    other = tiny_model("llama")
    tokens = _tokens(60)
    before = _logits(other, tokens)
    config_before = copy.deepcopy(other.config.to_dict())
    _local("llama")
    assert torch.equal(_logits(other, tokens), before)
    assert other.config.to_dict() == config_before
    assert type(DynamicCache(config=other.config).layers[0]).__name__ == "DynamicLayer"


def test_a_saved_model_loads_as_the_ordinary_one(tmp_path):
    from transformers import LlamaForCausalLM

    model = _local("llama")
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.config._attn_implementation == "sdpa"
    assert torch.equal(_logits(loaded, _tokens(50)), _logits(tiny_model("llama"), _tokens(50)))


@pytest.mark.parametrize("family", DECODERS)
def test_blocks_can_be_calibrated_after_the_swap(family):
    """A quantizer that follows in the chain sees what the swapped model computes."""
    model, tokens = _local(family), _tokens(50)
    outputs = [block.run()[0] for block in iterate_blocks(model, [tokens])]
    with torch.no_grad():
        hidden = model(input_ids=tokens, output_hidden_states=True).hidden_states
    torch.testing.assert_close(outputs[0], hidden[1], rtol=0, atol=1e-6)


def test_training_reaches_every_weight():
    model = tiny_model("llama")
    before = copy.deepcopy(model.state_dict())
    context = make_context(model)
    METHOD.transform(model, BlockLocalOptions(window=8, steps=2), context)
    assert context.trained_steps == 2
    after = model.state_dict()
    assert all(not torch.equal(before[name], after[name]) for name in before)


def test_families_with_layer_types_of_their_own_keep_full_caches():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    model = Qwen2ForCausalLM(config).eval()
    context = make_context(model)
    METHOD.transform(model, BlockLocalOptions(window=8), context)
    assert "kept full" in context.records[0].note
    tokens = _tokens(40)
    expected, cache, pieces = _logits(model, tokens), DynamicCache(config=model.config), []
    for step in range(40):
        pieces.append(_logits(model, tokens[:, step : step + 1], past_key_values=cache))
    assert (torch.cat(pieces, 1) - expected).abs().max() <= 1e-4
    assert cache.layers[0].keys.shape[2] == 40


@pytest.mark.parametrize(
    ("bad", "name"),
    [
        ({"window": 0}, "window"),
        ({"block_size": 0}, "block_size"),
        ({"lookback": -1}, "lookback"),
        ({"mode": "blockbert"}, "mode"),
        ({"dense_every": -1}, "dense_every"),
    ],
)
def test_bad_options_are_named(bad, name):
    with pytest.raises(ConfigError, match=name):
        BlockLocalOptions.parse(bad)


def test_usual_names_are_accepted():
    options = BlockLocalOptions.parse({"sliding_window": 32, "b": 16, "c": 2})
    assert (options.window, options.block_size, options.lookback) == (32, 16, 2)


def test_other_terms_of_a_score_are_refused():
    model = _local("llama")
    layer = model.model.layers[0].self_attn
    states = torch.zeros(1, 4, 128)
    rotary = model.model.rotary_emb(states, torch.arange(4)[None])
    with pytest.raises(NotApplicable, match="softcap"):
        layer(states, position_embeddings=rotary, softcap=30.0)


def test_a_second_attention_method_is_refused():
    model = _local("llama")
    with pytest.raises(NotApplicable, match="by another step of the chain"):
        METHOD.transform(model, BlockLocalOptions(), make_context(model))


def test_it_says_where_it_does_not_fit():
    llama = info_from_config(tiny_model("llama").config, "llama")
    encoder = info_from_config(tiny_model("encoder").config, "encoder")
    assert METHOD.applies(llama, BlockLocalOptions()) is None
    assert "dense" in METHOD.applies(llama, BlockLocalOptions(dense_every=1))
    assert "steps" in METHOD.applies(encoder, BlockLocalOptions(steps=5))


# --- on a GPU -------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("mode", MODES)
def test_a_captured_decode_step_stays_right_when_replayed_later(mode):
    model, length = _local("llama", mode).cuda(), 40
    tokens = _tokens(length, batch=1).cuda()
    expected = _logits(model, tokens)
    cache = StaticCache(config=model.config, max_cache_len=length)
    token, position = tokens[:, :1].clone(), torch.zeros(1, 1, dtype=torch.int64, device="cuda")

    def step():
        return _logits(model, token, past_key_values=cache, position_ids=position)

    _logits(model, tokens[:, :12], past_key_values=cache)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = step()
    cache.reset()
    _logits(model, tokens[:, :12], past_key_values=cache)
    for seen in range(12, length):
        token.copy_(tokens[:, seen : seen + 1])
        position.fill_(seen)
        graph.replay()
        assert (logits[:, 0] - expected[:, seen]).abs().max() <= 1e-3


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_decoding_does_not_slow_down_with_the_context():
    """C8 for one layer's attention: the ring read is the same at 2k and at 64k."""
    from triton.testing import do_bench

    from harness.nn.attention import PositionMask, attend_in_band
    from harness.nn.masks import Band

    band, times = Band("sliding", 256), {}
    query = torch.randn(8, 32, 1, 128, device="cuda", dtype=torch.bfloat16)
    key = torch.randn(8, 32, 256, 128, device="cuda", dtype=torch.bfloat16)
    for context in (2048, 65536):
        offset = torch.tensor(context, device="cuda")
        times[context] = do_bench(
            lambda: attend_in_band(query, key, key, PositionMask(offset, None, None), band)  # noqa: B023
        )
    slope = (torch.tensor(times[65536] / times[2048]).log2() / 5).item()
    assert slope <= 0.15
