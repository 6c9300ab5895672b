"""Images by seed, and chat requests about them."""

import base64
import io
import random
from typing import Any

from PIL import Image


def png_url(seed: int, size: tuple[int, int] = (64, 48)) -> str:
    """A data URL of a PNG of coloured blocks; the seed determines it."""
    colours = random.Random(seed)
    image = Image.new("RGB", (4, 3))
    image.putdata([tuple(colours.randbytes(3)) for _ in range(12)])
    file = io.BytesIO()
    image.resize(size, Image.Resampling.NEAREST).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def image_message(*seeds: int, text: str = "What is this?") -> dict[str, object]:
    """A user's message with one image per seed, then ``text``."""
    images = [{"type": "image_url", "image_url": {"url": png_url(seed)}} for seed in seeds]
    return {"role": "user", "content": [*images, {"type": "text", "text": text}]}


def chat_body(model: str, *seeds: int, **fields: Any) -> dict[str, Any]:
    """A greedy chat request about one image per seed; ``fields`` override its own."""
    return {"model": model, "messages": [image_message(*seeds)], "temperature": 0, **fields}
