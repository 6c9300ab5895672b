"""The client's side: asks a running server, and has it score answers."""

import os
import time
from collections.abc import Mapping
from typing import Any

import httpx
import openai
from openai.types.chat import ChatCompletion

from vitcop_server.calibrate.agreement import Reply, Score
from vitcop_vllm.pruning.settings import RATIO_HEADER

_CHANGES_NOTHING = frozenset({"default_ratio", "max_pruning_ratio", "kernels"})
"""Settings of a server that change no answer at a given ratio."""


class ServerError(RuntimeError):
    """The server cannot be measured, or a request failed."""


class RefusedError(RuntimeError):
    """The server refused this request, with status 400, 413 or 422."""


class Server:
    """A running server.

    Args:
        url: Its OpenAI-compatible root, such as ``http://host:8000/v1``.
        model: The model's name; by default the first that it lists.
        max_tokens: Of an answer.

    Raises:
        ServerError: If it does not answer.
    """

    def __init__(self, url: str, model: str | None = None, max_tokens: int = 64) -> None:
        self._client = openai.OpenAI(
            base_url=url, api_key=os.environ.get("OPENAI_API_KEY") or "none"
        )
        self._max_tokens = max_tokens
        try:
            self.model = model or self._client.models.list().data[0].id
        except openai.OpenAIError as error:
            raise ServerError(self._explain(error)) from None
        except IndexError:
            raise ServerError(f"{url} lists no models") from None

    def config(self) -> dict[str, Any] | None:
        """What ``/v1/pruning/config`` says; ``None`` where a gateway does not forward it."""
        try:
            answer = self._client.get("/pruning/config", cast_to=httpx.Response)
            settings = answer.json()["settings"]
        except (openai.APIStatusError, ValueError, KeyError, TypeError):
            return None
        except openai.OpenAIError as error:
            raise ServerError(self._explain(error)) from None
        return settings if isinstance(settings, dict) else None

    def ask(self, messages: list[Any], ratio: float, *, fresh: bool = False) -> Reply:
        """A greedy answer at a ratio.

        Args:
            messages: The prompt.
            ratio: The pruning ratio.
            fresh: Whether vLLM may take nothing of the prompt from its prefix cache.

        Raises:
            RefusedError: If the server refuses the request.
            ServerError: If it cannot answer, or does not prune.
        """
        fields: dict[str, Any] = {"return_token_ids": not ratio}
        if fresh:
            fields["cache_salt"] = os.urandom(8).hex()
        start = time.perf_counter()
        answer = self._post(messages, ratio, self._max_tokens, fields)
        seconds = time.perf_counter() - start
        choice, usage = answer.choices[0], answer.usage
        visual = getattr(usage, "visual_tokens", None)
        if usage is None or not isinstance(visual, dict):
            raise ServerError(
                "the answer's usage has no visual_tokens: this server runs without ViTCoP's plugin "
                f"and ignores {RATIO_HEADER}; start it with vitcop-serve, or with "
                "VLLM_PLUGINS=vitcop"
            )
        return Reply(
            text=choice.message.content or "",
            finish=choice.finish_reason,
            token_ids=tuple(getattr(choice, "token_ids", None) or ()),
            prompt_tokens=usage.prompt_tokens,
            pruning_ratio=float(usage.pruning_ratio),  # type: ignore[attr-defined]
            encoder=int(visual["encoder"]),
            seconds=seconds,
        )

    def score_baseline(self, messages: list[Any], reply: Reply) -> Score:
        """The unpruned answer under the unpruned model; without tokens if it cannot be scored.

        The answer goes into the last assistant message, which the model would continue. Chat
        templates treat spaces around it differently, so the answer is sent as it is, then
        stripped: a scoring counts only if its tokens are those that the model generated.

        Raises:
            ServerError: If the server cannot answer.
        """
        for text in dict.fromkeys((reply.text, reply.text.strip())):
            if not (text and reply.token_ids):
                continue
            try:
                answer, entries = self._post_score(messages, text, 0)
            except RefusedError:
                return Score()
            usage = answer.usage
            count = usage.prompt_tokens - reply.prompt_tokens if usage else 0
            # The last token of an answer that ended by itself marks the end and is in no text.
            if count < 1 or count < len(reply.token_ids) - (reply.finish == "stop"):
                continue
            score = _tail(entries, reply.token_ids[:count], count)
            if score is not None:
                return Score(score, answer.choices[0].finish_reason == "stop", text)
        return Score()

    def score(self, messages: list[Any], reply: Reply, baseline: Score, ratio: float) -> Score:
        """The unpruned answer under the model at a ratio.

        Raises:
            ServerError: If the server cannot answer.
        """
        count = len(baseline.logprobs)
        try:
            answer, entries = self._post_score(messages, baseline.text, ratio)
        except RefusedError as error:
            raise ServerError(
                f"at ratio {ratio:.4g} the server scores no answers: {error}"
            ) from None
        logprobs = _tail(entries, reply.token_ids[:count], count)
        if logprobs is None:
            raise ServerError(f"at ratio {ratio:.4g} the server scored other tokens than at 0")
        return Score(logprobs, answer.choices[0].finish_reason == "stop", baseline.text)

    def _post_score(
        self, messages: list[Any], text: str, ratio: float
    ) -> tuple[ChatCompletion, list[Any]]:
        # vLLM reads no cached prefix for such a request, so every token gets its probability.
        fields = {
            "prompt_logprobs": 0,
            "continue_final_message": True,
            "add_generation_prompt": False,
        }
        messages = [*messages, {"role": "assistant", "content": text}]
        answer = self._post(messages, ratio, 1, fields)
        return answer, getattr(answer, "prompt_logprobs", None) or []

    def _post(
        self, messages: list[Any], ratio: float, max_tokens: int, fields: Mapping[str, Any]
    ) -> ChatCompletion:
        try:
            return self._client.chat.completions.create(
                model=self.model,
                messages=messages,
                temperature=0,
                max_tokens=max_tokens,
                extra_headers={RATIO_HEADER: f"{ratio:.6f}"},
                extra_body=dict(fields),
            )
        except openai.APIStatusError as error:
            if error.status_code in (400, 413, 422):
                raise RefusedError(_message(error)) from None
            raise ServerError(self._explain(error)) from None
        except openai.OpenAIError as error:
            raise ServerError(self._explain(error)) from None

    def _explain(self, error: openai.OpenAIError) -> str:
        url = str(self._client.base_url).rstrip("/")
        if isinstance(error, openai.APITimeoutError):
            return f"{url} did not answer in time"
        if isinstance(error, openai.APIConnectionError):
            return f"no server answers at {url}"
        if isinstance(error, openai.AuthenticationError):
            said = "another key" if os.environ.get("OPENAI_API_KEY") else "a key"
            return f"{url} needs {said}: set OPENAI_API_KEY (status 401)"
        if isinstance(error, openai.NotFoundError):
            return f"{url}: {_message(error)} (status 404; does the URL end in /v1?)"
        if isinstance(error, openai.APIStatusError):
            return f"{url}: {_message(error)} (status {error.status_code})"
        return f"{url}: {error}"


def answer_settings(settings: Mapping[str, Any] | None) -> dict[str, Any]:
    """The settings of a server that change answers."""
    return {k: v for k, v in (settings or {}).items() if k not in _CHANGES_NOTHING}


def _message(error: openai.APIStatusError) -> str:
    body = error.body
    said = body.get("message") if isinstance(body, dict) else None
    return str(said or error.message)


def _tail(entries: list[Any], token_ids: tuple[int, ...], count: int) -> tuple[float, ...] | None:
    """Log-probabilities of a prompt's last tokens; ``None`` if these are other tokens."""
    if len(token_ids) < count or len(entries) < count:
        return None
    logprobs = []
    for entry, token in zip(entries[-count:], token_ids, strict=True):
        if not isinstance(entry, dict) or str(token) not in entry:
            return None
        logprobs.append(float(entry[str(token)]["logprob"]))
    return tuple(logprobs)
