"""Data URLs are read as browsers read them; errors name the fault of a bad URL."""

import base64
import random
import re
import time
from contextlib import suppress
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.server.test_media import encoded, load
from vitcop_server.data_urls import decode_base64
from vitcop_server.errors import RequestError

PNG = encoded(Image.frombytes("L", (64, 64), random.Random(0).randbytes(4096)))
PNG += bytes(1 + -len(PNG) % 3)  # makes its base64 end with "=="
TEXT = base64.b64encode(PNG).decode()
assert {"+", "/", "="} < set(TEXT)
LINES = re.findall(".{1,76}", TEXT)
LOWER_CASE_CODES = TEXT.replace("+", "%2b").replace("/", "%2f").replace("=", "%3d")

DATA_URLS = {
    "plain": f"data:image/png;base64,{TEXT}",
    "lines": "data:image/png;base64," + "\n".join(LINES) + "\n",
    "MIME lines": "data:image/png;base64,\r\n" + "\r\n".join(LINES),
    "spaces": f"data:image/png;base64, {' '.join(TEXT)}\t\f",
    "no padding": f"data:image/png;base64,{TEXT.rstrip('=')}",
    "percent codes": f"data:image/png;base64,{quote(TEXT, safe='')}",
    "lower-case codes": f"data:image/png;base64,{LOWER_CASE_CODES}",
    "percent-coded lines": "data:image/png;base64," + quote("\r\n".join(LINES)),
    "upper case": f"DATA:IMAGE/PNG;BASE64,{TEXT}",
    "space": f"data:image/png; base64,{TEXT}",
    "space after": f"data:image/png;base64 ,{TEXT}",
    "parameter": f"data:image/png;charset=utf-8;base64,{TEXT}",
    "no media type": f"data:;base64,{TEXT}",
    "fragment": f"data:image/png;base64,{TEXT}#top",
    "white space around": f"\n  data:image/png;base64,{TEXT}  \n",
}


@pytest.mark.parametrize("name", DATA_URLS)
def test_data_urls_are_read_like_browsers_do(name: str) -> None:
    loaded = load(DATA_URLS[name])
    assert loaded.original_bytes == PNG
    assert loaded.media.size == (64, 64)


WRONG = {
    "data:image/png": "no comma",
    "data:image/png,abc": "not in base64",
    "data:,abc": "not in base64",
    "data:base64,abc": "not in base64",
    "data:image/png;base64;charset=utf-8,abc": "not in base64",
    "data:image/png;base64,ab-d": "'-' after 2 digits.*URL-safe",
    "data:image/png;base64,abcd_": "'_' after 4 digits.*URL-safe",
    "data:image/png;base64,ab=d": "'=' after 2 digits",
    "data:image/png;base64,ab%41d": "'%' after 2 digits",
    "data:image/png;base64,abcdé": "'é' after 4 digits",
    "data:image/png;base64,٣": "'٣' after 0 digits",
    "data:image/png;base64,ab\xa0cd": "after 2 digits",
    "data:image/png;base64,abcd\ud800": r"'\?' after 4 digits",
    "data:image/png;base64,abcde": "cut off: 5 digits",
    "data:image/png;base64,Data:image/png;base64,abcd": "second prefix, 'Data:image/png;base64'",
    "data:image/png;base64,": "the image is empty",
    "data:image/png;base64,====": "the image is empty",
    TEXT: "URL must be either a HTTP, data or file URL",
    TEXT * 1000: "at most 65536 characters, not [0-9]+: send image data as a data URL",
    "https://127.0.0.1/" + "a" * 100_000: "not 100018: send image data",
}


@pytest.mark.parametrize("url", WRONG, ids=lambda url: ascii(url[:40]))
def test_errors_name_the_fault_of_a_url(url: str) -> None:
    with pytest.raises(RequestError, match=WRONG[url]) as refused:
        load(url)
    assert len(str(refused.value)) < 300


@given(st.binary(), st.data())
def test_white_space_and_padding_change_nothing(content: bytes, data: st.DataObject) -> None:
    text = base64.b64encode(content).decode()
    if data.draw(st.booleans()):
        text = text.rstrip("=")
    spaces = st.text("\t\n\f\r ", max_size=2)
    assert decode_base64("".join(digit + data.draw(spaces) for digit in text)) == content


@pytest.mark.parametrize("unit", ["%41", "%2B", "a\n", "-"])
def test_decoding_time_is_bounded(unit: str) -> None:
    """Decoding holds the GIL, so it must take only a few passes in C."""
    text = unit * (8_000_000 // len(unit))
    start = time.process_time()
    with suppress(RequestError):
        decode_base64(text)
    assert time.process_time() - start < 1
