"""Whether torch can compile for CPUs here."""

import torch


def has_cpp_compiler() -> bool:
    """Whether inductor finds a C++ compiler: ``g++``, or what ``CXX`` names."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return False
    return True


def compile_nothing() -> None:
    """Let functions that vLLM decorates with ``torch.compile`` run as they are, in this process.

    vLLM compiles small functions at their first use, for log-probabilities and top-p, also with
    ``--enforce-eager``. Without a compiler, the first request that needs one ends the engine.
    """
    torch.compiler.set_stance("force_eager")
