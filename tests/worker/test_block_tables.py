"""Slot mappings of all KV cache groups, compared with a slot-by-slot computation."""

import numpy as np
import pytest
import torch
from vllm.v1.utils import CpuGpuBuffer
from vllm.v1.worker.block_table import MultiGroupBlockTable

from tests.device_guard import CUDA, no_host_sync
from vitcop_vllm.engine.attention import DecodeView, PrefillView
from vitcop_vllm.worker import block_tables
from vitcop_vllm.worker.block_tables import StagedBlockTables

CPU = torch.device("cpu")
BLOCK_SIZE = 4
SEGMENTS = [2, 0, 1, 1, 2]
UNWRITTEN = -7


def vllm_tables(block_sizes, device=CPU):
    return MultiGroupBlockTable(
        max_num_reqs=6,
        max_num_batched_tokens=64,
        pin_memory=False,
        device=device,
        block_sizes=block_sizes,
        max_num_blocks=[32] * len(block_sizes),
    )


@pytest.fixture
def tables():
    """Tables of three requests with distinct blocks in every group."""
    tables = StagedBlockTables.adopt(vllm_tables([BLOCK_SIZE] * len(SEGMENTS)), SEGMENTS)
    blocks = iter(np.random.default_rng(0).permutation(200).tolist())
    for request in range(3):
        tables.add_row(tuple([next(blocks) for _ in range(8)] for _ in SEGMENTS), request)
    for table in tables.block_tables:
        table.slot_mapping.gpu.fill_(UNWRITTEN)
    return tables


def rows_of(spans):
    """First row of each request, and positions, for requests that compute [start, end)."""
    starts = torch.tensor([0, *(end - start for start, end in spans)], dtype=torch.int32)
    positions = torch.cat([torch.arange(start, end) for start, end in spans])
    return starts.cumsum(0, dtype=torch.int32), positions


def segment_rows(spans):
    first, positions = rows_of(spans)
    lengths = torch.tensor([end for _, end in spans], dtype=torch.int32)
    longest = max(end - start for start, end in spans)
    return PrefillView(
        first, first, lengths, lengths, positions, len(positions), longest, int(lengths.max())
    )


def assert_slots(tables, spans_of_segment):
    for table, segment in zip(tables.block_tables, SEGMENTS, strict=True):
        expected = [
            int(table.block_table.np[request, position // BLOCK_SIZE]) * BLOCK_SIZE
            + position % BLOCK_SIZE
            for request, (start, end) in enumerate(spans_of_segment[segment])
            for position in range(start, end)
        ]
        slots = table.slot_mapping.gpu.tolist()
        assert slots[: len(expected)] == expected
        assert set(slots[len(expected) :]) == {UNWRITTEN}


def test_all_stages_share_the_slots_of_an_unpruned_step(tables):
    spans = [(0, 9), (30, 31), (5, 12)]
    tables.compute_slot_mapping(3, *rows_of(spans))
    assert_slots(tables, [spans] * 3)


def test_each_stage_maps_its_own_rows(tables):
    spans = [(0, 9), (30, 31), (5, 12)], [(0, 6), (21, 22), (5, 12)], [(0, 3), (11, 12), (4, 4)]
    tables.rows = {segment: segment_rows(spans[segment]) for segment in (1, 2)}
    tables.compute_slot_mapping(3, *rows_of(spans[0]))
    assert_slots(tables, spans)
    tables.rows = {}
    tables.compute_slot_mapping(3, *rows_of(spans[0]))
    assert_slots(tables, [spans[0]] * 3)


def test_row_operations_equal_vllm_s(tables):
    plain = vllm_tables([BLOCK_SIZE] * len(SEGMENTS))
    blocks = [table.block_table.np.copy() for table in tables.block_tables]
    for request in range(3):
        plain.add_row(tuple(b[request, :8].tolist() for b in blocks), request)
    for each in (tables, plain):
        each.swap_row(0, 2)
        each.move_row(1, 4)
        each.append_row(tuple([group] for group in range(len(SEGMENTS))), 4)
        each.clear_row(2)
        each.commit_block_table(6)
    for actual, expected in zip(tables.block_tables, plain.block_tables, strict=True):
        np.testing.assert_array_equal(actual.block_table.np, expected.block_table.np)
        assert torch.equal(actual.get_device_tensor(6), expected.get_device_tensor(6))


def test_unequal_blocks_are_refused():
    with pytest.raises(ValueError, match="unequal blocks"):
        StagedBlockTables.adopt(vllm_tables([4, 8]), [0, 1])


def test_one_transfer_sends_the_used_columns_of_all_groups(monkeypatch):
    transfers = []

    def buffer(*shape, like):
        separate = CpuGpuBuffer(*shape, dtype=like.cpu.dtype, device=torch.device("cpu"))
        separate.gpu.fill_(UNWRITTEN)  # shares no memory with the host tensor, as on a GPU
        return separate

    def transfer(values, device):
        transfers.append(values.shape)
        assert values.flags.c_contiguous
        return torch.from_numpy(values)

    monkeypatch.setattr(block_tables, "_buffer", buffer)
    monkeypatch.setattr(block_tables, "async_tensor_h2d", transfer)
    tables = StagedBlockTables.adopt(vllm_tables([BLOCK_SIZE] * len(SEGMENTS)), SEGMENTS)
    for request, longest in enumerate((2, 5, 7)):
        lengths = [longest - segment for segment in SEGMENTS]
        tables.add_row(tuple([*range(1, length + 1)] for length in lengths), request)

    tables.commit_block_table(2)  # the third request is not in the step

    assert transfers == [(len(SEGMENTS), 2, 5)]
    for table in tables.block_tables:
        device = table.get_device_tensor(6)
        assert device[:2, :5].tolist() == table.get_cpu_tensor()[:2, :5].tolist()
        assert (device[2:] == UNWRITTEN).all()
        assert (device[:, 5:] == UNWRITTEN).all()


@no_host_sync()
@pytest.mark.parametrize("alike", [True, False])
def test_slots_do_not_make_the_host_wait_for_the_gpu(alike):
    tables = StagedBlockTables.adopt(vllm_tables([BLOCK_SIZE] * len(SEGMENTS), CUDA), SEGMENTS)
    tables.add_row(tuple([[1, 2]] * len(SEGMENTS)), 0)
    tables.add_row(tuple([[3, 4]] * len(SEGMENTS)), 1)
    tables.commit_block_table(2)
    first = torch.tensor([0, 5, 6], dtype=torch.int32).to(CUDA, non_blocking=True)
    positions = torch.arange(6, device=CUDA)
    shorter = torch.ones(2, dtype=torch.int32, device=CUDA)
    if not alike:
        rows = PrefillView(first, shorter, shorter, shorter, positions[:4], 4, 3, 7)
        tables.rows = {1: rows, 2: DecodeView(shorter, shorter, 7)}
    tables.compute_slot_mapping(2, first, positions)
