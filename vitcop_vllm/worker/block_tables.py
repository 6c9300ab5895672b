"""vLLM's block tables, with the KV slots of a segment's groups computed at once."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.utils import CpuGpuBuffer
from vllm.v1.worker.block_table import MultiGroupBlockTable

from vitcop_vllm.adoption import adopt
from vitcop_vllm.engine.attention import DecodeView, PrefillView, by_row


class StagedBlockTables(MultiGroupBlockTable):
    """Block tables of G groups, whose slots follow the rows of their segment.

    vLLM splits a segment's layers over groups of equal size, 12 to 16 in all, and computes slots
    group by group. Rows and lengths are the same in all groups of a segment, and in all groups of
    a step that prunes nothing: here such groups are rows of one tensor, and cost one gather. On
    a CPU that is most of what many groups cost.

    Attributes:
        rows: Segment -> what it sees of the step; an absent segment sees what vLLM planned.
    """

    rows: Mapping[int, PrefillView | DecodeView]
    _host_blocks: npt.NDArray[np.int32]
    _device_blocks: torch.Tensor | None

    @classmethod
    def adopt(cls, tables: MultiGroupBlockTable, segment_of_group: Sequence[int]) -> Self:
        """Make ``tables``, which vLLM has made and nobody has used yet, one of these.

        Raises:
            ValueError: If groups differ in block size or in how long a request may be.
        """
        first = tables.block_tables[0]
        shapes = {(t.block_size, tuple(t.block_table.cpu.shape)) for t in tables.block_tables}
        if len(shapes) > 1:
            raise ValueError("groups of layers with unequal blocks cannot be pruned")
        adopted: Any = adopt(tables, cls)
        adopted.rows = {}
        num_groups = len(segment_of_group)
        blocks, slots = (
            _buffer(num_groups, *old.cpu.shape, like=old)
            for old in (first.block_table, first.slot_mapping)
        )
        # Groups of a segment stand together, whatever order vLLM made them in.
        order = sorted(range(num_groups), key=segment_of_group.__getitem__)
        for place, group in enumerate(order):
            table = tables.block_tables[group]
            table.block_table = _row(blocks, place)
            table.slot_mapping = _row(slots, place)
        adopted._host_blocks = blocks.np
        adopted._device_blocks = None if blocks.gpu is blocks.cpu else blocks.gpu
        adopted._blocks, adopted._slots = blocks.gpu.flatten(1), slots.gpu
        adopted._block_size = first.block_size
        max_num_reqs, max_num_blocks = blocks.gpu.shape[1:]
        # Of each request, among the flat blocks of a group.
        adopted._first_blocks = (
            torch.arange(max_num_reqs, device=blocks.gpu.device) * max_num_blocks
        )
        adopted._places = {
            segment: slice(
                sum(other < segment for other in segment_of_group),
                sum(other <= segment for other in segment_of_group),
            )
            for segment in sorted(set(segment_of_group))
        }
        return adopted

    def commit_block_table(self, num_reqs: int) -> None:
        """Copy the tables of the first requests to the device: of all groups in one transfer.

        Args:
            num_reqs: R. Columns past the longest of their tables are left as they are.
        """
        if self._device_blocks is None:  # a CPU's tables are where vLLM writes them
            return
        used = max(int(t.num_blocks_per_row[:num_reqs].max()) for t in self.block_tables)
        packed = np.ascontiguousarray(self._host_blocks[:, :num_reqs, :used])
        self._device_blocks[:, :num_reqs, :used] = async_tensor_h2d(
            packed, device=self._device_blocks.device
        )

    def compute_slot_mapping(
        self, num_reqs: int, query_start_loc: torch.Tensor, positions: torch.Tensor
    ) -> None:
        """Write the slots of a step.

        Args:
            num_reqs: R, requests of the step.
            query_start_loc: (R + 1,) int32, first row of each request where no segment differs.
            positions: (T,) int64, position of each row there.
        """
        if not self.rows:
            self._compute(slice(None), query_start_loc, positions)
            return
        for segment, places in self._places.items():
            if (rows := self.rows.get(segment)) is None:
                self._compute(places, query_start_loc, positions)
            else:
                self._compute(places, *rows.slot_inputs(query_start_loc, positions))

    def _compute(
        self, places: slice, query_start_loc: torch.Tensor, positions: torch.Tensor
    ) -> None:
        num_rows, num_reqs = positions.shape[0], query_start_loc.shape[0] - 1
        first = by_row(self._first_blocks[:num_reqs], query_start_loc, num_rows)
        blocks = self._blocks[places].index_select(1, positions // self._block_size + first)
        torch.add(
            positions % self._block_size,
            blocks,
            alpha=self._block_size,
            out=self._slots[places, :num_rows],
        )


def _buffer(*shape: int, like: CpuGpuBuffer) -> CpuGpuBuffer:
    device = like.gpu.device
    buffer = CpuGpuBuffer(*shape, dtype=like.cpu.dtype, device=device)
    if device.type == "cpu":
        buffer.gpu = buffer.cpu  # as in vLLM's CPU model runner: nothing to copy
    return buffer


def _row(buffer: CpuGpuBuffer, place: int) -> CpuGpuBuffer:
    row = copy.copy(buffer)
    row.cpu, row.gpu, row.np = buffer.cpu[place], buffer.gpu[place], buffer.np[place]
    return row
