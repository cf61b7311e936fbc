"""Whether transformers alone can build the variant's network, and what goes into its checkpoint.

The class of the model is built again from the configuration, without weights, and laid beside the variant:
every module must be there under the same name, of the same class or of one that stores the same layer in
another form. Whatever else the variant has (modules, hooks, another attention) cannot travel in a
checkpoint, and is a reason to refuse it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from harness.errors import NotApplicable
from harness.export import compressed_tensors, gptq
from harness.export.contents import UNPACKED, Contents
from harness.export.forms import DenseForm, Form, IntegerForm, NoForm, dense_form_of, form_of
from harness.nn.activation_grid import ActivationQuantizer
from harness.nn.anatomy import blocks_of
from harness.nn.quantized_tokens import QuantizingNorm

__all__ = ["LAYOUTS", "contents_of", "stock_config"]

LAYOUTS = ("auto", "compressed-tensors", "gptq", "dense")

_SHARED_HEADS = "harness_shared_heads"  # transformers' own attention, that repeats no shared head
_SITES = "harness_activation_sites"
_HERE = "harness.nn."
_SHOWN = 3  # of the layers that something is said of


def contents_of(model: nn.Module, layout: str, dtype: torch.dtype) -> Contents:
    """Lay out the checkpoint of a variant; nothing is copied that need not be.

    Args:
        layout: one of `LAYOUTS`.
        dtype: of the variant; what is dense is stored in it.

    Raises:
        NotApplicable: the network cannot be built by transformers, or the layout cannot hold a layer of it.
    """
    model = getattr(model, "_orig_mod", model)  # out of torch.compile
    dense = layout == "dense"
    stock, config = _stock_model(model, dtype)
    _check_attention(model, dense)
    layers: dict[str, Form] = {}
    sources: dict[str, nn.Module] = {}
    reasons: dict[str, list[str]] = {}
    rest: dict[str, torch.Tensor] = {}
    transposed: set[str] = set()
    simulated: dict[str, None] = {}
    dropped: list[str] = []
    packed = False
    modules = dict(model.named_modules(remove_duplicate=False))
    stock_modules = dict(stock.named_modules(remove_duplicate=False))
    held: set[str] = set()  # modules that belong to a layer
    for name, module in modules.items():
        if name.rpartition(".")[0] in held:
            held.add(name)
            continue
        place = stock_modules.get(name)
        _check_hooks(name, module, dense, simulated)
        if place is None:
            if not (dense and _is_rounding(module)):
                _refuse_extra(name, module, dense)
            dropped.append(name)
            held.add(name)
            continue
        if _is_layer(module, place):
            held.add(name)
            form = dense_form_of(module) if dense else form_of(module)
            packed |= dense and not isinstance(form_of(module), DenseForm)
            if isinstance(form, NoForm):
                reasons.setdefault(form.reason, []).append(name)
                continue
            if form.bias is not None and getattr(place, "bias", None) is None and not form.bias.any():
                form = replace(form, bias=None)
            if type(place).__name__ == "Conv1D":
                transposed.add(name)
            if isinstance(form, DenseForm) and form.differs is not None:
                simulated[form.differs] = None
            layers[name], sources[name] = form, module
        elif type(module) is type(place) or isinstance(module, QuantizingNorm):
            if dense and isinstance(module, QuantizingNorm):
                simulated["the output of its norms is not rounded to 8 bits"] = None
            rest |= _own_state(name, module)
        else:
            raise NotApplicable(
                f"{name} is of the class {type(module).__name__}, where transformers builds "
                f"{type(place).__name__}: no checkpoint can say so"
            )
    if reasons:
        raise NotApplicable(_no_form(reasons))
    if dropped:
        simulated["activations between the layers are not rounded"] = None
    if dense and (packed or simulated):
        simulated[UNPACKED] = None
    if missing := [name for name in stock_modules if name not in modules]:
        raise NotApplicable(f"transformers builds {missing[0]}, which the variant does not have")
    contents = Contents(
        "plain" if dense and not simulated else _layout_for(layers, layout, transposed, model),
        stock,
        config,
        layers,
        frozenset(transposed),
        rest,
        sources,
        list(simulated),
    )
    _check_shapes(contents)
    _untie(contents, model)
    return contents


def stock_config(model: nn.Module, dtype: torch.dtype) -> Any:
    """The model's configuration without what only this process knows."""
    config: Any = copy.deepcopy(model.config)
    if str(getattr(config, "_attn_implementation", "")).startswith("harness_"):
        config._attn_implementation = "sdpa"
    config._name_or_path = ""  # where the original lies on this machine
    config.dtype = dtype
    config.architectures = [type(model).__name__]
    return config


# --- the stock model ------------------------------------------------------------------------------


def _stock_model(model: nn.Module, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    kind: Any = type(model)
    if not kind.__module__.startswith("transformers.models."):
        raise NotApplicable(
            f"{kind.__name__} is no class of transformers: a checkpoint of it loads only with its own code"
        )
    config = stock_config(model, dtype)
    if hasattr(config, "block_shapes"):
        raise NotApplicable(
            "the heads or channels that are left in the blocks fit no configuration of "
            f"{config.model_type!r}: all blocks must be alike, with as many heads as transformers can build"
        )
    with torch.device("meta"):
        try:
            return kind(copy.deepcopy(config)), config
        except (ValueError, RuntimeError) as error:
            raise NotApplicable(f"transformers cannot build the network again: {error}") from None


def _is_layer(module: nn.Module, place: nn.Module) -> bool:
    is_place = isinstance(place, nn.Linear) or type(place).__name__ == "Conv1D"
    return is_place or (isinstance(place, nn.Embedding) and type(module) is not type(place))


def _own_state(name: str, module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and lasting buffers of a module, without its children's."""
    prefix, passing = f"{name}." if name else "", module._non_persistent_buffers_set
    own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    return {prefix + key: tensor.detach() for key, tensor in own if key not in passing}


# --- what no checkpoint can say ---------------------------------------------------------------------


def _check_attention(model: nn.Module, dense: bool) -> None:
    name = str(getattr(model.config, "_attn_implementation", ""))
    if not name.startswith("harness_") or name == _SHARED_HEADS or (dense and name == _SITES):
        return
    if name == _SITES:
        raise NotApplicable(
            "tensors inside the attention are rounded, which no checkpoint can say; --layout dense leaves "
            "the rounding out"
        )
    raise NotApplicable(
        "the attention computes another function than transformers' own, which no checkpoint can say"
    )


def _check_hooks(name: str, module: nn.Module, dense: bool, simulated: dict[str, None]) -> None:
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    for hook in hooks:
        home = f"{getattr(hook, '__module__', '')}."
        if home == f"{_HERE}quantized_tokens.":  # rounds once what each of the layers would round
            continue
        if home.startswith("transformers."):  # hands hidden states to who asks for them
            continue
        if dense and home == f"{_HERE}activation_sites.":
            simulated["activations between the layers are not rounded"] = None
            continue
        raise NotApplicable(
            f"{name or 'the model'} has a hook ({getattr(hook, '__qualname__', hook)}) that changes what it "
            "computes, which no checkpoint can say" + _hint(dense, home == f"{_HERE}activation_sites.")
        )
    if "forward" in vars(module) and not hasattr(module, "_hf_hook"):
        raise NotApplicable(
            f"the forward pass of {name or 'the model'} was replaced, which no checkpoint can say"
        )


def _hint(dense: bool, applies: bool) -> str:
    return "; --layout dense leaves the rounding out" if applies and not dense else ""


def _is_rounding(module: nn.Module) -> bool:
    """Whether a module of the variant only rounds activations, or holds such modules."""
    return isinstance(module, ActivationQuantizer | nn.Identity | nn.ModuleDict)


def _refuse_extra(name: str, module: nn.Module, dense: bool) -> None:
    raise NotApplicable(
        f"the variant has {name} ({type(module).__name__}), which transformers does not build: no checkpoint "
        "can say so" + _hint(dense, _is_rounding(module))
    )


def _no_form(reasons: dict[str, list[str]]) -> str:
    reason, names = next(iter(reasons.items()))
    more = "" if len(names) <= _SHOWN else f" and {len(names) - _SHOWN} more"
    return (
        f"{', '.join(names[:_SHOWN])}{more}: {reason}; --layout dense writes the dequantized weights as a "
        "plain checkpoint, marked simulated"
    )


# --- the layout -------------------------------------------------------------------------------------


def _layout_for(layers: dict[str, Form], layout: str, transposed: set[str], model: nn.Module) -> str:
    quantized = {name: form for name, form in layers.items() if not isinstance(form, DenseForm)}
    if layout == "dense":
        return "dense"
    if not quantized:
        return "plain"  # whatever was asked for: there is nothing to lay out
    if layout == "auto":
        reordered = any(getattr(form, "group_of", None) is not None for form in quantized.values())
        layout = "gptq" if reordered or transposed & quantized.keys() else "compressed-tensors"
    if layout == "compressed-tensors":
        problem = _first_unfit(quantized, compressed_tensors.unfit)
        if problem is None and transposed & quantized.keys():
            problem = (
                f"{min(transposed & quantized.keys())}: transformers keeps it as a Conv1D, and "
                "compressed-tensors quantizes nn.Linear only; --layout gptq takes weight-only ones"
            )
    else:
        problem = _first_unfit(quantized, gptq.unfit) or _uneven(layers, quantized, model)
    if problem is not None:
        raise NotApplicable(f"{problem}; --layout dense writes the dequantized weights, marked simulated")
    return layout


def _first_unfit(quantized: Mapping[str, Form], unfit: Any) -> str | None:
    return next((f"{name}: {why}" for name, form in quantized.items() if (why := unfit(form))), None)


def _uneven(layers: Mapping[str, Form], quantized: Mapping[str, Form], model: nn.Module) -> str | None:
    """GPTQ's loaders quantize every linear layer of the blocks with the same settings, and no other."""
    prefixes = tuple(f"{name}." for name, _ in blocks_of(model))
    inside = {name for name in layers if name.startswith(prefixes)}
    if outside := sorted(quantized.keys() - inside):
        return f"{outside[0]} is outside the blocks, where GPTQ's layout quantizes nothing"
    if plain := sorted(inside - quantized.keys()):
        return f"{plain[0]} is not quantized, and GPTQ's layout quantizes all linear layers of the blocks"
    settings = {
        (form.bits, form.group_size, form.zero is None)
        for form in quantized.values()
        if isinstance(form, IntegerForm)
    }
    if len(settings) > 1:
        return "the layers have different bits or groups, and GPTQ's layout has one setting for all"
    return None


# --- shapes and shared weights ------------------------------------------------------------------------


def _check_shapes(contents: Contents) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in contents.stock.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in contents.rest.items()}
    for name, form in contents.layers.items():
        shape = tuple((form.weight if isinstance(form, DenseForm) else form.codes).shape)
        found[f"{name}.weight"] = shape[::-1] if name in contents.transposed else shape
        if form.bias is not None:
            found[f"{name}.bias"] = tuple(form.bias.shape)
    for name in (*found, *expected):
        if found.get(name) != expected.get(name):
            raise NotApplicable(
                f"{name} is {_told(found.get(name))} in the variant and {_told(expected.get(name))} in what "
                "transformers builds from its configuration: no checkpoint can say so"
            )


def _told(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else str(list(shape))


def _untie(contents: Contents, model: nn.Module) -> None:
    """Leave out what transformers ties by itself, and say where a tied pair was parted."""
    config = contents.config
    if not getattr(config, "tie_word_embeddings", False):
        return
    for copied, source in _tied_pairs(contents.stock):
        name, _, part = copied.rpartition(".")
        if not _is_shared(model, copied, source):
            config.tie_word_embeddings = False
            continue
        contents.rest.pop(copied, None)
        form = contents.layers.get(name)
        if form is not None and part == "bias":
            contents.layers[name] = replace(form, bias=None)
        elif form is not None:
            del contents.layers[name]
            if form.bias is not None:
                contents.rest[f"{name}.bias"] = form.bias


def _tied_pairs(stock: nn.Module) -> Iterator[tuple[str, str]]:
    keys: Any = getattr(stock, "_tied_weights_keys", None)
    if isinstance(keys, dict):
        yield from keys.items()


def _is_shared(model: nn.Module, copied: str, source: str) -> bool:
    def held(name: str) -> Any:
        module = model.get_submodule(name.rpartition(".")[0])
        return getattr(module, name.rpartition(".")[2], None), module

    (a, head), (b, embedding) = held(copied), held(source)
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a is b or a.data_ptr() == b.data_ptr()
    # A packed embedding and the head that reads its rows.
    return (
        a is None
        and b is None
        and (getattr(head, "embedding", None) is embedding or getattr(embedding, "rows", None) is head)
    )
