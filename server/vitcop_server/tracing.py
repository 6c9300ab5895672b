"""Traces: a span with the ratio, beside vLLM's span ``llm_request``."""

from collections.abc import Mapping
from typing import Any

from vllm.tracing import SpanAttributes, extract_trace_context, instrument_manual

from vitcop_vllm.pruning.amount import BUDGET_KEY, Amount, AutoRatio, TokenBudget
from vitcop_vllm.pruning.settings import RATIO_KEY


def trace_pruning(
    raw_request: Any,
    request_id: str | None,
    start_ns: int,
    amount: Amount,
    usage: Mapping[str, Any],
) -> None:
    """Export a span from ``start_ns`` until now, in the client's trace if it sent one.

    Args:
        raw_request: The HTTP request; its headers may carry the client's trace.
        request_id: vLLM's id of the request, as in its span.
        start_ns: Start of the request, in nanoseconds since the epoch.
        amount: What the request gets; ``auto`` has the effective ratio only.
        usage: The pruning fields of ``usage``.
    """
    attributes: dict[str, Any] = {}
    if not isinstance(amount, AutoRatio):
        key = BUDGET_KEY if isinstance(amount, TokenBudget) else RATIO_KEY
        attributes[f"vitcop.{key}"] = amount.processor_kwargs()[key]
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
