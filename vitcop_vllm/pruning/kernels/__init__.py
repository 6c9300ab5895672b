"""Choosing tokens on a GPU with one launch where torch takes dozens: Triton kernels.

Each function returns what the torch function of its name returns, with indices, groups and
labels bit for bit; ``fused`` decides who is asked. Where ranks matter one program serves one
picture. It counts them: to compare every token with every other is n^2 integer operations, and
takes neither a sort nor a second launch.

Threads hand values to each other through memory, with a barrier in between.
"""

from vitcop_vllm.pruning.kernels.clustering import cluster_labels
from vitcop_vllm.pruning.kernels.order import first
from vitcop_vllm.pruning.kernels.selection import merge_tokens, select_stage_two

__all__ = ["cluster_labels", "first", "merge_tokens", "select_stage_two"]
