# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
# mypy: disallow-untyped-calls=False
"""Asking for weights before a kernel may begin (see `harness.kernels.overlap`)."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["fetch_rows"]


@triton.jit
def fetch_rows(w_ptr, first_row, N, K, ROWS: tl.constexpr, THREADS: tl.constexpr):
    """Have ROWS rows of a matrix [N, K], which lie together, brought to the second-level cache, if all are
    there. That reads no value, so it is harmless whatever the kernels before are still writing.

    Rows are a multiple of 16 bytes, and so is where the matrix begins. THREADS: of the program.
    """
    thread = tl.arange(0, THREADS)
    size = thread * 0 + ROWS * K * (w_ptr.dtype.element_ty.primitive_bitwidth // 8)
    start = (w_ptr + first_row.to(tl.int64) * K + thread).to(tl.int64)
    start = tl.where((thread == 0) & (first_row + ROWS <= N), start, 0)
    tl.inline_asm_elementwise(
        "{ .reg .pred there; setp.ne.u64 there, $1, 0;"
        " @there cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }",
        "=r,l,r", [start, size], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
