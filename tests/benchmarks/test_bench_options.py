"""The bench's arguments, and its engines' options."""

import argparse
import json
from typing import Any

import pytest

from benchmarks import prefill
from benchmarks.bench_options import (
    SCENARIOS,
    SMALL_VIDEO,
    VIDEO_SCENARIOS,
    TooLittleMemoryError,
    check_kv_memory,
    engine_names,
    engine_options,
    fill_defaults,
    parse_arguments,
)
from benchmarks.engines import EVS, OURS, STOCK
from benchmarks.shapes import SHAPES, write_checkpoint
from benchmarks.traffic import QUESTION_TOKENS
from vitcop_vllm.demo.checkpoint import DEMO, LLAVA_1_5_7B


def complete(*argv: str, device: Any = "cpu") -> argparse.Namespace:
    arguments = parse_arguments(argv, None)
    fill_defaults(arguments, device)
    return arguments


def options(*argv: str, shape=DEMO, device: Any = "cpu") -> dict[str, Any]:
    return engine_options(complete(*argv, device=device), shape)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--device", "tpu"], "invalid choice"),
        (["--shape", "llava"], "invalid choice"),
        (["--scenarios", "prefil"], "invalid choice"),
        (["--rounds", "0"], "above 0"),
        (["--batches", "1,0"], "above 0"),
        (["--running", "many"], "'many' is not a number above 0"),
        (["--rates", "2,0"], "above 0"),
        (["--plot", "nowhere/speed.png"], "no folder nowhere"),
        (
            ["--shape", "qwen2.5-vl-small", "--scenarios", "prefill", "decode"],
            "video_turns, video_capacity, not decode",
        ),
        (["--shape", "qwen2.5-vl-small", "--peers"], "LLaVA-1.5's shapes only"),
    ],
)
def test_bad_arguments_are_refused(argv, message, capsys):
    with pytest.raises(SystemExit):
        parse_arguments(argv, None)
    assert message in capsys.readouterr().err


def test_scenarios_run_once_each_and_in_order():
    chosen = parse_arguments(["--scenarios", "load", "prefill", "load"], None)
    assert chosen.scenarios == ["prefill", "load"]
    assert parse_arguments([], None).scenarios == [
        name for name in SCENARIOS if name not in (*VIDEO_SCENARIOS, "elastic")
    ]


def test_defaults_suit_the_device_and_the_shape():
    cpu, gpu = complete(), complete(device="gpu")
    assert (cpu.shape, cpu.dtype, gpu.shape, gpu.dtype) == (
        *("demo", "float32"),
        *("llava-1.5-7b", "bfloat16"),
    )
    assert (cpu.compile, cpu.kv_cache_gib, cpu.load_format) == (False, 2, "random")
    assert (gpu.compile, gpu.kv_cache_gib, gpu.load_format) == (True, None, "dummy")
    assert complete("--shape", "small").kv_cache_gib == 6
    assert complete("--shape", "small", "--dtype", "bfloat16").kv_cache_gib == 3
    assert gpu.chat_tokens > cpu.chat_tokens
    assert complete("--no-compile", device="gpu").compile is False
    assert complete("--shape", "llava-1.5-13b", "--load-format", "random").load_format == "random"


def test_images_of_any_size_have_their_own_scenarios_and_boundaries():
    chosen = complete("--shape", "qwen2.5-vl-small")
    assert chosen.scenarios == ["prefill", *VIDEO_SCENARIOS]
    assert (chosen.batches, chosen.kv_cache_gib) == ((1,), 2)
    assert complete("--shape", "internvl-small").scenarios == ["prefill"]
    made = engine_options(chosen, SHAPES[chosen.shape])
    assert made["max_num_batched_tokens"] >= made["max_model_len"] > 2304
    assert made["pruning"] == {"shallow_boundary": 2, "deep_boundary": 20}
    assert "pruning" not in options()
    assert complete("--shape", "qwen2.5-vl-small", "--batches", "1,2").batches == (1, 2)
    assert complete().batches == (1, 4, 16)


def test_engines_share_a_gpu_s_memory_and_keep_its_defaults():
    two = options(device="gpu")
    assert not two.keys() & {"block_size", "kv_cache_memory_bytes"}
    assert two["enforce_eager"] is False
    assert 2 * two["gpu_memory_utilization"] == pytest.approx(0.9)
    three = options("--peers", device="gpu")
    assert 3 * three["gpu_memory_utilization"] == pytest.approx(0.9)
    assert options("--kv-cache-gib", "2", device="gpu")["kv_cache_memory_bytes"] == 2 << 30
    cpu = options()
    assert (cpu["kv_cache_memory_bytes"], cpu["enforce_eager"]) == (2 << 30, True)
    assert "gpu_memory_utilization" not in cpu


def test_a_step_has_room_for_all_concurrent_prompts():
    prompt = 576 + len("USER: <image>\nWhat is in this picture? Answer in one word. ASSISTANT:")
    few = options("--scenarios", "turns", "capacity", "cold_start")
    assert (few["max_model_len"], few["max_num_batched_tokens"]) == (4096, 4096)
    assert few["limit_mm_per_prompt"] == {"image": 1}
    batch = options("--scenarios", "prefill", "--batches", "1,80")
    assert batch["max_num_batched_tokens"] >= 80 * prompt
    assert batch["max_num_seqs"] == 80
    decode = options("--scenarios", "decode", "--running", "32", "--tokens", "9000")
    assert decode["max_num_batched_tokens"] >= 32 * prompt
    assert decode["max_model_len"] >= 9000 + prompt
    images = options("--scenarios", "images")
    assert images["max_model_len"] >= max(prefill.IMAGES) * 576 + prompt - 576
    assert images["limit_mm_per_prompt"] == {"image": max(prefill.IMAGES)}
    clients = options("--scenarios", "load", "--chat-tokens", "4000")
    # Answers have up to 1.5 times the mean length.
    assert clients["max_model_len"] >= prompt + QUESTION_TOKENS + 1.5 * 4000
    assert options("--scenarios", "load", "--clients", "16,80")["max_num_seqs"] == 80
    for made in (few, batch, decode, images, clients):
        # Otherwise vLLM would split the longest prompt.
        assert made["max_num_batched_tokens"] >= made["max_model_len"]


def test_videos_have_a_third_engine_and_room():
    chosen = complete("--shape", "qwen3-vl-small", "--scenarios", "video_decode")
    assert engine_names(chosen) == (STOCK, OURS, EVS)
    made = engine_options(chosen, SHAPES[chosen.shape])
    assert made["limit_mm_per_prompt"] == {"image": 1, "video": 1}
    frames, size = SMALL_VIDEO
    visual = frames * (size // 32) ** 2
    assert made["max_num_batched_tokens"] >= 16 * (visual + 32)
    images = complete("--shape", "qwen3-vl-small", "--scenarios", "prefill")
    assert engine_names(images) == (STOCK, OURS)
    assert engine_options(images, SHAPES[chosen.shape])["limit_mm_per_prompt"] == {"image": 1}


def test_concurrent_requests_must_fit_into_kv_memory():
    at_once = complete("--scenarios", "prefill", "decode", "--batches", "16", "--running", "32")
    check_kv_memory(at_once, DEMO, kv_blocks=32 * 6, block_size=128)
    with pytest.raises(TooLittleMemoryError, match=r"32 requests at once, .* for 31: .*--kv-cache"):
        check_kv_memory(at_once, DEMO, kv_blocks=32 * 6 - 1, block_size=128)
    check_kv_memory(complete("--scenarios", "prefill"), DEMO, kv_blocks=16 * 6, block_size=128)
    check_kv_memory(complete("--scenarios", "turns"), DEMO, kv_blocks=6, block_size=128)
    chat = complete("--scenarios", "load", "--chat-tokens", "128")
    check_kv_memory(chat, DEMO, kv_blocks=32 * 8, block_size=128)
    with pytest.raises(TooLittleMemoryError, match=r"scenario load .* without --peers"):
        check_kv_memory(chat, DEMO, kv_blocks=32 * 8 - 1, block_size=128)


def test_published_shapes_get_dummy_weights(tmp_path):
    chosen = options("--shape", "llava-1.5-7b", shape=LLAVA_1_5_7B)
    write_checkpoint(tmp_path, LLAVA_1_5_7B, chosen)
    assert chosen["load_format"] == "dummy"
    assert not list(tmp_path.glob("*.safetensors"))
    config = json.loads((tmp_path / "config.json").read_text())["text_config"]
    assert config["vocab_size"] == 32064
    assert config["max_position_embeddings"] == chosen["max_model_len"] > 8 * 576
