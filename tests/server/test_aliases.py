"""Model names with a ratio."""

from typing import Any

import pytest

from vitcop_server.aliases import split_alias
from vitcop_server.errors import RequestError
from vitcop_vllm.pruning.amount import FixedRatio, auto_of
from vitcop_vllm.pruning.settings import PruningSettings

SETTINGS = PruningSettings(max_pruning_ratio=0.9)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("m", ("m", None)),
        (None, (None, None)),
        ("m@0.889", ("m", FixedRatio(0.889))),
        ("m@0", ("m", FixedRatio(0.0))),
        ("a@b@.5", ("a@b", FixedRatio(0.5))),
        ("a@b", ("a@b", None)),
        ("a@0.5", ("a@0.5", None)),  # vLLM refuses the unknown model
        ("other@0.5", ("other@0.5", None)),
        ("other", ("other", None)),
        ("m@0.3", ("m@0.3", None)),
        ("m@auto", ("m", auto_of(SETTINGS))),
    ],
)
def test_names_are_split(name: str | None, expected: Any) -> None:
    assert split_alias(name, ["m", "a@b", "m@0.3"], SETTINGS) == expected


@pytest.mark.parametrize("ratio", ["", "x", "0.95", "-1", "1e-1", "0,5"])
def test_a_bad_ratio_after_a_served_model_is_refused(ratio: str) -> None:
    with pytest.raises(RequestError, match=r"from 0 to 0\.9") as refused:
        split_alias(f"m@{ratio}", ["m"], SETTINGS)
    assert refused.value.param == "model"
