"""Entry point of vLLM's ``vllm.endpoint_plugins`` group: everything the server adds."""

from argparse import Namespace
from typing import Any

from fastapi import FastAPI

from server.exit_status import exit_nonzero_when_dead
from server.middleware import PruningMiddleware
from server.serving import PrunedChat, PrunedCompletion
from server.usage import PrunedModel


class PruningEndpointPlugin:
    """Makes vLLM's chat and completion routes honour a pruning ratio per request.

    Load it with ``VLLM_PLUGINS=vitcop`` and ``--trust-request-mm-kwargs``, which
    ``python -m server`` sets by itself.
    """

    name = "vitcop"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the middleware; vLLM's own (keys, request ids, CORS) are added later, outside."""
        app.add_middleware(PruningMiddleware)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Put our handlers in the place of vLLM's, once those are built.

        Raises:
            ValueError: If ratios could not reach the processor, or the model is not ours.
        """
        if not args.trust_request_mm_kwargs:
            raise ValueError(
                "a request's pruning ratio reaches the picture processor only with "
                "--trust-request-mm-kwargs: add that flag (clients still cannot set "
                "mm_processor_kwargs themselves)"
            )
        pruned_model = PrunedModel.from_config(engine_client.vllm_config.model_config)
        state.openai_serving_chat = PrunedChat.adopt(state.openai_serving_chat, pruned_model)
        state.openai_serving_completion = PrunedCompletion.adopt(
            state.openai_serving_completion, pruned_model
        )
        exit_nonzero_when_dead(engine_client)
