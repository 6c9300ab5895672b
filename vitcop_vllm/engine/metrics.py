"""Metrics of the engine's processes.

The API server exports them if all processes write to the directory ``PROMETHEUS_MULTIPROC_DIR``.
``vitcop-serve`` sets this variable.
"""

from prometheus_client import Counter, Histogram

KV_BLOCKS_NOT_TAKEN = Counter(
    "vitcop_kv_blocks_not_taken",
    "KV cache blocks that prompts did not take because visual tokens were dropped.",
)

COUNTS_MISMATCHES = Counter(
    "vitcop_counts_mismatches",
    "Requests that failed because an image's identifier and its placeholders in the prompt "
    "contradict each other, by the part that found it: processor or scheduler. The fault is in "
    "the server, or in the client that processed the prompt.",
    ["found_by"],
)

SELECTION_SECONDS = Histogram(
    "vitcop_selection_seconds",
    "CPU seconds spent on selecting, clustering and merging visual tokens, by Stage: I, II "
    "or III. Stage I is timed once per batch of images that are "
    "encoded together, Stages II and III once per step. With a GPU, this is the time to launch "
    "the work, not to complete it.",
    ["stage"],
    buckets=(1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0),
)
