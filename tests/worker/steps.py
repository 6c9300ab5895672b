"""Steps as vLLM describes them, for tests of what stages make of them."""

from collections.abc import Sequence

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

PAD_SLOT = -1
CPU = torch.device("cpu")


def common_metadata(
    spans: Sequence[tuple[int, int]],
    *,
    padding: int = 0,
    num_blocks: int = 8,
    device: torch.device = CPU,
) -> CommonAttentionMetadata:
    """vLLM's metadata of requests that compute [start, end), with requests that pad a graph.

    Slots and block tables are empty; there is a row for each request that pads.
    """
    starts = torch.tensor([start for start, _ in spans] + [0] * padding)
    ends = torch.tensor([end for _, end in spans] + [0] * padding)
    lengths = (ends - starts).tolist()
    first = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    positions = torch.cat([torch.arange(start, end) for start, end in spans])
    num_rows = len(positions) + padding
    return CommonAttentionMetadata(
        query_start_loc=first.to(device, non_blocking=True),
        query_start_loc_cpu=first.clone(),
        seq_lens=ends.to(torch.int32).to(device, non_blocking=True),
        seq_lens_cpu_upper_bound=ends.to(torch.int32),
        num_reqs=len(spans) + padding,
        num_actual_tokens=num_rows,
        max_query_len=max(lengths),
        max_seq_len=int(ends.max()),
        block_table_tensor=torch.zeros(
            len(spans) + padding, num_blocks, dtype=torch.int32, device=device
        ),
        slot_mapping=torch.full((num_rows,), PAD_SLOT, device=device),
        positions=positions.to(device, non_blocking=True),
    )
