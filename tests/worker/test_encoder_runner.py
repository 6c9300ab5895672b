"""The model runner of models that Stage I alone prunes."""

from types import SimpleNamespace
from typing import Any

import torch
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vitcop_vllm.models.pruned_encoder import PrunedEncoder
from vitcop_vllm.worker.encoder_runner import StageOneModelRunner


def test_places_are_added_where_a_graph_is_replayed_in_place_of_the_model(monkeypatch):
    """A replay reads the positions from the runner's tensor, and calls no forward."""
    read: list[torch.Tensor] = []
    monkeypatch.setattr(
        GPUModelRunner, "_model_forward", lambda self, positions: read.append(positions.clone())
    )
    model = PrunedEncoder.__new__(PrunedEncoder)
    model._places = torch.tensor([[0, 1, 1], [0, 0, 2]])
    runner: Any = StageOneModelRunner.__new__(StageOneModelRunner)
    runner.model = SimpleNamespace()
    runner.get_model = lambda: model
    positions = torch.full((3, 5), 7)
    runner._model_forward(positions=positions)
    runner._model_forward(positions=positions)  # added once
    assert read[0].tolist() == [[7] * 5, [7, 8, 8, 7, 7], [7, 7, 9, 7, 7]]
    assert torch.equal(read[1], read[0])
