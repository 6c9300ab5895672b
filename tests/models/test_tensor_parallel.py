"""Tensor-parallel ranks, simulated by threads, combine values with vLLM's functions."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, local

import pytest
import torch
from vllm.distributed import parallel_state

from tests.models.test_crossing import (
    CENTRES,
    DEEP,
    DROPPED_AT_ONCE,
    KEPT,
    ROWS,
    V,
    crossing_of,
    labels_of,
    layer_before,
    step_of,
)
from vitcop_vllm.models.tensor_parallel import concat_over_ranks, mean_over_ranks
from vitcop_vllm.pruning.plan import VisualTokenCounts

RANKS = 2


class Communicator:
    """Replaces vLLM's group; accepts only tensors that all of vLLM's communicators accept."""

    world_size = RANKS

    def __init__(self) -> None:
        self.barrier, self.rank = Barrier(RANKS), local()
        self.held: list[torch.Tensor] = [torch.empty(0)] * RANKS

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        assert x.dim() == 1, "FlashInfer accepts only some 2-D tensors"
        return sum(self.exchange(x), torch.zeros(()))

    def all_gather(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        assert dim % x.dim() != 0, "in dimension 0 the result may be a shared buffer"
        return torch.cat(self.exchange(x), dim=dim)

    def exchange(self, x: torch.Tensor) -> list[torch.Tensor]:
        assert x.is_contiguous()
        self.held[self.rank.number] = x
        self.barrier.wait(timeout=30)
        held = list(self.held)
        self.barrier.wait(timeout=30)
        return held

    def run(self, function, *per_rank):
        """Call the function on each rank with the rank's arguments. Returns the results."""

        def of_rank(number, args):
            self.rank.number = number
            return function(*args)

        with ThreadPoolExecutor(RANKS) as pool:
            return [*pool.map(of_rank, range(RANKS), per_rank)]


@pytest.fixture
def communicator(monkeypatch) -> Communicator:
    communicator = Communicator()
    monkeypatch.setattr(parallel_state, "_TP", communicator)
    return communicator


@pytest.mark.parametrize("shape", [(3,), (2, 7), (2, 7, 5)])
def test_mean_over_ranks(shape, communicator):
    held = [torch.rand(*reversed(shape)).permute(*reversed(range(len(shape)))) for _ in range(2)]
    assert mean_over_ranks(held[0], 1) is held[0]
    for mean in communicator.run(mean_over_ranks, *((x, RANKS) for x in held)):
        torch.testing.assert_close(mean, (held[0] + held[1]) / 2)


def test_concat_over_ranks_concatenates_the_last_dimension(communicator):
    held = [torch.rand(4, 7, 2).transpose(0, 1) for _ in range(2)]
    assert concat_over_ranks(held[0], 1) is held[0]
    for whole in communicator.run(concat_over_ranks, *((x, RANKS) for x in held)):
        assert torch.equal(whole, torch.cat(held, dim=-1))


@pytest.mark.parametrize(
    ("selector", "counts"),
    [
        ("vitcop", VisualTokenCounts(V, CENTRES, (V, KEPT, DEEP))),
        ("key_norm", VisualTokenCounts(V, 0, (V, KEPT, DEEP))),
        ("fastv", DROPPED_AT_ONCE),
        ("dart", DROPPED_AT_ONCE),
    ],
)
def test_all_ranks_keep_the_same_rows(selector, counts, communicator):
    # Each rank holds half of the heads.
    layer, cross = layer_before(), crossing_of(selector)
    halves = [
        layer._replace(query=query, key=key)
        for query, key in zip(layer.query.chunk(2, dim=1), layer.key.chunk(2, dim=1), strict=True)
    ]
    args = (step_of(counts), torch.arange(ROWS))
    first, second = communicator.run(
        lambda half: cross(1, *args, half, labels_of()), *((half,) for half in halves)
    )
    for value, other_value in zip(first, second, strict=True):
        assert torch.equal(value, other_value)
    communicator.world_size = 1
    for value, alone in zip(first, cross(1, *args, layer, labels_of()), strict=True):
        torch.testing.assert_close(value, alone)
