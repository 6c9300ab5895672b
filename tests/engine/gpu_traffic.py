"""A program that sends mixed traffic to a tiny model's engine on a GPU.

Ratios are mixed, prompts chunked, requests preempted and prefixes reused. With
``VLLM_GPU_SYNC_CHECK=error`` it fails if the host waits for the GPU.
"""

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

ROUNDS = 4


def describe_device() -> None:
    """Print the GPU and the versions of CUDA, torch and vLLM.

    Raises:
        SystemExit: If there is no NVIDIA GPU.
    """
    import torch
    import vllm
    from vllm.platforms import current_platform

    if not (current_platform.is_cuda() and torch.cuda.is_available()):
        raise SystemExit(f"No NVIDIA GPU: vLLM {vllm.__version__} runs on {current_platform}.")
    print(
        f"{torch.cuda.get_device_name()}, compute capability "
        f"{torch.cuda.get_device_capability()}, CUDA {torch.version.cuda}, torch "
        f"{torch.__version__}, vLLM {vllm.__version__}"
    )


def check(llm: Any) -> None:
    """Send rounds of requests. Afterwards every KV block must be free again."""
    from tests.engine.requests import RequestSpec, generate
    from tests.engine.scheduling import engine_core

    pool = engine_core(llm).scheduler.kv_cache_manager.block_pool
    assert llm.reset_prefix_cache()
    free = pool.get_num_free_blocks()
    for round_number in range(ROUNDS):
        seeds = range(10 * round_number, 10 * round_number + 4)
        specs = [
            RequestSpec("What is it?", (seeds[0],), 8 / 9, max_tokens=24),
            RequestSpec("Which is larger? " * 20, (seeds[1], seeds[2]), 2 / 3, max_tokens=40),
            RequestSpec("unpruned", (seeds[3],), 0.0, max_tokens=16),
            RequestSpec("no image, " * 60, max_tokens=32),
            RequestSpec("What is it?", (seeds[0],), 7 / 9, max_tokens=8),
            *(RequestSpec(f"number {n}", (seeds[0],), 8 / 9, max_tokens=12) for n in range(12)),
        ]
        answers = generate(llm, specs, reuse=round_number % 2 == 1)
        assert [len(answer.tokens) for answer in answers] == [spec.max_tokens for spec in specs]
        again = generate(llm, [specs[0]], reuse=True)
        assert again[0].reused > 0
    assert llm.reset_prefix_cache()
    assert pool.get_num_free_blocks() == free


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device-only", action="store_true")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--kernels", default="auto")
    options = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    describe_device()
    if options.device_only:
        return
    from vllm import LLM

    from vitcop_vllm.demo.checkpoint import TINY, save_random_llava

    with tempfile.TemporaryDirectory() as folder:
        save_random_llava(Path(folder), TINY)
        llm = LLM(
            folder,
            dtype="bfloat16",
            enforce_eager=options.eager,
            max_model_len=2048,
            max_num_batched_tokens=600,  # prompts are chunked
            max_num_seqs=16,
            limit_mm_per_prompt={"image": 4},
            kv_cache_memory_bytes=8 << 20,  # requests are preempted
            additional_config={"pruning": {"kernels": options.kernels}},
        )
        check(llm)


if __name__ == "__main__":
    main()
