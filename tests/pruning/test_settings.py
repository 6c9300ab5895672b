import math

import pytest
from pydantic import ValidationError

from vitcop_vllm.pruning.settings import PUBLISHED_ROWS, FractionRow, PruningSettings


def test_defaults_are_the_published_settings():
    settings = PruningSettings()
    assert settings.boundaries(32) == (2, 22)
    assert settings.density_scale is None  # the model family sets it; 8 for LLaVA-1.5
    assert settings.spatial_radius == 0.6
    assert settings.default_ratio == 0.0
    assert [(row.encoder, row.centres) for row in PUBLISHED_ROWS] == [
        (0.3, 0.12), (0.4, 0.15), (0.5, 0.18),
    ]  # fmt: skip


def test_settings_are_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        PruningSettings().default_ratio = 0.5  # type: ignore[misc]


def test_equal_settings_have_equal_hashes():
    rows = [{"keep": 0.2, "encoder": 0.4, "centres": 0.1}]
    one, other = (PruningSettings(fractions=rows) for _ in range(2))
    assert one == other
    assert hash(one) == hash(other)
    assert {one: "plan"}[other] == "plan"
    assert hash(one) != hash(PruningSettings())


def test_settings_survive_a_round_trip():
    settings = PruningSettings(shallow_boundary=3, positions="reference", default_ratio=0.25)
    assert PruningSettings.model_validate(settings.model_dump()) == settings
    assert PruningSettings.model_validate_json(settings.model_dump_json()) == settings


def test_a_low_maximum_survives_a_round_trip():
    settings = PruningSettings(max_pruning_ratio=0.5)
    assert PruningSettings(**settings.model_dump()) == settings


def test_the_error_for_an_unknown_key_lists_all_keys_and_suggests_the_nearest():
    with pytest.raises(ValidationError) as caught:
        PruningSettings.model_validate({"defualt_ratio": 0.5})
    text = str(caught.value)
    assert "'defualt_ratio'" in text
    assert "Did you mean 'default_ratio'?" in text
    for known in PruningSettings.model_fields:
        assert known in text


def test_a_key_unlike_every_known_key_gets_no_suggestion():
    with pytest.raises(ValidationError) as caught:
        PruningSettings.model_validate({"zzz": 1})
    assert "Allowed: " in str(caught.value)
    assert "Did you mean" not in str(caught.value)


def test_the_error_for_an_unknown_key_of_a_row_lists_the_row_s_keys():
    row = {"keep": 0.5, "encoders": 0.5, "centres": 0.1}
    with pytest.raises(ValidationError, match=r"'encoder'\? Allowed: centres, encoder, keep"):
        PruningSettings.model_validate({"fractions": [row]})


def test_a_key_that_is_not_a_string_is_unknown():
    with pytest.raises(ValidationError, match="unknown setting 7"):
        PruningSettings.model_validate({7: 1})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("shallow_boundary", 0),
        ("shallow_boundary", -1),
        ("shallow_boundary", 1.5),
        ("deep_boundary", 1),
        ("fractions", []),
        ("density_scale", 0.0),
        ("density_scale", math.nan),
        ("density_scale", math.inf),
        ("spatial_radius", -0.6),
        ("positions", "both"),
        ("compare_frames", "yes"),
        ("compare_frames", 1),
        ("kernels", "cuda"),
        ("counts", "rounded"),
        ("default_ratio", -0.1),
        ("default_ratio", 1.0),
        ("default_ratio", 0.96),
        ("max_pruning_ratio", 1.0),
        ("max_pruning_ratio", math.nan),
        ("default_ratio", None),
    ],
)
def test_value_out_of_range_is_refused(key, value):
    with pytest.raises(ValidationError, match=key):
        PruningSettings.model_validate({key: value})


@pytest.mark.parametrize("field", ["keep", "encoder", "centres"])
@pytest.mark.parametrize("value", [0.0, -0.1, 1.1, math.nan])
def test_fraction_out_of_range_is_refused(field, value):
    with pytest.raises(ValidationError, match=field):
        FractionRow.model_validate({"keep": 0.5, "encoder": 0.5, "centres": 0.5, field: value})


@pytest.mark.parametrize("keeps", [(0.5, 0.2), (0.2, 0.2)])
def test_fractions_must_ascend(keeps):
    rows = [FractionRow(keep=keep, encoder=0.5, centres=0.1) for keep in keeps]
    with pytest.raises(ValidationError, match="ascending"):
        PruningSettings(fractions=tuple(rows))


def test_boundaries_must_ascend():
    with pytest.raises(ValidationError, match="shallow_boundary 9 must be below deep_boundary 9"):
        PruningSettings(shallow_boundary=9, deep_boundary=9)


@pytest.mark.parametrize("num_layers", range(3, 101))
def test_default_boundaries_fit_any_depth_from_three(num_layers):
    shallow, deep = PruningSettings().boundaries(num_layers)
    assert 0 < shallow < deep < num_layers


@pytest.mark.parametrize(
    ("chosen", "num_layers"),
    [({}, 2), ({"deep_boundary": 32}, 32), ({"deep_boundary": 2}, 32)],
)
def test_boundaries_that_do_not_fit_the_model_are_refused(chosen, num_layers):
    with pytest.raises(ValueError, match="do not fit"):
        PruningSettings(**chosen).boundaries(num_layers)


def test_a_large_shallow_boundary_moves_the_default_deep_boundary():
    assert PruningSettings(shallow_boundary=22).boundaries(32) == (22, 23)


@pytest.mark.parametrize(
    ("value", "ratio"),
    [
        ("0", 0.0), ("0.0", 0.0), ("0.5", 0.5), (".5", 0.5), ("00.5", 0.5), (" 0.5\t", 0.5),
        ("0.95", 0.95), ("0.66666666666666666667", 2 / 3), (0, 0.0), (0.0, 0.0), (0.667, 0.667),
        (0.95, 0.95),
    ],
)  # fmt: skip
def test_decimal_ratios_are_accepted(value, ratio):
    assert PruningSettings().parse_ratio(value) == ratio


BAD_RATIOS = [
    "abc", "", " ", "0x1", "0,5", "0.5; q=1", "0.5, 0.5", "-0.1", "-0", "+0.5", "1.5", "1", "0.951",
    "nan", "inf", "-inf", "infinity", "1e-400", "5e-1", "1e400", "0.", ".", "0_5", "0.5\n",
    "0.5\u00a0", "٠.٥", "０.５", "½", "0.5\0", "0" * 9000, "0." + "5" * 9000, "9" * 9000,
    -0.1, 1.5, 1, 2, -1, 0.9500001, math.nan, math.inf, -math.inf, 10**400, -(10**400),
    True, False, None, b"0.5", [0.5], {"ratio": 0.5}, 0.5j,
]  # fmt: skip


@pytest.mark.parametrize("value", BAD_RATIOS, ids=lambda value: repr(value)[:20])
def test_the_error_for_a_bad_ratio_has_name_range_and_value(value):
    with pytest.raises(ValueError, match="X-Ratio must be a decimal number") as caught:
        PruningSettings().parse_ratio(value, name="X-Ratio")
    text = str(caught.value)
    assert "from 0 to 0.95" in text
    assert repr(value)[:12] in text  # long values are shortened in the middle
    assert len(text) < 300


def deeply_nested():
    value: object = 0.5
    for _ in range(100_000):
        value = [value]
    return value


@pytest.mark.parametrize("make", [lambda: 10**5000, deeply_nested], ids=["integer", "list"])
def test_a_bad_ratio_whose_repr_fails_is_refused(make):
    value = make()
    try:
        with pytest.raises(ValueError, match="X-Ratio must be a decimal number"):
            PruningSettings().parse_ratio(value, name="X-Ratio")
    finally:
        while isinstance(value, list):  # a nested free may overflow the stack
            value = value[0]


def test_a_ratio_above_the_operator_s_maximum_is_refused():
    strict = PruningSettings(max_pruning_ratio=0.5)
    assert strict.parse_ratio("0.5") == 0.5
    with pytest.raises(ValueError, match=r"from 0 to 0\.5: "):
        strict.parse_ratio("0.51")
