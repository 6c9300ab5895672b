"""The bench's figures for people."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.rounds import Row

_WIDTH = 11


@dataclass(frozen=True)
class Table:
    """A scenario's table.

    Attributes:
        title: What its figures are.
        columns: Heading, figure, format. A column that no row has is left out, a figure that
            a row lacks stays empty.
        notes: What to know of a figure, told where there is one.
    """

    title: str
    columns: tuple[tuple[str, str, str], ...]
    notes: tuple[tuple[str, str], ...] = ()

    def lines(self, rows: Sequence[Row]) -> list[str]:
        shown = [column for column in self.columns if any(column[1] in row for row in rows)]
        lines = [self.title, "".join(f"{heading:>{_WIDTH}}" for heading, _, _ in shown)]
        for row in rows:
            cells = [format(row[key], style) if key in row else "" for _, key, style in shown]
            lines.append("".join(f"{cell:>{_WIDTH}}" for cell in cells))
        lines += [note for figure, note in self.notes if any(figure in row for row in rows)]
        return lines


_PREFILL = (
    ("ratio", "ratio", ""),
    ("batch", "batch", ""),
    ("px", "image_size", ""),
    ("images", "images", ""),
    ("text", "text_tokens", ""),
    ("selector", "selector", ""),
    ("visual", "average_tokens", ".1f"),
    ("stock/ms", "stock_ms", ".0f"),
    ("encoder/ms", "stock_encoder_ms", ".0f"),
    ("pruned/ms", "pruned_ms", ".0f"),
    ("encoder/ms", "encoder_ms", ".0f"),
    ("speed-up", "speed_up", ".2f"),
    ("ideal", "ideal", ".2f"),
    ("vs-ideal", "vs_ideal", ".3f"),
    ("vs-rows", "vs_stock_rows", ".3f"),
    ("stages", "stages_share", ".2%"),
    ("vs-cls", "vs_peer", ".3f"),
    ("vs-pixels", "vs_scaled_down", ".3f"),
)
_SERVED = (
    ("clients", "clients", ""),
    ("ratio", "ratio", ""),
    ("stock/s", "stock_requests_per_second", ".2f"),
    ("ours/s", "ours_requests_per_second", ".2f"),
    ("ours/stock", "throughput", ".3f"),
    ("ideal", "ideal", ".2f"),
    ("vs-ideal", "vs_ideal", ".3f"),
    ("stock-p50", "stock_ttft_p50_ms", ".0f"),
    ("ours-p50", "ours_ttft_p50_ms", ".0f"),
    ("stock-p99", "stock_ttft_p99_ms", ".0f"),
    ("ours-p99", "ours_ttft_p99_ms", ".0f"),
    ("p99/stock", "ttft_p99", ".3f"),
)

TABLES = {
    "prefill": Table(
        "prefill",
        _PREFILL,
        (
            (
                "vs_scaled_down",
                "max_pixels is stock vLLM on images scaled down to about as many visual tokens: "
                "that saves work of the encoder, too, which pruning does not",
            ),
        ),
    ),
    "images": Table("prefill, many images in a prompt", _PREFILL),
    "long_text": Table("prefill, an image and much text", _PREFILL),
    "decode": Table(
        "decode, over stock",
        (
            ("ratio", "ratio", ""),
            ("running", "running", ""),
            ("selector", "selector", ""),
            ("stock/ms", "stock_decode_step_ms", ".1f"),
            ("step", "decode_latency", ".3f"),
            ("ideal", "ideal_decode_latency", ".3f"),
            ("throughput", "throughput", ".3f"),
            ("ideal", "ideal", ".2f"),
            ("vs-ideal", "vs_ideal", ".3f"),
            ("same", "same_tokens", ""),
            ("vs-cls", "vs_peer", ".3f"),
        ),
    ),
    "turns": Table(
        "second turn about an image: time to first token, and prompt tokens reused",
        (
            ("ratio", "ratio", ""),
            ("stock/ms", "stock_ttft_ms", ".0f"),
            ("ours/ms", "ours_ttft_ms", ".0f"),
            ("ours/stock", "ttft", ".3f"),
            ("ideal", "ideal", ".2f"),
            ("stock-hits", "stock_reused_tokens", ".0f"),
            ("of", "stock_prompt_tokens", ".0f"),
            ("ours-hits", "ours_reused_tokens", ".0f"),
            ("of", "ours_prompt_tokens", ".0f"),
        ),
    ),
    "capacity": Table(
        "requests at once in the same KV memory",
        (
            ("ratio", "ratio", ""),
            ("selector", "selector", ""),
            ("stock", "stock_most", ".0f"),
            ("ideal", "stock_ideal", ".2f"),
            ("vs-ideal", "stock_vs_ideal", ".3f"),
            ("pruned", "most", ".0f"),
            ("ideal", "ideal", ".2f"),
            ("vs-ideal", "vs_ideal", ".3f"),
            ("preempted", "preemptions", ".0f"),
            ("vs-cls", "vs_peer", ".3f"),
        ),
    ),
    "load": Table(
        "open load, Poisson arrivals: rate over what stock serves, requests/s, ms to first token",
        (("rate", "rate", ""), ("arrivals/s", "arrivals_per_second", ".2f"), *_SERVED),
    ),
    "clients": Table("clients who wait for their answers: requests/s, ms to first token", _SERVED),
    "cold_start": Table(
        "seconds from the start of a process",
        (
            ("stock", "stock_ready_seconds", ".2f"),
            ("ours", "ours_ready_seconds", ".2f"),
            ("more", "ready_seconds_over_stock", "+.2f"),
            ("to token", "stock_first_token_seconds", ".2f"),
            ("ours", "ours_first_token_seconds", ".2f"),
            ("more", "first_token_seconds_over_stock", "+.2f"),
        ),
    ),
}
"""By scenario, in the order they are shown."""


_ENGINE = (
    ("engine", "engine", ""),
    ("runner", "model_runner_version", ""),
    ("block", "block_size", ""),
    ("blocks", "kv_blocks", ""),
    ("compiled", "compilation_mode", ""),
    ("graphs", "graphs", ""),
    ("async", "async_scheduling", ""),
)


def _engine_row(name: str, about: Mapping[str, Any]) -> Row:
    graphs = about["cudagraph_mode"].rpartition(".")[2].lower()
    return {**about, "engine": name, "graphs": graphs}


def table_lines(document: Mapping[str, Any]) -> list[str]:
    """How the engines were set up, tables of the scenarios that were run, then the goals."""
    engines = document["conditions"]["engines"]
    rows = [_engine_row(name, about) for name, about in engines.items()]
    lines = Table("engines", _ENGINE).lines(rows) if rows else []
    for scenario, table in TABLES.items():
        if scenario in document:
            lines += ["", *table.lines(document[scenario])]
    lines.append("")
    for name, goal in document["goals"].items():
        verdict = "met" if goal["met"] else "MISSED"
        lines.append(f"{verdict:>6} {name} {goal['figure']:.3f} {goal['goal']}")
    return lines
