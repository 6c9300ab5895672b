"""The model families that the tests of this folder run for."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, partial
from importlib import import_module
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from benchmarks import internvl_checkpoint, llava_onevision_checkpoint, qwen_checkpoint
from benchmarks.internvl_checkpoint import save_random_internvl
from benchmarks.llava_next_checkpoint import save_random_llava_next
from benchmarks.llava_onevision_checkpoint import save_random_llava_onevision
from benchmarks.qwen3_checkpoint import Qwen3Shape, save_random_qwen3
from benchmarks.qwen_checkpoint import save_random_qwen
from tests.checkpoints import tiny
from tests.checkpoints.internvl_chat import save_random_internvl_chat
from tests.engine.requests import (
    ENGINE_OPTIONS,
    IMAGE_MARKS,
    IMAGE_TOKEN,
    VIDEOS,
    sample_image,
)
from vitcop_vllm.demo.checkpoint import TINY, save_random_llava
from vitcop_vllm.pruning.plan import VisualTokenCounts, plan_counts, plan_video
from vitcop_vllm.pruning.settings import PruningSettings

if TYPE_CHECKING:
    from tests.engine.dense_oracle import DenseModel


class Saved(Protocol):
    """What an engine needs of a family: see :class:`Family`."""

    def __hash__(self) -> int: ...

    @property
    def name(self) -> str: ...

    @property
    def save(self) -> Callable[[Path], None]: ...

    @property
    def options(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Family:
    """A model family and its tiny checkpoint.

    Attributes:
        name: Model type, as in the checkpoint's configuration.
        placeholder: Text of the image token in a prompt.
        image_token: Id of the image token.
        layers: Decoder layers of the tiny checkpoint.
        save: Writes the checkpoint to a folder.
        oracle: ``module:class`` of the dense oracle. It is imported late, because conftest.py
            must set the number of threads before the first import of torch.
        tokens: (width, height) of an image -> number of its visual tokens.
        settings: The settings that start-up chooses.
        tokens_around: Ids of the tokens that the processor puts before and after an image.
        pixels: Name of the field with an image's pixels.
        stock_ignores_ratio: Whether stock vLLM's processor takes keywords that it does not know.
        frames: (frames, width, height) of a video -> number of frames as the encoder computes
            them, and visual tokens of each; ``None`` if the family takes no videos.
        video_token: Id of the video token.
        video_tail: Tokens after a video's last frame.
        stock_joins_videos: Whether stock vLLM takes videos of different lengths in one step.
    """

    name: str
    placeholder: str
    image_token: int
    layers: int
    save: Callable[[Path], None]
    oracle: str
    tokens: Callable[[int, int], int]
    settings: PruningSettings = field(default_factory=PruningSettings)
    tokens_around: tuple[int, int] | None = None
    pixels: str = "pixel_values"
    stock_ignores_ratio: bool = True
    frames: Callable[[int, int, int], tuple[int, int]] | None = None
    video_token: int | None = None
    video_tail: int = 0
    stock_joins_videos: bool = True

    @property
    def options(self) -> dict[str, Any]:
        """Options of its engine."""
        return ENGINE_OPTIONS

    @property
    def boundaries(self) -> tuple[int, int]:
        return self.settings.boundaries(self.layers)

    @property
    def opening(self) -> str:
        """Text of an image in a prompt, up to and including its placeholder."""
        mark = IMAGE_MARKS[self.name]
        return mark[: mark.index(self.placeholder) + len(self.placeholder)]

    @property
    def offset(self) -> int:
        """Prompt position of the first placeholder of a :class:`RequestSpec`."""
        has_mark = self.opening != self.placeholder or self.tokens_around is not None
        return len("USER: ") + has_mark

    @property
    def last_token(self) -> int:
        """Id of an image's last token in a prompt."""
        return self.tokens_around[1] if self.tokens_around else self.image_token

    def oracle_class(self) -> "type[DenseModel]":
        module, name = self.oracle.split(":")
        chosen: type[DenseModel] = getattr(import_module(module), name)
        return chosen

    def counts(self, ratio: float, image: int) -> VisualTokenCounts:
        """The plan of an image, given by its seed."""
        tokens = self.tokens(*image_size(image))
        return plan_counts(self.settings, ratio, self.layers, tokens)

    def video(self, ratio: float, video: int, *, compares: bool) -> list[VisualTokenCounts]:
        """The plan of each frame of a video, given by its seed.

        ``compares``: whether ``compare_frames`` is set.
        """
        assert self.frames is not None
        num_frames, tokens = self.frames(*VIDEOS[video][:3])
        settings = self.settings.model_copy(update={"compare_frames": compares})
        first, others = plan_video(settings, ratio, self.layers, tokens, num_frames)
        return [first, *[others] * (num_frames - 1)]

    def kept(self, ratio: float, *images: int) -> int:
        """Number of tokens that Stage I keeps of these images, each with a placeholder."""
        return sum(self.counts(ratio, image).stages[0] for image in images)


@cache
def image_size(seed: int) -> tuple[int, int]:
    return sample_image(seed).size


LLAVA = Family(
    name="llava",
    placeholder="<image>",
    image_token=IMAGE_TOKEN,
    layers=TINY.layers,
    save=partial(save_random_llava, shape=TINY),
    oracle="tests.engine.dense_oracle:DenseLlava",
    tokens=lambda width, height: TINY.visual_tokens,
)

QWEN2_5_VL = Family(
    name="qwen2_5_vl",
    placeholder="<|image_pad|>",
    image_token=qwen_checkpoint.SPECIALS.index("<|image_pad|>"),
    layers=tiny.QWEN.layers,
    save=partial(save_random_qwen, shape=tiny.QWEN),
    oracle="tests.families.qwen_oracle:DenseQwen",
    tokens=tiny.QWEN.tokens_of,
    # The limits are those of a frame.
    frames=lambda frames, *size: (ceil(frames / 2), tiny.QWEN.tokens_of(*size)),
    video_token=qwen_checkpoint.SPECIALS.index("<|video_pad|>"),
)

LLAVA_NEXT = Family(
    name="llava_next",
    placeholder="<image>",
    image_token=IMAGE_TOKEN,
    layers=tiny.LLAVA_NEXT.layers,
    save=partial(save_random_llava_next, shape=tiny.LLAVA_NEXT),
    oracle="tests.families.tiled_oracle:DenseLlavaNext",
    tokens=tiny.LLAVA_NEXT.tokens_of,
)

LLAVA_ONEVISION = Family(
    name="llava_onevision",
    placeholder="<image>",
    image_token=IMAGE_TOKEN,
    layers=tiny.LLAVA_ONEVISION.layers,
    save=partial(save_random_llava_onevision, shape=tiny.LLAVA_ONEVISION),
    oracle="tests.families.tiled_oracle:DenseLlavaOnevision",
    tokens=tiny.LLAVA_ONEVISION.tokens_of,
    frames=lambda frames, *size: (frames, tiny.LLAVA_ONEVISION.frame_tokens),
    video_token=llava_onevision_checkpoint.VIDEO_TOKEN,
    video_tail=1,
    stock_joins_videos=False,
)


def _qwen3_frames(shape: Qwen3Shape, frames: int, width: int, height: int) -> tuple[int, int]:
    """The limits are those of all frames together."""
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize

    side = shape.token_side
    limits = dict(zip(("min_pixels", "max_pixels"), shape.pixel_limits.values(), strict=True))
    height, width = smart_resize(frames, height, width, factor=side, **limits)
    return ceil(frames / 2), height // side * (width // side)


QWEN3_VL = Family(
    name="qwen3_vl",
    placeholder="<|image_pad|>",
    image_token=QWEN2_5_VL.image_token,
    layers=tiny.QWEN3.layers,
    save=partial(save_random_qwen3, shape=tiny.QWEN3),
    oracle="tests.families.qwen3_oracle:DenseQwen3",
    tokens=tiny.QWEN3.tokens_of,
    settings=PruningSettings(shallow_boundary=2),
    frames=partial(_qwen3_frames, tiny.QWEN3),
    video_token=QWEN2_5_VL.video_token,
)

QWEN3_VL_MOE = replace(
    QWEN3_VL,
    name="qwen3_vl_moe",
    layers=tiny.QWEN3_MOE.layers,
    save=partial(save_random_qwen3, shape=tiny.QWEN3_MOE),
    oracle="tests.families.qwen3_oracle:DenseQwen3Moe",
    tokens=tiny.QWEN3_MOE.tokens_of,
    frames=partial(_qwen3_frames, tiny.QWEN3_MOE),
)

_INTERN_TOKEN = internvl_checkpoint.SPECIALS.index

INTERNVL_CHAT = Family(
    name="internvl_chat",
    placeholder="<image>",
    image_token=_INTERN_TOKEN("<IMG_CONTEXT>"),
    layers=tiny.INTERNVL_CHAT.layers,
    save=partial(save_random_internvl_chat, shape=tiny.INTERNVL_CHAT),
    oracle="tests.families.internvl_oracle:DenseInternVLChat",
    tokens=tiny.INTERNVL_CHAT.tokens_of,
    tokens_around=(_INTERN_TOKEN("<img>"), _INTERN_TOKEN("</img>")),
    pixels="pixel_values_flat",
    stock_ignores_ratio=False,
)

INTERNVL = Family(
    name="internvl",
    placeholder="<IMG_CONTEXT>",
    image_token=_INTERN_TOKEN("<IMG_CONTEXT>"),
    layers=tiny.INTERNVL.layers,
    # With seed 0, the norms of two keys of image 101 differ by rounding only.
    save=partial(save_random_internvl, shape=tiny.INTERNVL, seed=1),
    oracle="tests.families.internvl_oracle:DenseInternVL",
    tokens=tiny.INTERNVL.tokens_of,
    tokens_around=(_INTERN_TOKEN("<img>"), _INTERN_TOKEN("</img>")),
)

FAMILIES = (
    LLAVA,
    LLAVA_NEXT,
    LLAVA_ONEVISION,
    QWEN2_5_VL,
    QWEN3_VL,
    QWEN3_VL_MOE,
    INTERNVL_CHAT,
    INTERNVL,
)
