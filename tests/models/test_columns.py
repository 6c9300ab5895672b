"""Integers appended to embeddings as columns come back exactly, in any dtype."""

import pytest
import torch

from vitcop_vllm.models.columns import Columns
from vitcop_vllm.pruning.grids import Grid

HIDDEN = 5
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def embeddings(num_tokens: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.rand(num_tokens, HIDDEN).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("labels", [True, False])
def test_split_returns_the_appended_columns(dtype, labels):
    columns = Columns(HIDDEN, labels=labels, places=True)
    plain, index = embeddings(300, dtype), torch.arange(300) * 54  # up to 16,146
    label = torch.arange(300) % 251
    sent = columns.append(plain, label if labels else None, index, (Grid(1, 127),))
    assert sent.dtype == dtype
    back, back_labels, places = columns.split([sent])
    assert torch.equal(back[0], plain)
    assert (back_labels is None) is not labels
    if back_labels is not None:
        assert torch.equal(back_labels, label)
    assert places is not None
    assert torch.equal(places, torch.stack((index // 127, index % 127), dim=1))


def test_an_image_without_columns_has_zeros():
    columns = Columns(HIDDEN, labels=True, places=True)
    whole = embeddings(4, torch.float32)
    pruned = columns.append(
        embeddings(3, torch.float32),
        torch.tensor([1, 0, 1]),
        torch.tensor([2, 5, 7]),
        (Grid(2, 4),),
    )
    plain, labels, places = columns.split([whole, pruned, whole])
    assert [image.shape for image in plain] == [(4, HIDDEN), (3, HIDDEN), (4, HIDDEN)]
    assert columns.num_tokens([whole, pruned, whole]) == 3
    assert labels is not None
    assert labels.tolist() == [*[0] * 4, 1, 0, 1, *[0] * 4]
    assert places is not None
    zeros = [[0, 0]] * 4
    assert places.tolist() == [*zeros, [0, 2], [1, 1], [1, 3], *zeros]
    assert columns.split([whole])[1:] == (None, None)
    assert columns.split([]) == ([], None, None)


def test_nothing_is_appended_if_the_model_needs_no_columns():
    columns = Columns(HIDDEN, labels=False, places=False)
    plain = embeddings(3, torch.float16)
    assert columns.append(plain, None, torch.arange(3), (Grid(1, 3),)) is plain
