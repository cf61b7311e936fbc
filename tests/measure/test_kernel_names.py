"""Names that profilers report, as torch, cuBLAS, CUTLASS, cuDNN and Triton write them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from harness import kernels
from harness.measure.kernel_names import FAMILIES, MAX_NAME, family_of, readable

NATIVE = "at::native::"
CASES = [
    ("nvjet_tst_128x64_64x8_2x1_v_bz_TNT", "gemm", "nvjet_tst_128x64_64x8_2x1_v_bz_TNT"),
    (
        "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_16x16_128x2_tn_align8>"
        "(cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_16x16_128x2_tn_align8::Params)",
        "gemm",
        "cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_16x16_128x2_tn_align8>",
    ),
    ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize64x64x64_cublas", "gemm", None),
    ("ampere_bf16_s16816gemm_bf16_64x64_ldg8_f2f_stages_64x6_tn", "gemm", None),
    ("void gemv2T_kernel_val<int, int, __nv_bfloat16, float, 128>(cublasGemvParamsEx)", "gemm",
     "gemv2T_kernel_val"),
    ("std::enable_if<!(false), void>::type internal::gemvx::kernel<int, int, float>(x)", "gemm", None),
    ("void cublasLt::splitKreduce_kernel<32, 16, int, float>(x)", "gemm", "cublasLt::splitKreduce_kernel"),
    ("triton_tem_fused_mm_7", "gemm", "triton_tem_fused_mm_7"),
    ("_gemv_kernel", "gemm", "_gemv_kernel"),
    ("_small_kernel", "gemm", "_small_kernel"),
    ("_matmul_kernel", "gemm", "_matmul_kernel"),
    ("_dequantize_kernel", "dequantize", "_dequantize_kernel"),
    ("_quantize_tokens_kernel", "quantize", "_quantize_tokens_kernel"),
    ("void pytorch_flash::flash_fwd_splitkv_kernel<Flash_fwd_kernel_traits<128> >(Params)", "attention",
     "pytorch_flash::flash_fwd_splitkv_kernel"),
    ("fmha_cutlassF_bf16_aligned_64x128_rf_sm80(AttentionKernel::Params)", "attention",
     "fmha_cutlassF_bf16_aligned_64x128_rf_sm80"),
    ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128", "attention", None),
    (f"void {NATIVE}reduce_kernel<512, 1, {NATIVE}ReduceOp<float, {NATIVE}ArgMaxOps<float> > >(x)",
     "sampling", "reduce_kernel<ArgMaxOps>"),
    (f"void {NATIVE}reduce_kernel<512, 1, {NATIVE}ReduceOp<float, {NATIVE}MeanOps<float> > >(x)",
     "elementwise", "reduce_kernel<MeanOps>"),
    (f"void {NATIVE}sbtopk::gatherTopK<float, unsigned int, 2, false>(x)", "sampling", None),
    (f"void {NATIVE}elementwise_kernel<128, 4, {NATIVE}gpu_kernel_impl_nocast<{NATIVE}"
     "direct_copy_kernel_cuda(at::TensorIteratorBase&)::{lambda()#3}> >(int)",
     "copy", "elementwise_kernel<direct_copy_kernel_cuda>"),
    (f"void {NATIVE}(anonymous namespace)::CatArrayBatchedCopy<unsigned int, 4, 64, 64>(x)", "copy",
     "CatArrayBatchedCopy"),
    ("Memcpy DtoD (Device -> Device)", "copy", "Memcpy DtoD (Device -> Device)"),
    ("Memset (Device)", "copy", "Memset (Device)"),
    (f"void {NATIVE}(anonymous namespace)::vectorized_layer_norm_kernel<float, float>(x)", "norm", None),
    ("void (anonymous namespace)::softmax_warp_forward<float, float, float, 9>(x)", "norm", None),
    ("triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_5", "norm", None),
    ("triton_poi_fused_mul_silu_3", "elementwise", None),
    ("aten::mm", "gemm", "aten::mm"),
    ("aten::addmm", "gemm", "aten::addmm"),
    ("aten::_int_mm", "gemm", "aten::_int_mm"),
    ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention", None),
    ("aten::copy_", "copy", None),
    ("aten::_to_copy", "copy", None),
    ("aten::embedding", "copy", None),
    ("aten::__rshift__", "dequantize", None),
    ("aten::bitwise_right_shift", "dequantize", None),
    ("aten::native_layer_norm", "norm", None),
    ("aten::argmax", "sampling", None),
    ("aten::silu", "elementwise", None),
    ("aten::slice", "overhead", None),
    ("aten::to", "overhead", None),
    ("something_else", "other", "something_else"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "family", "short"), CASES)
def test_a_kernel_is_named_and_sorted(name, family, short):
    shown = readable(name)
    assert family_of(shown) == family
    assert family in FAMILIES
    assert len(shown) <= MAX_NAME
    if short is not None:
        assert shown == short


def test_names_are_bounded_and_in_one_line():
    shown = readable("void k" + "x" * 5000 + "\n")
    assert len(shown) == MAX_NAME
    assert shown.endswith("…")
    assert "\n" not in readable("a\nb")


def test_every_family_has_a_kernel_here():
    assert {family for _, family, _ in CASES} == set(FAMILIES)


KERNELS = Path(kernels.__file__).parent


def test_the_kernels_of_layers_are_all_known():
    """A share of the time that nobody can name explains nothing."""
    found = {
        name
        for path in KERNELS.glob("*.py")
        if path.name != "triton_gptq.py"  # those run once, while a model is made
        for name in re.findall(r"^def (\w*_kernel)\(", path.read_text(), re.MULTILINE)
    }
    families = {name: family_of(name) for name in found}
    assert len(found) > 12
    assert set(families.values()) == {"gemm", "attention", "dequantize", "quantize", "elementwise"}, families
    assert {name for name, family in families.items() if family == "dequantize"} == {
        "_unpack_kernel",
        "weight_only_dequantize_kernel",
    }
