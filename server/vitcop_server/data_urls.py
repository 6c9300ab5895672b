"""Data URLs and base64 as browsers read them (https://fetch.spec.whatwg.org/#data-urls)."""

import string

import pybase64

from vitcop_server.errors import RequestError

EXAMPLES = {"image": "image/png", "video": "video/mp4"}
"""Media types of the examples in error messages."""

_WHITE_SPACE = b"\t\n\f\r "
_DIGITS = (string.ascii_letters + string.digits + "+/").encode()
_PERCENT_CODES = {
    code.encode(): bytes([byte])
    for byte in b"+/=" + _WHITE_SPACE
    for code in (f"%{byte:02X}", f"%{byte:02x}")
}
"""Percent codes that encoders write. Decoding all 256 codes takes seconds for a large body."""


def split_data_url(url: str, what: str = "image") -> tuple[str, str]:
    """The media type and the base64 text of a data URL.

    Args:
        url: The data URL.
        what: ``image`` or ``video``, for error messages.

    Raises:
        RequestError: If the URL has no comma, or its data are not in base64.
    """
    header, comma, data = url[len("data:") :].partition(",")
    if not comma:
        raise RequestError(
            f"the data URL has no comma after its media type: {url[:40]!r}", param=f"{what}_url"
        )
    parameters, semicolon, encoding = header.rpartition(";")
    if not semicolon or encoding.strip().lower() != "base64":
        raise RequestError(
            f"the data URL is not in base64: it must start like 'data:{EXAMPLES[what]};base64,', "
            f"but starts with {url[:40]!r}",
            param=f"{what}_url",
        )
    return parameters.partition(";")[0].strip(), data.partition("#")[0]


def decode_base64(text: str, what: str = "image") -> bytes:
    """Decode base64 that may contain white space or percent codes and may lack padding.

    Args:
        text: The base64 text.
        what: ``image`` or ``video``, for error messages.

    Raises:
        RequestError: If ``text`` is cut off or contains other characters. The URL-safe alphabet is
            refused because browsers and stock vLLM refuse it too.
    """
    try:
        return pybase64.b64decode(text, validate=True)
    except ValueError:
        pass  # The text is not strict base64: clean it below.
    data = text.encode("utf-8", "replace")
    if b"%" in data:
        for code, byte in _PERCENT_CODES.items():
            data = data.replace(code, byte)
    data = data.translate(None, _WHITE_SPACE).rstrip(b"=")
    try:
        return pybase64.b64decode(data + b"=" * (-len(data) % 4), validate=True)
    except ValueError as error:
        raise RequestError(_describe_error(data, what), param=f"{what}_url") from error


def _describe_error(data: bytes, what: str) -> str:
    if data[:5].lower() == b"data:":
        prefix = data.partition(b",")[0][:40].decode(errors="replace")
        return f"the {what}'s base64 data start with a second prefix, {prefix!r}: remove it"
    wrong = data.translate(None, _DIGITS)[:1]
    if not wrong:
        return f"the {what}'s base64 data are cut off: {len(data)} digits are not whole bytes"
    place = data.index(wrong)
    character = data[place : place + 4].decode(errors="replace")[0]
    message = f"the {what}'s base64 data contain {character!r} after {place} digits"
    if wrong in b"-_":
        return f"{message}: send the standard alphabet, with '+' and '/', not the URL-safe one"
    return message
