"""Builds steps and vLLM's metadata for tests."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from vitcop_vllm.pruning.plan import RequestPlan
from vitcop_vllm.worker.planner import StepPlanner
from vitcop_vllm.worker.step import StagedStep

PAD_SLOT = -1
CPU = torch.device("cpu")


class ScheduledRequest(NamedTuple):
    """A request's part of a step.

    Attributes:
        plan: ``None`` if nothing is pruned.
        start: Tokens computed before the step.
        end: Tokens computed after the step.
        prompt_tokens: Length of the prompt, placeholders included.
    """

    plan: RequestPlan | None
    start: int
    end: int
    prompt_tokens: int


def build_step(
    requests: Sequence[ScheduledRequest],
    device: torch.device = CPU,
    *,
    renumber_deep: bool = False,
    find_prompts: bool = False,
) -> StagedStep | None:
    """The step of requests that were never planned before."""
    planner = StepPlanner(device, renumber_deep=renumber_deep, find_prompts=find_prompts)
    names = [str(number) for number in range(len(requests))]
    for name, request in zip(names, requests, strict=True):
        planner.track(name, request.plan, request.prompt_tokens)
    starts = np.array([request.start for request in requests])
    return planner.plan_step(names, starts, np.array([request.end for request in requests]))


def common_metadata(
    spans: Sequence[tuple[int, int]],
    *,
    padding: int = 0,
    num_blocks: int = 8,
    device: torch.device = CPU,
) -> CommonAttentionMetadata:
    """vLLM's metadata of requests that compute the tokens [start, end).

    Slots and block tables are empty. ``padding`` requests with a row each pad the batch to a
    graph's size.
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
