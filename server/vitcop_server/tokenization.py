"""vLLM's ``/tokenize``, which counts the tokens of the pruned prompt."""

from typing import Any

from fastapi import Request
from vllm.entrypoints.serve.tokenize.protocol import TokenizeChatRequest, TokenizeRequest
from vllm.entrypoints.serve.tokenize.serving import ServingTokenization

from vitcop_server.errors import RequestError
from vitcop_server.ratio_serving import RatioServing


class PrunedTokenization(RatioServing, ServingTokenization):
    """Handler of ``/tokenize`` and ``/detokenize``; counts equal ``prompt_tokens`` of a chat."""

    async def create_tokenize(self, request: TokenizeRequest, raw_request: Request) -> Any:
        try:
            amount = self.accept(request, raw_request).amount
        except RequestError as error:
            return self.refusal(error)
        if isinstance(request, TokenizeChatRequest):
            request.mm_processor_kwargs = amount.processor_kwargs()
        return await super().create_tokenize(request, raw_request)
