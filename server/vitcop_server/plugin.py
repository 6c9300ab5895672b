"""Entry point in vLLM's ``vllm.endpoint_plugins`` group: adds all parts of this package."""

import logging
import os
from argparse import Namespace
from dataclasses import replace
from typing import Any

from fastapi import FastAPI
from vllm.v1.engine.exceptions import EngineDeadError

from vitcop_server import readiness, routes
from vitcop_server.aliases import AliasedModels
from vitcop_server.cors import expose_headers
from vitcop_server.default_ratio import default_ratio_of
from vitcop_server.errors import answer_deep_nesting, use_openai_errors
from vitcop_server.exit_status import exit_nonzero_when_dead
from vitcop_server.image_cache import keep_caches_equal
from vitcop_server.limits import BodyLimit, limit_answers
from vitcop_server.media import guard_media
from vitcop_server.middleware import PruningMiddleware
from vitcop_server.page import attach_page
from vitcop_server.preview import preview_of
from vitcop_server.readiness import (
    BeginWithFirstEvent,
    RefuseWhenStopping,
    StoppingError,
    answer_dead_engine,
    answer_stopping,
    note_shutdown,
)
from vitcop_server.serving import (
    PrunedChat,
    PrunedChatBatch,
    PrunedCompletion,
    PrunedMessages,
    PrunedResponses,
)
from vitcop_server.settings import server_settings
from vitcop_server.tokenization import PrunedTokenization
from vitcop_server.usage import PrunedModel

logger = logging.getLogger(f"vllm.{__name__}")

_HANDLERS: dict[str, Any] = {
    "openai_serving_chat": PrunedChat,
    "openai_serving_chat_batch": PrunedChatBatch,
    "openai_serving_completion": PrunedCompletion,
    "openai_serving_responses": PrunedResponses,
    "anthropic_serving_messages": PrunedMessages,
    "serving_tokenization": PrunedTokenization,
}
"""Attribute of the app's state with vLLM's handler, and the class that replaces it."""


class PruningEndpointPlugin:
    """Makes vLLM's chat, completion and response routes accept a pruning ratio per request.

    ``VLLM_PLUGINS=vitcop`` loads it; ``vitcop-serve`` sets this variable.
    """

    name = "vitcop"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add routes and middleware; vLLM adds its own (keys, CORS) later, around them."""
        settings = server_settings(app.state.args)
        guard_media(settings, os.environ)
        limit_answers(os.environ)
        app.include_router(routes.router)
        app.include_router(readiness.router)
        if settings.page:
            attach_page(app)
        app.add_exception_handler(RecursionError, answer_deep_nesting)
        app.add_exception_handler(EngineDeadError, answer_dead_engine)
        app.add_exception_handler(StoppingError, answer_stopping)
        app.add_middleware(BeginWithFirstEvent)
        app.add_middleware(PruningMiddleware)
        app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes)
        app.add_middleware(RefuseWhenStopping)
        expose_headers(app.state.args)
        use_openai_errors(app.state.args)
        if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
            logger.warning(
                "The engine's metrics (vitcop_kv_blocks_not_taken, vitcop_selection_seconds) "
                "will be missing from /metrics: set PROMETHEUS_MULTIPROC_DIR to an empty "
                "directory, or start with vitcop-serve, which sets it."
            )

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Replace vLLM's handlers after vLLM has built them.

        Raises:
            ValueError: If the model's architecture is not supported, or a setting is wrong.
        """
        settings = server_settings(args)
        vllm_config = engine_client.vllm_config
        model = PrunedModel.from_config(
            vllm_config.model_config, args.served_model_name or [args.model]
        )
        limits = engine_client.renderer.mm_processor.info.allowed_mm_limits
        model = replace(model, takes_videos=limits.get("video", 0) > 0)
        AliasedModels.adopt(state.openai_serving_models, model.settings, settings.aliases)
        preview = preview_of(engine_client, model)
        default_ratio = default_ratio_of(engine_client, preview, settings.elastic, args)
        is_traced = bool(vllm_config.observability_config.otlp_traces_endpoint)
        for name, pruned_serving in _HANDLERS.items():
            stock = getattr(state, name)
            setattr(state, name, pruned_serving.adopt(stock, model, default_ratio, is_traced))
        state.pruning_server_settings = settings
        state.pruning_preview = preview
        state.pruning_default_ratio = default_ratio
        keep_caches_equal(engine_client)
        exit_nonzero_when_dead(engine_client)
        note_shutdown(engine_client, state)
