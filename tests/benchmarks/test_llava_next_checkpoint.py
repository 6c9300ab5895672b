"""LLaVA-NeXT checkpoints of the bench."""

from benchmarks.llava_next_checkpoint import SMALL
from tests.checkpoints.tiny import LLAVA_NEXT


def test_grids_of_the_published_models():
    """48 rows of 48 patches and a mark, after the 24 x 24 patches of the whole image."""
    assert SMALL.grids(672, 672) == [(24, 24, False), (48, 48, True)]
    assert SMALL.visual_tokens == 576 + 48 * 49


def test_padding_has_no_tokens():
    assert SMALL.grids(1000, 500) == [(24, 24, False), (24, 48, True)]
    assert SMALL.grids(640, 480) == [(24, 24, False), (36, 48, True)]
    assert LLAVA_NEXT.grids(2000, 60)[1] == (0, 0, True)
    assert LLAVA_NEXT.grids(60, 2000)[1] == (24, 0, True)
