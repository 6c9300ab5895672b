"""Traces: a span with the ratio, beside vLLM's span ``llm_request``."""

from collections.abc import Mapping
from typing import Any

from vllm.tracing import SpanAttributes, extract_trace_context, instrument_manual


def trace_pruning(
    raw_request: Any, request_id: str | None, start_ns: int, ratio: float, usage: Mapping[str, Any]
) -> None:
    """Export a span from ``start_ns`` until now, in the client's trace if it sent one.

    Args:
        raw_request: The HTTP request; its headers may carry the client's trace.
        request_id: vLLM's id of the request, as in its span.
        start_ns: Start of the request, in nanoseconds since the epoch.
        ratio: The accepted ratio.
        usage: The pruning fields of ``usage``.
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
