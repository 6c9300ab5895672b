"""The kernels that choose tokens on a GPU, mostly without one."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from vitcop_vllm.pruning import fused

pytest.importorskip("triton", reason="this build of torch comes without Triton")

ROOT = Path(__file__).parents[2]
MODES = ["interpreted", *(["compiled"] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("mode", MODES)
def test_kernels_agree_with_torch(mode):
    environment = {**os.environ, "TRITON_INTERPRET": "1" if mode == "interpreted" else "0"}
    # No number is what numpy, which interprets, warns of.
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


class _Launches:
    """Stands in for a kernel and takes down what it would be launched with."""

    def __init__(self, kernel, taken):
        self.kernel, self.taken = kernel, taken

    def __getitem__(self, grid):
        return lambda *args, **options: self.taken.append((self.kernel, grid, args, options))


@pytest.fixture
def launches(monkeypatch):
    """Kernels, grids, arguments and options for LLaVA-1.5-7B's least pruned pictures."""
    from vitcop_vllm.pruning import kernels
    from vitcop_vllm.pruning.kernels import clustering, order, selection

    taken: list[tuple[Any, ...]] = []
    for module in (clustering, order, selection):
        for name, value in vars(module).copy().items():
            if name.endswith("_kernel"):
                monkeypatch.setattr(module, name, _Launches(value, taken))
    saliency, norms = torch.rand(1, 576), torch.rand(1, 288)
    kernels.first(saliency, 288, descending=True)
    kernels.cluster_labels(torch.rand(1, 288, 8), torch.rand(1, 288, 2), 51, 8.0, 0.6, 1e-13, 1e-9)
    labels = torch.zeros(1, 288, dtype=torch.int64)
    index, merged, groups = kernels.select_stage_two(norms, labels, 51, 253)
    kernels.select_stage_two(norms, labels, 51, 20)
    kernels.merge_tokens(torch.rand(1, 288, 4096).bfloat16(), index, merged, groups)
    return taken


def _signature(argument) -> str:
    if isinstance(argument, torch.Tensor):
        from triton.runtime.jit import mangle_type

        return str(mangle_type(argument))
    return {int: "i32", float: "fp32"}[type(argument)]


@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_for_gpus(capability, launches):
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    for kernel, _, args, options in launches:
        given = dict(zip(kernel.arg_names, args, strict=True))
        fixed = {p.name: given[p.name] for p in kernel.params if p.is_constexpr}
        types = {k: "constexpr" if k in fixed else _signature(v) for k, v in given.items()}
        compiled = compile_kernel(
            ASTSource(fn=kernel, signature=types, constexprs=fixed),
            target=GPUTarget("cuda", capability, 32),
            options=options,
        )
        assert compiled.asm["cubin"]
        if kernel.__name__ in ("_stage_two_kernel", "_parent_kernel"):
            # A product fused into a sum is not rounded: a radius that is met exactly would come
            # out otherwise than torch's.
            assert "fma." not in compiled.asm["ptx"]
        # Approximate division would round halves of quotas otherwise than torch does.
        assert not re.search(r"div\.(full|approx)", compiled.asm["ptx"])
        if kernel.__name__ == "_stage_two_kernel":
            assert ("div.rn.f32" in compiled.asm["ptx"]) is (not fixed["MANY_CLUSTERS"])


def test_kernels_serve_gpus_alone_and_only_when_enabled(monkeypatch):
    with FakeTensorMode():
        on_gpu = torch.ones(2, fused.MOST_TOKENS, device="cuda")
        too_many = torch.ones(2, fused.MOST_TOKENS + 1, device="cuda")
        assert fused.kernels_for(on_gpu) is None
        monkeypatch.setattr(fused, "ENABLED", True)
        from vitcop_vllm.pruning import kernels

        assert fused.kernels_for(on_gpu) is kernels
        assert fused.kernels_for(too_many) is None
    assert fused.kernels_for(torch.ones(2, 2)) is None
