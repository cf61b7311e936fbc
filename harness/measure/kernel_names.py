"""Names of kernels for people, and what a kernel is for.

A profiler reports demangled C++ templates of a thousand characters, Triton's function names and, on the
CPU, the operators of ATen. `readable` shortens them and `family_of` says what they do, by one table of
explicit rules: the first that matches the readable name decides.

===============  ==============================================================================
family           what it does
===============  ==============================================================================
``gemm``         matrix products of any type, matrix-vector ones and their reductions included
``attention``    fused attention
``dequantize``   turns stored codes into floats that another kernel multiplies
``quantize``     turns activations into codes
``norm``         normalisations and softmax
``sampling``     choosing the next token
``copy``         moves, gathers, converts and fills memory
``elementwise``  arithmetic element by element, and reductions
``overhead``     views, allocation and checks: the host's work between kernels
``other``        everything else
===============  ==============================================================================
"""

from __future__ import annotations

import re

__all__ = ["FAMILIES", "MAX_NAME", "family_of", "readable"]

MAX_NAME = 120  # characters

_RULES: tuple[tuple[str, str], ...] = (
    # Attention first: its kernels are named after their matrix products too.
    (
        "attention",
        r"flash|fmha|sdpa|scaled_dot_product|attention|(^|_)attn|mem_eff|paged_kv",
    ),
    # A product that unpacks its weights on the way is a product.
    (
        "gemm",
        r"gemm|gemv|nvjet|cutlass.*(mma|tensorop)|xmma|splitkreduce|cublas|cusparselt|marlin"
        r"|_(matmul|small|wide|vector|few|matrix|tma|add_partials|add_splits)_kernel|triton_tem_fused.*(mm|bmm)|\bdot_kernel"
        r"|^(aten::)?(_)?(addmm|mm|bmm|baddbmm|addmv|mv|dot|matmul|linear|einsum|int_mm|scaled_mm)\b"
        r"|^aten::_(int_mm|scaled_mm|weight_int4pack_mm|weight_int8pack_mm|addmm_activation)"
        r"|weight_int\dpack|int4pack_mm|mkl.*linear|onednn.*(linear|matmul|qlinear)|fbgemm",
    ),
    ("dequantize", r"dequant|unpack|right_shift|left_shift|^aten::__i?[lr]shift__"),
    # The last three look for the outliers of activations, and round the rest.
    ("quantize", r"quant|absmax|^_(peaks|select|split)_kernel$"),
    (
        "sampling",
        r"argmax|argmin|topk|multinomial|sort|sampl",
    ),
    (
        "norm",
        r"layer_?norm|rms_?norm|rmsnorm|softmax|rsqrt|batch_?norm|group_?norm|triton_(red|per)\w*pow",
    ),
    (
        "copy",
        r"memcpy|memset|copy|catarray|\bcat\b|index_?select|index_?put|index_?kernel|gather|scatter"
        r"|embedding|fillfunctor|^aten::(index|cat|clone|fill_|zero_|contiguous|_to_copy|stack|repeat"
        r"|roll|flip|masked_fill|where|tril|triu)\w*\b|transpose_kernel|triton_poi_fused_(clone|copy|cat)",
    ),
    (
        "overhead",
        r"^aten::(as_strided|slice|transpose|t|view|empty\w*|reshape|unsqueeze|squeeze|select|narrow"
        r"|_unsafe_view|expand\w*|permute|to|item|is_nonzero|_local_scalar_dense|resolve_\w+"
        r"|result_type|detach\w*|alias|chunk|split\w*|unbind|unfold|_reshape_alias|lift_fresh|movedim"
        r"|numpy_t|flatten|unflatten|view_as\w*|scalar_tensor|resize_|set_|is_\w+|ones|zeros|new_\w+"
        r"|full|full_like|ones_like|zeros_like|arange|broadcast_tensors)$|^\[memory\]$|^torch/|^cuda[A-Z]",
    ),
    (
        "elementwise",
        r"elementwise|reduce_kernel|triton_(poi|red|per)_|functor|^_scales_kernel$|_kernel_cuda|^aten::\w+$",
    ),
)

FAMILIES = (*dict(_RULES), "other")

_COMPILED = tuple((family, re.compile(pattern, re.IGNORECASE)) for family, pattern in _RULES)
_NOISE = re.compile(
    r"std::enable_if<[^>]*>::type |\(anonymous namespace\)::|at::native::|\bvoid |\bstd::|\bc10::"
    r"|at_cuda_detail::"
)
_FUNCTOR = re.compile(r"\b(?!gpu_)(\w*(?:Functor|Ops|copy_kernel|kernel_impl|_kernel_cuda)\w*)")


def readable(name: str) -> str:
    """A kernel's name in one line of at most `MAX_NAME` characters.

    Arguments, namespaces and template parameters go; of an elementwise kernel the function that it
    applies stays.

    >>> readable("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>, "
    ...          "std::array<char*, 3ul> >(int, at::native::CUDAFunctor_add<float>, std::array<char*, 3ul>)")
    'vectorized_elementwise_kernel<CUDAFunctor_add>'
    """
    text = _NOISE.sub("", " ".join(name.split()))
    base, template = _split_template(text)
    functors = [name for name in _FUNCTOR.findall(template) if name not in base]
    if functors:
        base = f"{base}<{functors[-1]}>"  # the innermost says what is computed
    elif template and _says_little(base):
        base = f"{base}<{_first_parameter(template)}>"
    return base if len(base) <= MAX_NAME else base[: MAX_NAME - 1] + "…"


def family_of(name: str) -> str:
    """What a kernel does, by its (readable or full) name; one of `FAMILIES`.

    >>> family_of("nvjet_tst_128x64_64x8_2x1_v_bz_TNT"), family_of("Memcpy DtoD (Device -> Device)")
    ('gemm', 'copy')
    """
    return next((family for family, pattern in _COMPILED if pattern.search(name)), "other")


def _split_template(text: str) -> tuple[str, str]:
    """The name before its template parameters or arguments, and the template parameters."""
    if text.startswith(("Memcpy", "Memset")):
        return text, ""
    open_at, bracket = text.find("<"), text.find("(")
    if open_at == -1 or (bracket != -1 and bracket < open_at):
        return (text if bracket == -1 else text[:bracket]).strip(), ""
    return text[:open_at].strip(), text[open_at + 1 :]


def _first_parameter(template: str) -> str:
    depth = 0
    for place, letter in enumerate(template):
        if depth == 0 and letter in ",>":
            return template[:place]
        depth += {"<": 1, ">": -1}.get(letter, 0)
    return template


def _says_little(base: str) -> bool:
    """True for the entry points of template libraries, whose parameters are the name."""
    return base.rpartition("::")[2] in ("Kernel", "Kernel2", "device_kernel", "kernel")
