"""Crossing a boundary: which rows enter the next segment, and with which hidden states."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from vllm.distributed import get_tensor_model_parallel_world_size

from vitcop_vllm.engine.metrics import SELECTION_SECONDS
from vitcop_vllm.models.tensor_parallel import mean_over_ranks
from vitcop_vllm.pruning.kernel_set import KernelSet
from vitcop_vllm.pruning.plan import STAGES
from vitcop_vllm.pruning.selection import StageTwoSelection
from vitcop_vllm.pruning.selector import Selector
from vitcop_vllm.pruning.signals import Signal
from vitcop_vllm.pruning.views import BoundaryView
from vitcop_vllm.worker.explain import SelectionSink
from vitcop_vllm.worker.step import SpanGroup, StagedForward


class LayerBefore(NamedTuple):
    """The last layer before a boundary; T rows.

    Attributes:
        scale: Factor on the scores of its attention.
        query, key: (T, local heads, D), (T, local KV heads, D), after rotary embedding.
        value: (T, local KV heads, D).
        raw_keys: Makes (..., local KV heads, D) of (...) rows: their keys as projected; only if
            the signal reads them.
        hidden, residual: (T, H) output of the layer; their sum is the residual stream. It lacks
            the layer's MLP if the selector drops rows before the MLP.
    """

    scale: float
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    raw_keys: Callable[[torch.Tensor], torch.Tensor]
    hidden: torch.Tensor
    residual: torch.Tensor


class SelectedRows(NamedTuple):
    """Rows that stand for the G spans of a group in the next segment, m of n each.

    Attributes:
        rows: (G, m) int64, rows of the segment before.
        chosen: What the selector returned; ``None`` if nothing is dropped.
        stream: (G, m, H) residual stream of these rows if the selector merged tokens.
    """

    rows: torch.Tensor
    chosen: torch.Tensor | StageTwoSelection | None
    stream: torch.Tensor | None


@dataclass(frozen=True)
class Crossing:
    """Drops and merges the visual rows of a step between two segments.

    Attributes:
        selector: Chooses the rows that are kept.
        kernels: Implementation of the functions that choose and merge tokens.
        signal: What the selector ranks tokens by, if it ranks them by a signal.
        norm: The norm that ends the decoder. Its weight is read in each step.
    """

    selector: Selector
    kernels: KernelSet
    signal: Signal
    norm: Any

    def __call__(
        self,
        segment: int,
        step: StagedForward,
        positions: torch.Tensor,
        layer: LayerBefore,
        labels: torch.Tensor | None,
        sink: SelectionSink | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The rows that enter ``segment``: positions, hidden states and residual.

        Args:
            segment: 1 or 2.
            step: How the step's rows change between segments.
            positions: (T,) or (3, T) rotary positions in the segment before.
            layer: The last layer of the segment before.
            labels: (T,) cluster labels of the rows of segment 0; ``None`` without clusters.
            sink: Records what is selected; ``None`` records nothing.
        """
        source = step.sources[segment].clone()
        merged = []
        with SELECTION_SECONDS.labels(STAGES[segment]).time():
            for group in step.groups:
                rows, chosen, stream = self.select_rows(group, segment, layer, labels)
                if sink is not None and chosen is not None:
                    names = [step.images[i].name for i in group.images]
                    sink.record_tokens(names, segment, chosen)
                destination = group.rows(segment)
                source[destination] = rows
                if stream is not None:
                    merged.append((destination, stream))
        hidden, residual = layer.hidden[source], layer.residual[source]
        for destination, stream in merged:
            # Not hidden[destination] = 0: on a GPU the host would copy the 0 there and wait.
            hidden.index_fill_(0, destination.flatten(), 0)
            residual[destination] = stream
        return positions[..., source], hidden, residual

    def select_rows(
        self,
        group: SpanGroup,
        segment: int,
        layer: LayerBefore,
        labels: torch.Tensor | None,
    ) -> SelectedRows:
        """The rows of the segment before that stand for a group's spans in ``segment``."""
        counts = group.counts
        before = group.rows(segment - 1)
        if counts.stages[segment] == counts.stages[segment - 1]:
            # Some selectors drop nothing at this boundary, and mild ratios nothing in Stage III.
            return SelectedRows(before, None, None)
        ranks = get_tensor_model_parallel_world_size()
        view = BoundaryView(
            rows=before,
            queries=layer.query,
            keys=layer.key,
            values=layer.value,
            raw_keys=lambda: layer.raw_keys(before),
            scale=layer.scale,
            hidden=lambda: layer.hidden[before] + layer.residual[before],
            norm_weight=self.norm.weight,
            prompt_rows=None if group.prompt_rows is None else group.prompt_rows[segment - 1],
            labels=None if labels is None or not counts.centres else labels[group.rows(0)],
            num_centres=counts.centres,
            mean_over_ranks=partial(mean_over_ranks, ranks=ranks),
            kernels=self.kernels,
            signal=self.signal,
        )
        chosen = self.selector.select_at(segment, view, counts.stages[segment])
        if not isinstance(chosen, StageTwoSelection):
            return SelectedRows(before.gather(1, chosen), chosen, None)
        stream = self.kernels.merge_tokens(view.hidden(), chosen)
        return SelectedRows(before.gather(1, chosen.index), chosen, stream)
