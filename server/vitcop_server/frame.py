"""The frame of an image file that the model sees, for clients that draw on it.

Browsers decode some files differently: they ignore the orientation of a WebP file, play
animations and cannot show TIFF.
"""

import base64
from io import BytesIO

from PIL import Image
from pydantic import BaseModel, ConfigDict
from vllm import envs
from vllm.config import ModelConfig
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, MediaWithBytes

MAX_FRAME_SIDE = 1024
"""Longest side of a frame in pixels; larger images are scaled down."""


class ImageRequest(BaseModel):
    """Body of ``/v1/pruning/image``.

    Attributes:
        image_url: URL of the image, as in a chat request.
    """

    model_config = ConfigDict(extra="forbid")

    image_url: str


async def load_image(url: str, model_config: ModelConfig) -> Image.Image:
    """The frame of an image file that the model sees.

    Args:
        url: URL of the image; the media connector of chat requests loads it.
        model_config: vLLM's config of the served model.

    Raises:
        RequestError: If the image cannot be read, or exceeds a limit.
        UnreachableMediaError: If the image cannot be fetched.
    """
    connector = MEDIA_CONNECTOR_REGISTRY.load(  # as vLLM's parser of chat requests does
        envs.VLLM_MEDIA_CONNECTOR,
        media_io_kwargs=model_config.get_multimodal_config().media_io_kwargs,
        allowed_local_media_path=model_config.allowed_local_media_path,
        allowed_media_domains=model_config.allowed_media_domains,
    )
    loaded = await connector.fetch_image_async(url)
    image: Image.Image = loaded.media if isinstance(loaded, MediaWithBytes) else loaded
    return image


def frame_url(image: Image.Image) -> str:
    """A JPEG of ``image`` as a data URL; scales ``image`` down in place if it is large."""
    image.thumbnail((MAX_FRAME_SIDE, MAX_FRAME_SIDE))
    file = BytesIO()
    image.convert("RGB").save(file, "JPEG", quality=95, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
