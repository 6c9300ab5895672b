"""``python -m benchmarks.stage_one_cost``: what Stage I's functions cost on large images.

Measured, in float32 on random numbers: attention received and clustering of a Qwen2.5-VL image
of 1k, 4k and 16k visual tokens, and the rate of a matrix product of the decoder's width. Shares
are taken within a round: the machine may be another one in the next.

Computed: the unpruned prefill of the same image, as the arithmetic of encoder and decoder at the
measured rate. Nothing runs faster than that, so shares of it are upper bounds.

The last line of standard output is a JSON document.
"""

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from math import isqrt
from typing import Any

from benchmarks.conditions import machine
from benchmarks.qwen_checkpoint import QWEN2_5_VL_7B, SMALL, QwenShape
from benchmarks.rounds import summary
from benchmarks.shapes import boundaries
from benchmarks.tables import Table
from vitcop_vllm.pruning.clustering import cluster_labels
from vitcop_vllm.pruning.image_clusters import label_images
from vitcop_vllm.pruning.plan import VisualTokenCounts, plan_counts
from vitcop_vllm.pruning.saliency import attention_received
from vitcop_vllm.pruning.settings import PruningSettings

SHAPES = {"qwen2.5-vl-7b": QWEN2_5_VL_7B, "qwen2.5-vl-small": SMALL}

VISUAL_TOKENS = (1024, 4096, 16_384)
"""Of square images."""

RATIO = 2 / 3

TEXT = 64
"""Tokens of a prompt beside its image."""

_TABLE = Table(
    "Stage I at ratio 2/3: medians measured, unpruned prefill computed",
    (
        ("visual", "visual_tokens", ""),
        ("kept", "kept", ""),
        ("cluster/s", "clustering_seconds", ".3f"),
        ("received/s", "received_seconds", ".3f"),
        ("Gflop/s", "gflops", ".0f"),
        ("prefill/s", "prefill_seconds", ".1f"),
        ("cluster", "clustering_share", ".2%"),
        ("received", "received_share", ".2%"),
    ),
)


def prefill_flops(shape: QwenShape, visual_tokens: int, text: int) -> float:
    """Arithmetic of an unpruned prefill with a square image, matrix products alone.

    Attention of the decoder is causal: half of its pairs are computed.
    """
    patches, wide = 4 * visual_tokens, shape.vision_hidden
    window = min((2 * shape.window) ** 2, patches)
    full = len(shape.full_attention)
    within = patches * window * (shape.vision_layers - full) + patches**2 * full
    encoder = 2.0 * patches * (2 * 3 * shape.patch_size**2) * wide
    encoder += 2 * patches * shape.vision_layers * wide * (4 * wide + 3 * shape.vision_intermediate)
    encoder += 4 * within * wide
    encoder += 2 * visual_tokens * 4 * wide * (4 * wide + shape.hidden)
    tokens, hidden = visual_tokens + text, shape.hidden
    of_kv = hidden // shape.heads * shape.kv_heads
    weights = hidden * (2 * hidden + 2 * of_kv + 3 * shape.intermediate)
    return encoder + shape.layers * (2 * tokens * weights + 2 * tokens**2 * hidden)


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(shape: QwenShape, visual_tokens: int, rounds: int) -> dict[str, Any]:
    """Seconds of clustering and of attention received, and their shares of a prefill."""
    import torch

    random = torch.Generator().manual_seed(0)
    side = isqrt(visual_tokens)
    settings = PruningSettings(**boundaries(shape))
    counts: VisualTokenCounts = plan_counts(settings, RATIO, shape.layers, side * side)
    kept = counts.stages[0]
    features = torch.randn(1, kept, shape.vision_hidden, generator=random)
    index = torch.randperm(side * side, generator=random)[:kept].sort().values[None]
    width = (shape.vision_heads, shape.vision_hidden // shape.vision_heads)
    queries = torch.randn(1, side * side, *width, generator=random)
    keys = torch.randn(1, 4 * side * side, *width, generator=random)
    rows, weight = (
        torch.randn(n, shape.hidden, generator=random) for n in (2048, shape.intermediate)
    )

    def cluster() -> object:
        return label_images(
            cluster_labels, settings, features, index, (side, side), counts.centres, None
        )

    figures: dict[str, list[float]] = defaultdict(list)
    for number in range(rounds + 1):
        clustering = _seconds(cluster)
        product = _seconds(lambda: rows @ weight.T)
        received = _seconds(lambda: attention_received(queries, keys, width[1] ** -0.5))
        product = (product + _seconds(lambda: rows @ weight.T)) / 2
        if not number:
            continue  # it filled caches
        rate = 2 * rows.shape[0] * weight.numel() / product
        prefill = prefill_flops(shape, side * side, TEXT) / rate
        for figure, value in {
            "clustering_seconds": clustering,
            "received_seconds": received,
            "gflops": rate / 1e9,
            "prefill_seconds": prefill,
            "clustering_share": clustering / prefill,
            "received_share": received / prefill,
        }.items():
            figures[figure].append(value)
    return {
        "visual_tokens": side * side,
        "kept": kept,
        **summary(figures, ["clustering_share", "received_share"]),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-vl-7b")
    parser.add_argument("--rounds", type=int, default=5, help="medians are over these")
    parser.add_argument("--visual-tokens", type=int, nargs="+", default=VISUAL_TOKENS, metavar="V")
    arguments = parser.parse_args(argv)
    import torch

    rows = [
        measure(SHAPES[arguments.shape], tokens, arguments.rounds)
        for tokens in arguments.visual_tokens
    ]
    print(*_TABLE.lines(rows), sep="\n")
    threads = torch.get_num_threads()
    conditions = machine() | {"shape": arguments.shape, "threads": threads, "text_tokens": TEXT}
    print(json.dumps({"conditions": conditions | {"rounds": arguments.rounds}, "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
