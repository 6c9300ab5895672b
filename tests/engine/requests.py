"""Requests that tests send to an engine, in this process or in a child process, and the answers."""

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from tests.engine.child import run_in_child

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput

IMAGE_TOKEN = 3
"""Id of the placeholder token in the tests' LLaVA checkpoints."""

IMAGE_MARKS = {
    "llava": "<image>\n",
    "llava_next": "<image>\n",
    "llava_onevision": "<image>\n",
    "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "qwen3_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "qwen3_vl_moe": "<|vision_start|><|image_pad|><|vision_end|>",
    "qwen3_5": "<|vision_start|><|image_pad|><|vision_end|>",
    "qwen3_5_moe": "<|vision_start|><|image_pad|><|vision_end|>",
    "gemma3": "<start_of_image>",
    "mistral3": "[IMG]",
    "internvl_chat": "<image>",
    "internvl": "<IMG_CONTEXT>",
}
"""Model type -> the text of an image in a prompt."""

VIDEO_MARK = "<|vision_start|><|video_pad|><|vision_end|>"
"""The text of a video in a prompt of Qwen-VL."""

VIDEO_MARKS = {
    "qwen2_5_vl": VIDEO_MARK,
    "qwen3_vl": VIDEO_MARK,
    "qwen3_vl_moe": VIDEO_MARK,
    "llava_onevision": "<video>\n",
}
"""Model type, if it takes videos -> the text of a video in a prompt."""

VIDEOS = {
    # Frames, width, height, frames per second of the file, and every how many are sampled.
    1: (6, 220, 300, 8.0, 3),
    2: (9, 300, 200, 30.0, 7),  # an odd number: the last frame is repeated
    3: (4, 140, 120, 5.0, 1),
    4: (14, 390, 260, 24.0, 12),
    5: (2, 560, 84, 2.0, 1),
    6: (6, 180, 330, 10.0, 2),
}
"""Seed -> a video's size."""

SIZES = {
    101: (840, 56),  # a strip: 2 rows of 30 columns, where tokens are 28 pixels wide
    102: (56, 840),
    103: (308, 196),
    104: (140, 532),
    105: (560, 392),
    106: (420, 532),
    # For soaks: photographs, some of which the processor scales down,
    201: (448, 448),
    202: (500, 400),
    203: (336, 392),
    204: (900, 700),
    205: (640, 1100),
    206: (1400, 500),
    # small images, which it scales up, and thin ones of one or two visual tokens across.
    207: (20, 20),
    208: (56, 56),
    209: (1200, 40),
    210: (40, 700),
    211: (28, 560),
    212: (900, 60),
}
"""Seed -> fixed width and height in pixels. Other seeds draw a random size."""

BLOCK = 32
"""Tokens of a KV block."""

ENGINE_OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 2048,
    # Below the tokens of two unpruned images, so that prompts are chunked.
    "max_num_batched_tokens": 400,
    "max_num_seqs": 16,
    "limit_mm_per_prompt": {"image": 4},
    "kv_cache_memory_bytes": 128 << 20,  # a session keeps several engines
    "block_size": BLOCK,
    "trust_remote_code": True,  # for InternVLChatModel's configuration
}
# Do not import torch here: it reads its number of threads at import, and conftest.py, which
# imports this module, sets that number later.
if Path("/dev/nvidiactl").exists():
    ENGINE_OPTIONS["attention_backend"] = "TRITON_ATTN"  # runs in float32, like the oracle


@dataclass(frozen=True)
class RequestSpec:
    """A request to send. ``images`` and ``videos`` are seeds; with ``ratio`` None no ratio is sent.

    ``order`` has an i per image and a v per video, in the order of the prompt; default: images
    first. ``priority`` is for engines that the test steps; smaller comes first.
    """

    text: str
    images: tuple[int, ...] = ()
    ratio: float | None = None
    max_tokens: int = 8
    sampling: dict[str, Any] = field(default_factory=dict)
    system: str = ""
    cache_salt: str | None = None
    priority: int = 0
    videos: tuple[int, ...] = ()
    order: str = ""

    def media(self) -> list[tuple[str, int]]:
        """Kind and seed of each image (i) and video (v), in the order of the prompt."""
        seeds = {"i": iter(self.images), "v": iter(self.videos)}
        order = self.order or "i" * len(self.images) + "v" * len(self.videos)
        return [(kind, next(seeds[kind])) for kind in order]

    def prompt(self, model_type: str = "llava") -> dict[str, Any]:
        marks = {"i": IMAGE_MARKS[model_type], "v": VIDEO_MARKS.get(model_type)}
        prompt: dict[str, Any] = {
            "prompt": self.system
            + "USER: "
            + "".join(str(marks[kind]) for kind, _ in self.media())
            + self.text
            + " ASSISTANT:"
        }
        if self.cache_salt is not None:
            prompt["cache_salt"] = self.cache_salt
        media: dict[str, Any] = {}
        if self.images:
            media["image"] = [sample_image(seed) for seed in self.images]
        if self.videos:
            media["video"] = [sample_video(seed) for seed in self.videos]
        if media:
            prompt["multi_modal_data"] = media
        if self.ratio is not None:
            prompt["mm_processor_kwargs"] = {"pruning_ratio": self.ratio}
        return prompt

    def sampling_params(self) -> Any:
        from vllm import SamplingParams

        options = {"temperature": 0.0, **self.sampling}
        return SamplingParams(max_tokens=self.max_tokens, logprobs=3, ignore_eos=True, **options)


@dataclass(frozen=True)
class Answer:
    """An engine's answer.

    Attributes:
        prompt: Token ids of the prompt, with its placeholders.
        tokens: Token ids of the answer.
        logprobs: For each answer token, the log-probabilities of the best tokens.
        reused: Prompt tokens read from the prefix cache.
    """

    prompt: list[int]
    tokens: list[int]
    logprobs: list[dict[int, float]]
    reused: int = field(default=0, compare=False)


def answer_of(output: "RequestOutput") -> Answer:
    """The answer in the output of a finished request."""
    return Answer(
        list(output.prompt_token_ids or ()),
        list(output.outputs[0].token_ids),
        [
            {token: entry.logprob for token, entry in step.items()}
            for step in output.outputs[0].logprobs or ()
        ],
        output.num_cached_tokens or 0,
    )


def sample_image(seed: int) -> Image.Image:
    """An image whose left half is smooth and whose right half is noisy."""
    rng = np.random.default_rng(seed)
    width, height = int(rng.integers(180, 420)), int(rng.integers(180, 420))
    width, height = SIZES.get(seed, (width, height))
    coarse = Image.fromarray(rng.integers(0, 255, (6, 6, 3), dtype=np.uint8))
    base = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
    noise = rng.integers(-60, 60, base.shape, dtype=np.int16)
    noise[:, : width // 2] = 0
    return Image.fromarray(np.clip(base + noise, 0, 255).astype(np.uint8))


def sample_video(seed: int) -> tuple[np.ndarray, dict[str, Any]]:
    """A video's frames, in which a square moves, and what vLLM's loader says of it."""
    num_frames, width, height, fps, step = VIDEOS[seed]
    rng = np.random.default_rng(1000 + seed)
    coarse = Image.fromarray(rng.integers(0, 255, (5, 5, 3), dtype=np.uint8))
    still = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
    frames = np.stack([still] * num_frames)
    side = min(width, height) // 3
    for number, frame in enumerate(frames):
        left = (width - side) * number // max(num_frames - 1, 1)
        frame[side : 2 * side, left : left + side] = rng.integers(0, 255, 3)
        frame[:, :40] ^= rng.integers(0, 60, (height, 40, 3), dtype=np.uint8)
    total = num_frames * step
    return frames, {
        "fps": fps,
        "duration": total / fps,
        "total_num_frames": total,
        "frames_indices": [*range(0, total, step)],
        "video_backend": "opencv",
        "do_sample_frames": False,
    }


def model_type(engine: Any) -> str:
    """Model type of an ``LLM`` or of an engine."""
    return str(engine.model_config.hf_config.model_type)


def generate(llm: "LLM", specs: list[RequestSpec], *, reuse: bool = False) -> list[Answer]:
    """Answers of one continuous batch; clears the prefix cache first unless ``reuse``."""
    if not reuse:
        assert llm.reset_prefix_cache()
    outputs = llm.generate(
        [spec.prompt(model_type(llm)) for spec in specs],
        [spec.sampling_params() for spec in specs],
        use_tqdm=False,
    )
    return [answer_of(output) for output in outputs]


def generate_in_turn(llm: "LLM", specs: list[RequestSpec]) -> list[Answer]:
    """Answers of requests sent one after the other; each can reuse the prefixes of earlier ones."""
    assert llm.reset_prefix_cache()
    return [generate(llm, [spec], reuse=True)[0] for spec in specs]


def generate_in_process(
    checkpoint: Path,
    specs: list[RequestSpec],
    *,
    env: dict[str, str] | None = None,
    in_turn: list[RequestSpec] | None = None,
    **options: Any,
) -> list[Answer]:
    """Answers of an engine in a child process, started with ``options``.

    ``specs`` are sent as one batch, then ``in_turn`` one after the other.
    """
    chosen = {**ENGINE_OPTIONS, **options}
    answers: list[Answer] = run_in_child(
        _answers_of, checkpoint, specs, in_turn or [], chosen, environment=env
    )
    return answers


def _answers_of(
    checkpoint: Path, together: list[RequestSpec], in_turn: list[RequestSpec], options: Any
) -> list[Answer]:
    from vllm import LLM

    llm = LLM(str(checkpoint), **options)
    is_stock = os.environ.get("VLLM_PLUGINS") == ""
    assert is_stock == ("vitcop_vllm.plugin" not in sys.modules)
    return (generate(llm, together) if together else []) + generate_in_turn(llm, in_turn)


STOCK: dict[str, Any] = {
    "block_size": BLOCK,
    # vLLM's CPU runner crashes on a seeded request whose prompt is chunked.
    "max_num_batched_tokens": 4096,
}
"""Options with which stock vLLM runs like the pruned engine."""
