"""Every layer computes as many rows as the plan says."""

from collections import Counter
from typing import Any

import pytest

from tests.engine.requests import RequestSpec, generate
from tests.families.family import LLAVA
from vitcop_vllm.demo.checkpoint import TINY
from vitcop_vllm.pruning.settings import PruningSettings

pytestmark = pytest.mark.slow


@pytest.fixture
def rows(llm) -> Any:
    """(part, layer) -> rows that the part computed so far."""
    (model,) = llm.collective_rpc("get_model")
    counted: Counter[tuple[str, int]] = Counter()
    hooks = []

    def count(part: str, number: int, module: Any) -> None:
        def hook(_: Any, __: Any, output: Any) -> None:
            output = output[0] if isinstance(output, tuple) else output
            counted[part, number] += output[..., 0].numel()

        hooks.append(module.register_forward_hook(hook))

    for number, layer in enumerate(model.language_model.model.layers):
        count("qkv", number, layer.self_attn.qkv_proj)
        count("mlp", number, layer.mlp)
    for number, layer in enumerate(model.vision_tower.vision_model.encoder.layers):
        count("encoder qkv", number, layer.self_attn.qkv_proj)
        count("encoder attention", number, layer.self_attn.attn)
        count("encoder mlp", number, layer.mlp.fc2)
    yield counted
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("ratio", [0.0, 2 / 3, 8 / 9])
def test_every_layer_computes_the_rows_of_the_plan(llm, rows, ratio):
    (answer,) = generate(llm, [RequestSpec("what is this?", (1,), ratio, max_tokens=1)])
    shallow, deep = PruningSettings().boundaries(TINY.layers)
    n1, n2, n3 = LLAVA.counts(ratio, image=1).stages
    text = len(answer.prompt) - n1
    computed = {part: [rows[part, i] for i in range(TINY.layers)] for part in ("qkv", "mlp")}
    segments = [n1] * shallow + [n2] * (deep - shallow) + [n3] * (TINY.layers - deep)
    assert computed["qkv"] == [text + n for n in segments]
    # Stage III selects after the attention of the layer before the boundary.
    segments[deep - 1] = n3
    assert computed["mlp"] == [text + n for n in segments]
    patches = 1 + TINY.visual_tokens
    *_, last = sorted(number for part, number in rows if part == "encoder qkv")
    assert [rows["encoder qkv", i] for i in range(last + 1)] == [patches] * (last + 1)
    kept = n1 if ratio else patches
    for part in ("encoder attention", "encoder mlp"):
        assert [rows[part, i] for i in range(last + 1)] == [patches] * last + [kept]
