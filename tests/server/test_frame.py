"""The frame of an image file that the model gets; errors are those of a chat request."""

import base64
import io
from typing import Any

import httpx
import pytest
from PIL import Image

from tests.server.sample_images import png_url

pytestmark = pytest.mark.slow

ROUTE = "/v1/pruning/image"
RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def halves(mode: str = "RGB", size: tuple[int, int] = (96, 32)) -> Image.Image:
    """Red on the left, blue on the right."""
    image = Image.new("RGB", size, RED)
    image.paste(BLUE, (size[0] // 2, 0, *size))
    return image.convert(mode)


def url_of(image: Image.Image, kind: str, **options: Any) -> str:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def turned_url(kind: str, **options: Any) -> str:
    """Stored rotated, with an EXIF orientation."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return url_of(halves().transpose(Image.Transpose.ROTATE_90), kind, exif=exif, **options)


def clear_url() -> str:
    """Blue, with a transparent left half."""
    image = Image.new("RGBA", (96, 32), (*BLUE, 255))
    image.paste((0, 0, 0, 0), (0, 0, 48, 32))
    return url_of(image, "PNG")


def animated_url(kind: str, **options: Any) -> str:
    rest = [Image.new("RGB", (96, 32), "lime")]
    return url_of(halves(), kind, save_all=True, append_images=rest, duration=20, **options)


def frame_of(answer: httpx.Response) -> Image.Image:
    assert answer.status_code == 200, answer.text
    kind, _, data = answer.json()["frame"].partition(",")
    assert kind == "data:image/jpeg;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


@pytest.mark.parametrize(
    ("url", "left"),
    [
        (url_of(halves(), "PNG"), RED),
        (turned_url("WEBP", lossless=True), RED),
        (turned_url("JPEG", quality=95), RED),
        (turned_url("TIFF"), RED),
        (animated_url("PNG"), RED),
        (animated_url("PNG", default_image=True), RED),
        (animated_url("GIF"), RED),
        (animated_url("WEBP", lossless=True), RED),
        (url_of(halves("CMYK"), "TIFF"), RED),
        (clear_url(), WHITE),
    ],
    ids=[
        *("png", "turned-webp", "turned-jpeg", "turned-tiff"),
        *("apng", "apng-default", "gif", "webp", "cmyk", "clear"),
    ],
)
def test_the_frame_shown_is_the_frame_that_the_model_gets(
    http: httpx.Client, url: str, left: tuple[int, ...]
) -> None:
    answer = http.post(ROUTE, json={"image_url": url})
    frame = frame_of(answer)
    assert (answer.json()["width"], answer.json()["height"]) == frame.size == (96, 32)
    assert frame.mode == "RGB"
    for x, expected in ((24, left), (72, BLUE)):
        assert frame.getpixel((x, 16)) == pytest.approx(expected, abs=12)


def test_the_frame_is_nearly_lossless(http: httpx.Client) -> None:
    url = png_url(7, (336, 336))
    frame = frame_of(http.post(ROUTE, json={"image_url": url}))
    image = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    for x, y in ((0, 0), (83, 111), (84, 112), (200, 300), (335, 335)):
        assert frame.getpixel((x, y)) == pytest.approx(image.getpixel((x, y)), abs=25)


@pytest.mark.parametrize(
    ("size", "scaled"),
    [((3000, 1500), (1024, 512)), ((200, 2048), (100, 1024)), ((1024, 1024), (1024, 1024))],
)
def test_a_large_image_is_scaled_down(
    http: httpx.Client, size: tuple[int, int], scaled: tuple[int, int]
) -> None:
    answer = http.post(ROUTE, json={"image_url": url_of(Image.new("L", size), "PNG")})
    assert frame_of(answer).size == scaled
    assert (answer.json()["width"], answer.json()["height"]) == size


@pytest.mark.parametrize(
    "url",
    [
        "data:image/png;base64,aGVsbG8=",  # text
        "data:image/png;base64,",
        "data:image/png,hello",
        png_url(1)[:-40],
        url_of(Image.new("1", (340, 20)), "PNG"),  # too thin
        url_of(Image.new("1", (6000, 5000)), "PNG"),  # too large
        "file:///etc/passwd",
        "http://127.0.0.1:1/a.png",
        "ftp://127.0.0.1/a.png",
        "hello",
    ],
    ids=["text", "empty", "plain", "half", "thin", "large", "file", "http", "ftp", "word"],
)
def test_a_bad_image_gets_the_error_of_a_chat_request(
    http: httpx.Client, model: str, url: str
) -> None:
    answer = http.post(ROUTE, json={"image_url": url})
    assert answer.status_code == 400
    content = [{"type": "image_url", "image_url": {"url": url}}]
    chat = {"model": model, "messages": [{"role": "user", "content": content}]}
    assert answer.json() == http.post("/v1/chat/completions", json=chat).json()


@pytest.mark.parametrize(
    ("body", "headers", "param"),
    [
        ({}, {}, "image_url"),
        ({"image_url": None}, {}, "image_url"),
        ({"image_url": 7}, {}, "image_url"),
        ({"image_url": png_url(1), "url": "x"}, {}, "url"),
        ({"image_url": png_url(1), "pruning_ratio": 0.5}, {}, "pruning_ratio"),
        ({"image_url": png_url(1)}, {"X-Pruning-Ratio": "0.5"}, "X-Pruning-Ratio"),
        ([], {}, ""),
    ],
)
def test_other_bodies_are_refused(
    http: httpx.Client, body: Any, headers: dict[str, str], param: str
) -> None:
    answer = http.post(ROUTE, json=body, headers=headers)
    assert answer.status_code == 400, answer.text
    assert (answer.json()["error"]["param"] or "").endswith(param)


def test_the_route_needs_the_api_key(guarded_process: Any) -> None:
    answer = httpx.post(f"{guarded_process[0]}{ROUTE}", json={"image_url": png_url(1)})
    assert answer.status_code == 401
