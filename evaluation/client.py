"""Asks a server the questions of a conversation, with OpenAI's client."""

from typing import Any

import openai
from openai.types.chat import ChatCompletion

from evaluation.exam import Example
from vitcop_server.calibrate.folder import data_url


def converse(
    client: openai.OpenAI, model: str, max_tokens: int, example: Example
) -> list[ChatCompletion]:
    """Ask turn after turn; the prompt holds the model's own earlier answers.

    The client retries twice after timeouts, 429, 5xx and lost connections.
    """
    content: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": data_url(image)}} for image in example.images
    ]
    messages: list[Any] = []
    answers = []
    for turn in example.turns:
        content.append({"type": "text", "text": turn.question})
        messages.append({"role": "user", "content": content})
        content = []
        answer = client.chat.completions.create(
            model=model, messages=messages, temperature=0, max_tokens=max_tokens
        )
        answers.append(answer)
        messages.append({"role": "assistant", "content": text_of(answer)})
    return answers


def text_of(answer: ChatCompletion) -> str:
    return answer.choices[0].message.content or ""
