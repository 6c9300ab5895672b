"""Pictures, each told by its seed, and chat requests about them."""

import base64
import io
import random
from typing import Any

from PIL import Image


def png_url(seed: int, size: tuple[int, int] = (64, 48)) -> str:
    """A PNG of coloured blocks as a data URL, the same for the same seed."""
    colours = random.Random(seed)
    picture = Image.new("RGB", (4, 3))
    picture.putdata([tuple(colours.randbytes(3)) for _ in range(12)])
    file = io.BytesIO()
    picture.resize(size, Image.Resampling.NEAREST).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def picture_message(*seeds: int, text: str = "What is this?") -> dict[str, object]:
    """A user's message with one picture per seed, then ``text``."""
    pictures = [{"type": "image_url", "image_url": {"url": png_url(seed)}} for seed in seeds]
    return {"role": "user", "content": [*pictures, {"type": "text", "text": text}]}


def chat_body(model: str, *seeds: int, **fields: Any) -> dict[str, Any]:
    """A greedy chat request about one picture per seed; ``fields`` replace its own."""
    return {"model": model, "messages": [picture_message(*seeds)], "temperature": 0, **fields}
