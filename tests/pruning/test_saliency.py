import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.pruning import oracle
from vitcop_vllm.pruning import saliency
from vitcop_vllm.pruning.saliency import (
    attention_received,
    cls_saliency,
    most_salient,
)


def attention_inputs(images=3, patches=17, heads=4, size=8, seed=0):
    torch.manual_seed(seed)
    return torch.randn(images, heads, size), torch.randn(images, 1 + patches, heads, size)


@pytest.mark.parametrize("scale", [8**-0.5, 3.0])
def test_saliency_is_the_attention_of_cls_summed_over_heads(scale):
    query, keys = attention_inputs()
    got = cls_saliency(query, keys, scale)
    assert got.dtype == torch.float32
    for image in range(3):
        wanted = oracle.saliency(query[image].numpy(), keys[image].numpy(), scale)
        np.testing.assert_allclose(got[image].numpy(), wanted, rtol=1e-4, atol=1e-6)


def test_saliency_leaves_out_the_attention_of_cls_to_itself():
    query, keys = attention_inputs()
    assert (cls_saliency(query, keys, 0.3).sum(dim=1) < 4).all()
    keys[:, 0] = -1e4 * query
    torch.testing.assert_close(cls_saliency(query, keys, 0.3).sum(dim=1), torch.full((3,), 4.0))


def test_saliency_grows_with_attention():
    query, keys = attention_inputs()
    keys[:, 1 + 5] = query
    keys[:, 1 + 6] = -query
    got = cls_saliency(query, keys, 1.0)
    assert (got[:, 5] > got[:, 6]).all()


def test_saliency_of_half_precision_is_computed_in_float32():
    query, keys = (x.bfloat16() for x in attention_inputs())
    torch.testing.assert_close(
        cls_saliency(query, keys, 0.3), cls_saliency(query.float(), keys.float(), 0.3)
    )


def test_saliency_survives_scores_past_the_range_of_exp():
    query, keys = attention_inputs()
    assert cls_saliency(1e3 * query, 1e3 * keys, 1.0).isfinite().all()


def test_saliency_of_a_batch_equals_that_of_its_images():
    query, keys = attention_inputs()
    single = [cls_saliency(query[i : i + 1], keys[i : i + 1], 0.3) for i in range(3)]
    torch.testing.assert_close(cls_saliency(query, keys, 0.3), torch.cat(single))


@given(st.lists(st.integers(0, 5), min_size=1, max_size=40), st.data())
def test_most_salient_keeps_order_and_breaks_ties_by_index(values, data):
    count = data.draw(st.integers(1, len(values)))
    got = most_salient(torch.tensor([values, values[::-1]], dtype=torch.float32), count)
    assert got.dtype == torch.int64
    assert got[0].tolist() == oracle.largest(values, count)
    assert got[1].tolist() == oracle.largest(values[::-1], count)


@pytest.mark.parametrize("count", [288, 230, 172])
def test_most_salient_at_published_sizes(count):
    torch.manual_seed(count)
    values = torch.rand(2, 576)
    values[1] = 0.25
    got = most_salient(values, count)
    assert got[0].tolist() == oracle.largest(values[0].tolist(), count)
    assert got[1].tolist() == list(range(count))


def test_attention_received_is_the_mean_over_queries(monkeypatch):
    torch.manual_seed(0)
    queries, keys = torch.randn(2, 30, 4, 8), torch.randn(2, 23, 4, 8)
    scores = torch.einsum("bqhd,bkhd->bhqk", queries, keys) * 0.4
    expected = scores.softmax(-1).sum(1).mean(1)
    got = attention_received(queries, keys, 0.4)
    torch.testing.assert_close(got, expected)
    monkeypatch.setattr(saliency, "MAX_SCORES", 4 * 23 * 7)  # 7 queries at a time
    torch.testing.assert_close(attention_received(queries, keys, 0.4), expected)


def test_an_image_gets_the_same_bits_in_any_batch():
    torch.manual_seed(1)
    queries, keys = torch.randn(3, 40, 2, 8), torch.randn(3, 160, 2, 8)
    together = attention_received(queries, keys, 0.4)
    for i in range(3):
        alone = attention_received(queries[i : i + 1], keys[i : i + 1], 0.4)
        assert torch.equal(together[i : i + 1], alone)


@pytest.mark.parametrize("grid", [(128, 128), (48, 48), (27, 19), (4097, 1), (20, 800)])
def test_the_sample_of_queries_is_spread_evenly_over_the_grid(grid):
    rows, columns = grid
    sample = saliency._spread(rows * columns, torch.device("cpu"))
    assert len(sample.unique()) == len(sample) == saliency.MAX_QUERIES
    for place, extent in ((sample // columns, rows), (sample % columns, columns)):
        share = torch.bincount(place, minlength=extent).float() / len(sample)
        for part in share.tensor_split(min(extent, 16)):
            assert abs(float(part.sum()) - len(part) / extent) < 0.01


def test_attention_received_averages_over_the_sample(monkeypatch):
    torch.manual_seed(2)
    monkeypatch.setattr(saliency, "MAX_QUERIES", 16)
    queries, keys = torch.randn(1, 50, 2, 8), torch.randn(1, 20, 2, 8)
    sample = saliency._spread(50, queries.device)
    assert len(sample) == 16
    expected = attention_received(queries[:, sample], keys, 0.4)
    assert torch.equal(attention_received(queries, keys, 0.4), expected)
