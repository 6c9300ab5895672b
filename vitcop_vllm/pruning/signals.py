"""Signals: what Stages II and III rank visual tokens by, in the decoder layer before a boundary.

The published signal is the norm of a token's key. A decoder that normalises its keys takes it away:
whatever the token, each head's key has about the same norm. The other signals work in such
decoders too.

Every signal depends on the image and the tokens before it only, never on the question. So a cached
prefix stays valid for other questions.

Without torch at import, like ``selectors``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from vitcop_vllm.pruning.settings import SignalName
    from vitcop_vllm.pruning.views import BoundaryView

LAST_TOKENS = 16
"""Tokens at an image's end whose attention ``image_attention`` reads."""


@dataclass(frozen=True)
class Signal:
    """A signal.

    Attributes:
        score: Makes (G, n) float32, not negative; a smaller score is more salient.
        reads_raw_keys: Whether ``score`` reads ``BoundaryView.raw_keys``, for which the segments
            must keep the input of their last layer.
    """

    score: Callable[[BoundaryView], Tensor]
    reads_raw_keys: bool = False


def _keys(view: BoundaryView) -> Tensor:
    """Norm of the key after rotary embedding, as published (ViTCoP, arXiv 2601.17818)."""
    return view.mean_norm(view.keys[view.rows])


def _raw_keys(view: BoundaryView) -> Tensor:
    """Norm of the key as projected, before the key norm and rotary embedding."""
    return view.mean_norm(view.raw_keys())


def _values(view: BoundaryView) -> Tensor:
    """Norm of the value, averaged over heads; a larger value is more salient."""
    norms = view.values[view.rows].float().norm(dim=-1).mean(dim=-1)
    return _largest_first(view.mean_over_ranks(norms))


def _image_attention(view: BoundaryView) -> Tensor:
    """Attention that a token receives from the last tokens of its own image.

    The mean over heads and over those of the last :data:`LAST_TOKENS` tokens that see the token.
    The softmax is over the image.
    """
    import torch

    keys = view.keys[view.rows].float()
    num_tokens = keys.shape[1]
    num_queries = min(LAST_TOKENS, num_tokens)
    # Query heads h * share .. (h + 1) * share - 1 attend to KV head h.
    queries = view.queries[view.rows[:, -num_queries:]].float().unflatten(2, (keys.shape[2], -1))
    scores = torch.einsum("gqksd,gnkd->gksqn", queries, keys) * view.scale
    later = torch.ones(num_queries, num_tokens, dtype=torch.bool, device=keys.device)
    later = later.triu(num_tokens - num_queries + 1)
    attention = scores.masked_fill(later, -torch.inf).softmax(dim=-1).mean(dim=(1, 2))
    received = attention.sum(dim=1) / (~later).sum(dim=0)
    return _largest_first(view.mean_over_ranks(received))


def _largest_first(saliency: Tensor) -> Tensor:
    """(G, n), higher is more salient, to scores of which smaller is more salient."""
    scores: Tensor = saliency.amax(dim=1, keepdim=True) - saliency
    return scores


SIGNALS: dict[SignalName, Signal] = {
    "keys": Signal(_keys),
    "raw_keys": Signal(_raw_keys, reads_raw_keys=True),
    "values": Signal(_values),
    "image_attention": Signal(_image_attention),
}

DEFAULT_SIGNAL: SignalName = "keys"

DEFAULT_SIGNAL_OF_NORMALISED_KEYS: SignalName = "values"
"""Of decoders that normalise keys. A value enters the layer's output with its norm. The norm of a
raw key is divided out, and attention at the image's end prefers tokens that lie near it."""
