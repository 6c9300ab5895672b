"""Imports point one way. The pruning package does not import vLLM; the server does not import
torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from vitcop_vllm.engine.config import SCHEDULER, WORKERS
from vitcop_vllm.engine.families import FAMILIES

ROOT = Path(__file__).parents[1]

# A layer may import from itself and from layers above it in this list.
LAYERS = [
    "vitcop_vllm.adoption",
    "vitcop_vllm.pruning.settings",
    "vitcop_vllm.pruning.budgets",
    "vitcop_vllm.pruning.selector",
    "vitcop_vllm.pruning.selectors",
    "vitcop_vllm.pruning.plan",
    "vitcop_vllm.pruning.identity",
    "vitcop_vllm.pruning",
    "vitcop_vllm.engine",
    "vitcop_vllm.worker",
    "vitcop_vllm.models",
    "vitcop_vllm.plugin",
]


def modules(package: str) -> list[tuple[str, Path]]:
    return [
        (".".join(path.relative_to(ROOT).with_suffix("").parts), path)
        for path in sorted((ROOT / package).rglob("*.py"))
    ]


def imports(path: Path, *, at_run_time_only: bool = True) -> set[str]:
    """Modules that a file imports, also inside functions.

    Imports under ``TYPE_CHECKING`` are left out if ``at_run_time_only``.
    """
    names: set[str] = set()

    def visit(node: ast.AST) -> None:
        if at_run_time_only and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in {path}"
            names.add(str(node.module))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return names


def layer_of(module: str) -> int | None:
    found = [i for i, prefix in enumerate(LAYERS) if (module + ".").startswith(prefix + ".")]
    return min(found) if found else None


@pytest.mark.parametrize(("module", "path"), modules("vitcop_vllm"), ids=lambda v: str(v)[-40:])
def test_imports_point_one_way(module, path):
    layer = layer_of(module)
    if layer is None:
        return
    # A selector's functions take views, whose types only type checkers import.
    is_selector = module.startswith("vitcop_vllm.pruning.selector")
    for imported in imports(path, at_run_time_only=is_selector):
        imported_layer = layer_of(imported)
        assert imported_layer is None or imported_layer <= layer, f"{module} imports {imported}"


@pytest.mark.parametrize(
    ("module", "path"), modules("vitcop_vllm/pruning"), ids=lambda v: str(v)[-40:]
)
def test_the_pruning_package_does_not_import_vllm(module, path):
    roots = {name.split(".")[0] for name in imports(path, at_run_time_only=False)}
    assert "vllm" not in roots
    if module.endswith(("settings", "amount", "budgets", "selector", "plan", "identity")):
        assert "torch" not in {name.split(".")[0] for name in imports(path)}


def test_only_the_kernels_import_triton():
    for module, path in modules("vitcop_vllm"):
        if module.startswith("vitcop_vllm.pruning.kernels"):
            continue
        assert "triton" not in {name.split(".")[0] for name in imports(path)}
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ImportFrom):
                names = {f"{node.module}.{alias.name}" for alias in node.names}
                assert not any(name.startswith("vitcop_vllm.pruning.kernels") for name in names), (
                    module
                )


def test_what_the_server_sees_loads_without_torch():
    loads = (
        "import sys, vitcop_vllm.adoption;"
        "import vitcop_vllm.pruning.amount, vitcop_vllm.pruning.identity;"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", loads], cwd=ROOT, check=True)


@pytest.mark.parametrize(("module", "path"), modules("server"), ids=lambda v: str(v)[-40:])
def test_the_server_imports_only_the_pure_modules(module, path):
    for name in imports(path):
        assert name.split(".")[0] != "torch"
        if name.startswith("vitcop_vllm"):
            assert name in {
                "vitcop_vllm",
                "vitcop_vllm.adoption",
                "vitcop_vllm.pruning.amount",
                "vitcop_vllm.pruning.settings",
                "vitcop_vllm.pruning.selectors",
                "vitcop_vllm.pruning.plan",
                "vitcop_vllm.pruning.identity",
                "vitcop_vllm.demo.checkpoint",
            }, f"{module} imports {name}"


@pytest.mark.parametrize("package", ["vitcop_vllm", "server"])
def test_installed_packages_import_only_installed_packages(package):
    not_installed = {"tests", "benchmarks", "evaluation", "demo"}
    for _, path in modules(package):
        assert not_installed.isdisjoint(name.split(".")[0] for name in imports(path))


@pytest.mark.parametrize("package", ["benchmarks", "evaluation", "demo"])
def test_nothing_imports_tests(package):
    for _, path in modules(package):
        assert "tests" not in {name.split(".")[0] for name in imports(path)}


CUDA_PATH = [
    WORKERS["cuda"],
    SCHEDULER,
    "vitcop_vllm.worker.v2.StagedModelState",
    "vitcop_server.plugin.PruningEndpointPlugin",
    *(family.model.replace(":", ".") for family in FAMILIES.values()),
]
"""Classes of this project that vLLM imports on a CUDA device."""

CHECK_CUDA = """
import importlib, sys
import torch
import triton.language as tl
import vllm  # replaces set_stream, to record the current stream

def current():
    return {
        "Event": torch.Event, "cuda.Event": torch.cuda.Event, "cuda.Stream": torch.cuda.Stream,
        "cuda.stream": torch.cuda.stream, "cuda.current_stream": torch.cuda.current_stream,
        "synchronize": torch.accelerator.synchronize,
        "empty_cache": torch.accelerator.empty_cache,
        "get_memory_info": torch.accelerator.get_memory_info,
        "pin_memory": torch.Tensor.pin_memory, "record_stream": torch.Tensor.record_stream,
        "debug_barrier": tl.debug_barrier,
    }

before = current()
for path in sys.argv[1:]:
    module, _, name = path.rpartition(".")
    getattr(importlib.import_module(module), name)
    replaced = [key for key, value in current().items() if value != before[key]]
    assert not replaced, f"importing {path} replaced {replaced}"
    cpu = [name for name in sys.modules if name.startswith("vllm.v1.worker.cpu")]
    assert not cpu, f"importing {path} imported {cpu}"
from vllm.utils.torch_utils import async_tensor_h2d
assert async_tensor_h2d.__module__ == "vllm.utils.torch_utils", async_tensor_h2d.__module__
"""


def test_nothing_on_the_cuda_path_replaces_torch_s_cuda_functions():
    """Importing vLLM's CPU worker replaces them for the whole process."""
    done = subprocess.run(
        [sys.executable, "-c", CHECK_CUDA, *CUDA_PATH], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
