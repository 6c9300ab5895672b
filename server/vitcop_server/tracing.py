"""The ratio in traces: a span of ours beside vLLM's ``llm_request``."""

from collections.abc import Mapping
from typing import Any

from vllm.tracing import SpanAttributes, extract_trace_context, instrument_manual


def trace_pruning(
    raw_request: Any, request_id: str | None, start_ns: int, ratio: float, usage: Mapping[str, Any]
) -> None:
    """Export a span from ``start_ns`` (since the epoch) till now, in the client's trace if any.

    Args:
        raw_request: Its headers may carry the trace.
        request_id: As in vLLM's span.
        start_ns: When the request was taken.
        ratio: The accepted one.
        usage: Fields of ``usage`` that tell what was done.
    """
    attributes: dict[str, Any] = {"vitcop.pruning_ratio": ratio}
    if request_id is not None:
        attributes[SpanAttributes.GEN_AI_REQUEST_ID] = request_id
    if tokens := usage["visual_tokens"]:
        attributes["vitcop.effective_pruning_ratio"] = usage["pruning_ratio"]
        attributes["vitcop.visual_tokens.encoder"] = tokens["encoder"]
        attributes["vitcop.visual_tokens.stages"] = tokens["stages"]
    instrument_manual(
        span_name="prune",
        start_time=start_ns,
        attributes=attributes,
        context=extract_trace_context(dict(raw_request.headers)),
    )
