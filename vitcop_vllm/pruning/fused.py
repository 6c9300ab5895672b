"""Whether a GPU's kernels choose tokens, or torch does."""

from types import ModuleType

from torch import Tensor

ENABLED = False
"""Whether CUDA tensors are given to the kernels at all.

Off until it is known what they do on the GPU at hand: they are held against the torch functions
by Triton's interpreter, and compiled for sm_80 and sm_90, but neither shows what a race or a
wrong compilation would do. ``pytest tests/pruning/test_kernels.py`` tells on a machine with a GPU.
"""

MOST_TOKENS = 1024
"""Per picture, for one program compares them all; larger pictures are torch's."""


def kernels_for(values: Tensor) -> ModuleType | None:
    """The module ``kernels`` where it serves these (B, n) values; ``None`` leaves them to torch."""
    if not (ENABLED and values.is_cuda and values.shape[1] <= MOST_TOKENS):
        return None
    # Only here: builds of torch for CPUs come without Triton.
    from vitcop_vllm.pruning import kernels

    return kernels
