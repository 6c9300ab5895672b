"""Steady mixed traffic, with a record of every request that got no complete answer."""

import asyncio
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai
from openai import AsyncOpenAI

from tests.deploy.deployment import KEY
from tests.server.sample_images import image_message

CLIENTS = 6

RATIOS = (None, "0", "0.667", "0.889", "auto")


@dataclass(frozen=True)
class Lost:
    """A request without a complete answer.

    Attributes:
        at: When it ended, in seconds of the monotonic clock.
        began: Whether its answer had begun: it is a stream, and an event had come.
        reason: The client's error.
    """

    at: float
    began: bool
    reason: str


@dataclass
class Record:
    """What became of the requests so far."""

    answered: int = 0
    streamed: int = 0
    lost: list[Lost] = field(default_factory=list)


@contextmanager
def traffic(url: str, seed: int = 0) -> Iterator[Record]:
    """Send requests until the block ends: some with images, ratios and sessions, half streamed."""
    record, stop = Record(), threading.Event()
    thread = threading.Thread(target=lambda: asyncio.run(_send_all(url, seed, record, stop)))
    thread.start()
    try:
        yield record
    finally:
        stop.set()
        thread.join()


async def _send_all(url: str, seed: int, record: Record, stop: threading.Event) -> None:
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=120) as client:
        await asyncio.gather(
            *(
                _send(client, random.Random(seed * CLIENTS + n), record, stop)
                for n in range(CLIENTS)
            )
        )


async def _send(
    client: AsyncOpenAI, chance: random.Random, record: Record, stop: threading.Event
) -> None:
    while not stop.is_set():
        stream = chance.random() < 0.5
        began = False
        try:
            answer: Any = await client.chat.completions.create(**_request(chance), stream=stream)
            if stream:
                finish = None
                async for event in answer:
                    began = True
                    finish = event.choices[0].finish_reason if event.choices else finish
            else:
                finish = answer.choices[0].finish_reason
            assert finish == "length", f"the answer ended early: {finish}"
        except (openai.APIError, httpx.HTTPError, AssertionError) as error:
            reason = f"{type(error).__name__}: {error}; {error.__cause__!r}"
            record.lost.append(Lost(time.monotonic(), began, reason))
        else:
            record.answered += 1
            record.streamed += stream


def _request(chance: random.Random) -> dict[str, Any]:
    images = [chance.randrange(8)] if chance.random() < 0.7 else []
    ratio, session = chance.choice(RATIOS), chance.choice((None, str(chance.randrange(20))))
    headers = {"X-Pruning-Ratio": ratio, "X-Session-ID": session}
    return {
        "model": "demo",
        "messages": [image_message(*images, text="How many objects are there?")],
        "max_tokens": chance.choice((4, 16, 64)),
        "extra_body": {"ignore_eos": True},
        "extra_headers": {name: value for name, value in headers.items() if value is not None},
    }
