"""What the engine's processes count. The API server shows it where all write to one directory.

That directory is ``PROMETHEUS_MULTIPROC_DIR``; ``vitcop-serve`` sets it.
"""

from prometheus_client import Counter, Histogram

KV_BLOCKS_NOT_TAKEN = Counter(
    "vitcop_kv_blocks_not_taken",
    "KV cache blocks that prompts would have taken, had no visual token been dropped.",
)

COUNTS_MISMATCHES = Counter(
    "vitcop_counts_mismatches",
    "Requests that failed because an image's identifier and its placeholders in the prompt "
    "contradict each other, by where it was found: processor or scheduler. A fault of the "
    "server or of whoever processed the prompt.",
    ["found_by"],
)

SELECTION_SECONDS = Histogram(
    "vitcop_selection_seconds",
    "Seconds in which visual tokens were chosen, clustered and merged: stage 1 of images that "
    "are encoded together, stages 2 and 3 of a step. Of the CPU, which on a GPU hands out work "
    "and does not wait for it.",
    ["stage"],
    buckets=(1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0),
)
