"""Makes vLLM fork its processes, which need not import it again then.

``python -m tests.forking -m MODULE ...`` runs a module so.
"""

import runpy
import sys
from multiprocessing import context


def fork_processes() -> None:
    """Make vLLM fork its processes in this process, from now on; on a GPU, do nothing."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return  # CUDA does not work after a fork
    # vLLM's CPU platform chooses "spawn", whatever the environment says.
    contexts = context._concrete_contexts  # type: ignore[attr-defined]
    contexts["spawn"] = contexts["fork"]
    import torch

    # A fork has no threads of OpenMP, but waits for them. vLLM's workers set their own number.
    torch.set_num_threads(1)


if __name__ == "__main__":
    fork_processes()
    del sys.argv[:2]  # this module and -m
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
