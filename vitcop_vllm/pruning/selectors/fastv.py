"""FastV (arXiv 2403.06764): the tokens that the prompt's last token attends to most."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vitcop_vllm.pruning.budgets import shallow_boundary_alone
from vitcop_vllm.pruning.selector import Selector

if TYPE_CHECKING:
    from torch import Tensor

    from vitcop_vllm.pruning.views import BoundaryView


def last_token_attention(view: BoundaryView, count: int) -> Tensor:
    """By attention probabilities of the layer before, averaged over heads.

    The softmax is over the whole prompt.
    """
    import torch

    assert view.prompt_rows is not None
    first, last = view.prompt_rows
    # Query heads h * share .. (h + 1) * share - 1 attend to KV head h.
    query = view.queries[last].float().unflatten(1, (view.keys.shape[1], -1))
    scores = torch.einsum("gksd,tkd->gkst", query, view.keys.float()) * view.scale
    row = torch.arange(view.keys.shape[0], device=view.keys.device)
    prompt = (row >= first[:, None]) & (row <= last[:, None])
    attention = scores.masked_fill(~prompt[:, None, None], -torch.inf).softmax(dim=-1)
    received = view.mean_over_ranks(attention.mean(dim=(1, 2)).gather(1, view.rows))
    return view.kernels.most_salient(received, count)


SELECTOR = Selector(shallow_boundary_alone, shallow=last_token_attention, reads_question=True)
