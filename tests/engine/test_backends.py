"""The attention backend that start-up chooses for each NVIDIA GPU, by vLLM's own rules."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vitcop_vllm.engine.attention import create_staged_attention_backend

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]

CARDS = [
    # compute capability, KV cache dtype, backend; None: no staged backend supports it
    ((7, 5), "auto", "TRITON_ATTN"),
    ((7, 5), "fp8", None),
    ((7, 5), "bfloat16", None),
    ((8, 0), "auto", "FLASH_ATTN"),
    ((8, 0), "fp8", None),
    ((8, 6), "auto", "FLASH_ATTN"),
    ((8, 6), "fp8", None),
    ((8, 9), "auto", "FLASH_ATTN"),
    ((8, 9), "fp8", "TRITON_ATTN"),
    ((9, 0), "auto", "FLASH_ATTN"),
    ((9, 0), "fp8", "FLASH_ATTN"),
    ((9, 0), "fp8_e5m2", "TRITON_ATTN"),
    ((10, 0), "auto", "FLASH_ATTN"),
    ((10, 0), "fp8", "FLASH_ATTN"),
    ((10, 3), "auto", "FLASH_ATTN"),
    ((10, 3), "fp8", "FLASH_ATTN"),
    ((12, 0), "auto", "FLASH_ATTN"),
    ((12, 0), "fp8", "TRITON_ATTN"),
]

CHOSEN: list[tuple[tuple[int, int], dict[str, Any], str]] = [
    # compute capability, options, backend or part of the error
    ((9, 0), {"attention_backend": "TRITON_ATTN"}, "TRITON_ATTN"),
    ((10, 0), {"attention_backend": "FLASH_ATTN"}, "FLASH_ATTN"),
    (
        (9, 0),
        {"attention_backend": "FLASHINFER"},
        "set --attention-backend to FLASH_ATTN or TRITON_ATTN, or leave it out",
    ),
    (
        (7, 5),
        {"attention_backend": "FLASH_ATTN"},
        "(compute capability 7.5) with KV cache dtype auto; set --attention-backend to "
        "TRITON_ATTN, or leave it out",
    ),
    (
        (8, 9),
        {"attention_backend": "FLASH_ATTN", "kv_cache_dtype": "fp8"},
        "with KV cache dtype fp8; set --attention-backend to TRITON_ATTN, or leave it out",
    ),
    (
        (8, 0),
        {"attention_backend": "TRITON_ATTN", "kv_cache_dtype": "fp8"},
        "no attention backend for Some GPU (compute capability 8.0) with KV cache dtype fp8; "
        "set --kv-cache-dtype auto",
    ),
    (
        (9, 0),
        {"attention_config": {"backend_per_kind": {"full_attention": "FLASHINFER"}}},
        "cannot use attention backend FLASHINFER",
    ),
    ((9, 0), {"dtype": "float32"}, "TRITON_ATTN"),
]


def choices_of(cases: list[Any]) -> list[dict[str, Any]]:
    """Start-up's choice or error in cases of (compute capability, options); in one process."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.fake_cuda", json.dumps(cases)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    results: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return results


@pytest.fixture(scope="module")
def choices(checkpoint):
    """(compute capability, options) -> start-up's choice or error; one process for all cases."""
    cases: list[Any] = [(card, {"kv_cache_dtype": dtype}) for card, dtype, _ in CARDS]
    cases += [(card, options) for card, options, _ in CHOSEN]
    shared = {"model": str(checkpoint), "dtype": "float16"}
    results = choices_of([(card, {**shared, **options}) for card, options in cases])
    return {
        (tuple(card), json.dumps(options)): result
        for (card, options), result in zip(cases, results, strict=True)
    }


@pytest.mark.parametrize(("card", "cache_dtype", "backend"), CARDS)
def test_a_gpu_starts_with_default_settings_or_the_error_names_the_option_to_change(
    choices, card, cache_dtype, backend
):
    result = choices[card, json.dumps({"kv_cache_dtype": cache_dtype})]
    if backend is None:
        assert f"with KV cache dtype {cache_dtype}; set --kv-cache-dtype auto" in result["error"]
    else:
        assert result == {
            "backend": backend,
            "worker": "vitcop_vllm.worker.gpu_worker.StagedGPUWorker",
            "quantization": None,
        }


@pytest.mark.parametrize(("card", "options", "outcome"), CHOSEN)
def test_a_chosen_backend_is_kept_or_the_error_names_the_valid_options(
    choices, card, options, outcome
):
    result = choices[card, json.dumps(options)]
    assert result.get("backend") == outcome or outcome in result["error"]


def test_an_unknown_backend_is_refused():
    from vllm.v1.attention.backends.flex_attention import FlexAttentionBackend

    with pytest.raises(
        ValueError, match="no pruned layer can run on attention backend FLEX_ATTENTION"
    ):
        create_staged_attention_backend(FlexAttentionBackend)
