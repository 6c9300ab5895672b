"""Specs of a segment's KV cache; what its manager does, tests/families shows."""

from typing import Any

import pytest
import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

from vitcop_vllm.engine.kv_cache import StagedAttentionSpec, segments_of_groups

SHAPE: dict[str, Any] = {
    "block_size": 16,
    "num_kv_heads": 2,
    "head_size": 8,
    "dtype": torch.float32,
}


def config_of(*specs: Any) -> KVCacheConfig:
    groups = [KVCacheGroupSpec([str(number)], spec) for number, spec in enumerate(specs)]
    return KVCacheConfig(num_blocks=4, kv_cache_tensors=[], kv_cache_groups=groups)


def test_groups_have_the_stages_of_their_specs():
    specs = [StagedAttentionSpec(**SHAPE, segment=segment) for segment in (0, 1, 1, 2)]
    assert segments_of_groups(config_of(*specs)) == [0, 1, 1, 2]


def test_a_group_without_a_stage_is_refused():
    specs = StagedAttentionSpec(**SHAPE, segment=0), FullAttentionSpec(**SHAPE)
    with pytest.raises(AssertionError, match="FullAttentionSpec"):
        segments_of_groups(config_of(*specs))
