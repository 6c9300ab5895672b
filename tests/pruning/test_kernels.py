"""The Triton kernels for selection: interpreted, compiled for GPUs, and run if there is a GPU."""

import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

from vitcop_vllm.pruning.kernel_set import TORCH, KernelSet, kernel_set

pytest.importorskip("triton", reason="this build of torch comes without Triton")

from vitcop_vllm.pruning.kernels import MAX_TOKENS, TRITON

ROOT = Path(__file__).parents[2]
MODES = ["interpreted", *(["compiled"] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("mode", MODES)
def test_kernels_agree_with_torch(mode):
    environment = {**os.environ, "TRITON_INTERPRET": "1" if mode == "interpreted" else "0"}
    # Triton's interpreter uses numpy, which warns of NaN.
    options = ["--noconftest", "-W", "ignore::RuntimeWarning"]
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "tests/pruning/kernel_cases.py"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


class _RecordedKernel:
    """Replaces a kernel and records the arguments of its launches."""

    def __init__(self, kernel, recorded):
        self.kernel, self.recorded = kernel, recorded

    def __getitem__(self, grid):
        return lambda *args, **options: self.recorded.append((self.kernel, grid, args, options))


LARGEST_OF_LLAVA = (288, 51, 253)  # n1, K, n2
LARGEST = (MAX_TOKENS, 184, 900)


@cache
def launches(n1, num_centres, n2):
    """(kernel, grid, arguments, options) of every kernel, for one image of these counts."""
    from vitcop_vllm.pruning.kernels import clustering, order, selection

    recorded: list[tuple[Any, ...]] = []
    kernels = set()
    with pytest.MonkeyPatch.context() as patch:
        for module in (clustering, order, selection):
            for name, value in vars(module).copy().items():
                if name.endswith("_kernel"):
                    kernels.add(value)
                    patch.setattr(module, name, _RecordedKernel(value, recorded))
        TRITON.most_salient(torch.rand(1, min(2 * n1, MAX_TOKENS)), n1)
        TRITON.cluster_labels(torch.rand(1, n1, 8), torch.rand(1, n1, 2), num_centres)
        norms, labels = torch.rand(1, n1), torch.zeros(1, n1, dtype=torch.int64)
        selected = TRITON.select_stage_two(norms, labels, num_centres, n2)
        TRITON.select_stage_two(norms, labels, num_centres, num_centres - 1)
        TRITON.merge_tokens(torch.rand(1, n1, 4096).bfloat16(), selected)
        TRITON.select_stage_three(norms[:, :n2], n2 // 5)
    assert {kernel for kernel, *_ in recorded} == kernels
    return recorded


def _signature(argument) -> str:
    if isinstance(argument, torch.Tensor):
        from triton.runtime.jit import mangle_type

        return str(mangle_type(argument))
    return {int: "i32", float: "fp32"}[type(argument)]


def _compile(kernel, args, options, capability):
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    given = dict(zip(kernel.arg_names, args, strict=True))
    fixed = {p.name: given[p.name] for p in kernel.params if p.is_constexpr}
    types = {k: "constexpr" if k in fixed else _signature(v) for k, v in given.items()}
    # On a GPU, tensors are aligned to 16 bytes, and Triton specialises kernels for that.
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, argument in enumerate(args)
        if isinstance(argument, torch.Tensor)
    }
    return compile_kernel(
        ASTSource(fn=kernel, signature=types, constexprs=fixed, attrs=aligned),
        target=GPUTarget("cuda", capability, 32),
        options=options,
    )


@pytest.mark.parametrize(
    ("capability", "image"),
    [(capability, LARGEST_OF_LLAVA) for capability in (75, 80, 89, 90, 100, 120)]
    + [(capability, LARGEST) for capability in (75, 90)],
)
def test_kernels_compile_for_gpus(capability, image):
    for kernel, _, args, options in launches(*image):
        compiled = _compile(kernel, args, options, capability)
        assert compiled.asm["cubin"]
        assert compiled.metadata.shared <= 4096  # bytes per program; every GPU has 48 KiB
        ptx = compiled.asm["ptx"]
        if kernel.__name__ in ("_stage_two_kernel", "_parent_kernel"):
            # A fused multiply-add does not round the product. Comparisons with the radius and
            # halves of quotas could then differ from torch's.
            assert "fma." not in ptx
        # Approximate division could round halves of quotas differently from torch.
        assert not re.search(r"div\.(full|approx)", ptx)
        if dict(zip(kernel.arg_names, args, strict=True)).get("MANY_CLUSTERS") is False:
            assert "div.rn.f32" in ptx


def test_the_setting_selects_the_kernels():
    assert kernel_set("auto") is TORCH
    assert kernel_set("torch") is TORCH
    assert kernel_set("triton") is TRITON


def test_images_too_large_for_one_program_use_torch():
    n = MAX_TOKENS + 1
    values, labels = torch.rand(1, n), torch.zeros(1, n, dtype=torch.int64)
    arguments: Any = {
        "most_salient": (values, 5),
        "cluster_labels": (torch.rand(1, n, 4), torch.rand(1, n, 2), 3),
        "select_stage_two": (values, labels, 1, 9),
        "merge_tokens": (torch.rand(1, n, 4), TORCH.select_stage_two(values, labels, 1, 9)),
        "select_stage_three": (values, 7),
    }
    assert set(arguments) == set(KernelSet._fields)
    for name, given in arguments.items():
        results, expected = getattr(TRITON, name)(*given), getattr(TORCH, name)(*given)
        for one, other in zip(tree_leaves(results), tree_leaves(expected), strict=True):
            assert torch.equal(one, other), name
