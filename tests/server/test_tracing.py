"""The exported span with the ratio."""

import json
import subprocess
import sys

SCRIPT = """
import json, time
from types import SimpleNamespace
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

exporter = InMemorySpanExporter()
provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(exporter))
trace.set_tracer_provider(provider)

from vitcop_server.tracing import trace_pruning
from vitcop_vllm.pruning.amount import AutoRatio, FixedRatio, TokenBudget

parent = "00-" + "ab" * 16 + "-" + "cd" * 8 + "-01"
images = {"pruning_ratio": 0.88, "visual_tokens": {"encoder": 576, "stages": [172, 77, 15]}}
none = {"pruning_ratio": None, "visual_tokens": None}
for headers, usage, amount in (
    ({"traceparent": parent}, images, FixedRatio(0.889)),
    ({}, none, TokenBudget(64, 0.95)),
    ({}, none, AutoRatio(0.5, 0.9)),
):
    trace_pruning(SimpleNamespace(headers=headers), "id", time.time_ns(), amount, usage)
print(json.dumps([json.loads(span.to_json()) for span in exporter.get_finished_spans()]))
"""


def test_a_span_has_the_ratio_in_the_client_s_trace() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, timeout=120
    )
    pruned, text, auto = json.loads(done.stdout.splitlines()[-1])
    assert pruned["name"] == "prune"
    assert pruned["context"]["trace_id"] == "0x" + "ab" * 16
    assert pruned["parent_id"] == "0x" + "cd" * 8
    assert pruned["attributes"] == {
        "gen_ai.request.id": "id",
        "vitcop.pruning_ratio": 0.889,
        "vitcop.effective_pruning_ratio": 0.88,
        "vitcop.visual_tokens.encoder": 576,
        "vitcop.visual_tokens.stages": [172, 77, 15],
    }
    assert pruned["start_time"] <= pruned["end_time"]
    assert text["parent_id"] is None
    assert text["attributes"] == {"gen_ai.request.id": "id", "vitcop.pruning_budget": 64}
    assert auto["attributes"] == {"gen_ai.request.id": "id"}
