"""Positions of tokens, for tests of functions that take positions."""

import torch

from vitcop_vllm.pruning.grids import Grid, token_places


def patch_positions(index: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """(B, n) tokens of a grid to (B, n, 2) float32 positions."""
    positions = torch.from_numpy(token_places((Grid(rows, columns),)).positions)
    return positions.to(index.device)[index.long()]
