"""Frames of a video, compared with the frame before (setting ``compare_frames``).

Stage I first drops the tokens that show the same as their place in the frame before. Among the
tokens that show a change, and among those that do not, the selector's saliency decides. So a still
video, and one that changes everywhere, are ranked by saliency alone.

Like run-length tokenization (arXiv 2411.05222), this compares pixels. A token's features, which
vLLM's EVS compares, depend on the whole frame, and their last digits on how many frames are encoded
at once. Pixels are the same in any batch and on all tensor-parallel ranks. They are there before
the encoder runs, also those of a frame that is encoded in another part.
"""

import torch
from torch import Tensor

SAME = 0.01
"""Mean square difference, as a share of the frame's variance, up to which a place shows the same.

It is that of a tenth of the standard deviation. Compression and a camera's weak noise lie below it.
In a video with more noise, all places show a change.
"""


def changed_tokens(before: Tensor | None, pixels: Tensor) -> Tensor:
    """(V,) bool, whether a token shows something else than the same place in the frame before.

    Args:
        before: (V, C) pixels of the frame before; ``None`` for a video's first frame, whose tokens
            all show something new.
        pixels: (V, C) pixels of the frame, C of each token.
    """
    if before is None:
        return torch.ones(pixels.shape[0], dtype=torch.bool, device=pixels.device)
    wide = pixels.float()
    difference = (wide - before.float()).square_().mean(dim=1)
    return difference > SAME * wide.var(correction=0)


def changed_first(saliency: Tensor, changed: Tensor, count: int) -> Tensor:
    """The ``count`` most salient tokens, of which unchanged ones come after all others.

    Args:
        saliency: (B, V), higher is more salient; ties go to the lower index.
        changed: (B, V) bool.
        count: Tokens to keep, at most V.

    Returns:
        (B, count) int64, ascending.
    """
    order = saliency.argsort(dim=1, descending=True, stable=True)
    unchanged = (~changed).int().gather(1, order)
    best = order.gather(1, unchanged.argsort(dim=1, stable=True))[:, :count]
    return best.sort(dim=1).values
