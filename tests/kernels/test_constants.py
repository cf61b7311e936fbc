"""A mark for the compiler that does not import it."""

from __future__ import annotations

import subprocess
import sys

import torch

from harness.kernels.constants import constant_when_compiled


def test_it_is_the_mark_that_torch_sets():
    def one():
        return 1

    def other():
        return 1

    assert vars(constant_when_compiled(one)) == vars(torch.compiler.assume_constant_result(other)) != {}
    assert constant_when_compiled(one) is one


def test_reading_all_methods_imports_neither_the_compiler_nor_statistics():
    code = (
        "import sys\n"
        "from harness.plugins import load_plugins\n"
        "assert len(load_plugins(strict=True).methods) > 30\n"
        "heavy = {'torch._dynamo', 'torch._inductor', 'scipy.stats', 'transformers.modeling_utils'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
