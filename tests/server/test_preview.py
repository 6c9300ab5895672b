"""Plans and explanations for grids of different shapes and sizes."""

import base64
import math
from typing import Any

import numpy as np
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from tests.server.grids import NUM_LAYERS, GridInfo, grid_preview
from vitcop_server import routes
from vitcop_server.default_ratio import DefaultRatio
from vitcop_server.explain import explain_image
from vitcop_server.preview import USUAL_SIDE
from vitcop_server.settings import ServerSettings
from vitcop_server.usage import counts_by_modality, image_identifiers
from vitcop_vllm.pruning.amount import FixedRatio
from vitcop_vllm.pruning.identity import explained_identifier, tag_identifier
from vitcop_vllm.pruning.plan import VisualTokenCounts
from vitcop_vllm.pruning.settings import PruningSettings


@pytest.fixture
def client() -> TestClient:
    app = FastAPI()
    app.include_router(routes.router)
    app.state.pruning_server_settings = ServerSettings()
    app.state.pruning_preview = grid_preview()
    app.state.pruning_default_ratio = DefaultRatio(PruningSettings())
    return TestClient(app)


@pytest.mark.parametrize(
    ("width", "height", "rows", "columns"),
    [
        (640, 480, 18, 23),
        (480, 640, 23, 18),
        (1344, 140, 5, 48),
        (1, 1, 1, 1),
        (3584, 3584, 128, 128),
    ],
)
@pytest.mark.parametrize("ratio", [0, 0.3, 0.889])
def test_a_plan_has_the_grid_of_its_image_size(
    client: TestClient, width: int, height: int, rows: int, columns: int, ratio: float
) -> None:
    params = {"width": width, "height": height, "ratio": ratio}
    plan = client.get("/v1/pruning/plan", params=params).json()
    assert (plan["width"], plan["height"]) == (width, height)
    assert plan["grids"] == [{"rows": rows, "columns": columns, "row_marks": False}]
    assert plan["box"] == [0, 0, width, height]
    assert plan["encoder_tokens"] == rows * columns
    counts = GridInfo().counts(rows * columns, FixedRatio(ratio))
    assert tuple(stage["tokens"] for stage in plan["stages"]) == counts.stages
    usage = grid_preview().model.usage_fields([counts])
    assert plan["effective_ratio"] == usage["pruning_ratio"]
    assert plan["kv_bytes"]["unpruned"] == rows * columns * NUM_LAYERS * 100
    saved = plan["kv_bytes"]["saved"] / plan["kv_bytes"]["unpruned"]
    assert saved == pytest.approx(plan["effective_ratio"])


def test_a_plan_of_tiles_has_a_grid_for_the_whole_image_too(client: TestClient) -> None:
    client.app.state.pruning_preview.info.tiled = True  # type: ignore[attr-defined]
    plan = client.get("/v1/pruning/plan", params={"width": 140, "height": 84}).json()
    assert plan["grids"] == [
        {"rows": 3, "columns": 3, "row_marks": False},
        {"rows": 3, "columns": 5, "row_marks": True},
    ]
    assert plan["encoder_tokens"] == 3 * 3 + 3 * (5 + 1)


def test_a_plan_without_a_size_is_for_the_usual_size(client: TestClient) -> None:
    plan = client.get("/v1/pruning/plan").json()
    assert (plan["width"], plan["height"]) == (USUAL_SIDE, USUAL_SIDE)
    assert plan["grids"] == [{"rows": 36, "columns": 36, "row_marks": False}]


def test_an_unsupported_size_is_a_400(client: TestClient) -> None:
    answer = client.get("/v1/pruning/plan", params={"width": 201, "height": 1})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == "width"
    assert "201 x 1" in error["message"]
    assert "smaller than 200" in error["message"]


@pytest.mark.parametrize(
    ("selector", "has_cls", "source"),
    [
        ("vitcop", True, "cls"),
        ("vitcop", False, "received"),
        ("cls", True, "cls"),
        ("received", True, "received"),
        ("grid", True, None),
        ("fastv", False, None),
    ],
)
def test_a_plan_names_the_saliency_of_stage_i(
    selector: Any, has_cls: bool, source: str | None
) -> None:
    preview = grid_preview(selector=selector)
    preview.info.reads_cls = has_cls
    assert preview.plan_fields(280, 140, FixedRatio(0.3))["saliency_source"] == source


def kept(stage: dict[str, Any], total: int) -> list[int]:
    bits = np.unpackbits(np.frombuffer(base64.b64decode(stage["kept"]), dtype=np.uint8))
    assert len(bits) == 8 * math.ceil(total / 8)
    assert not bits[total:].any()
    return [int(i) for i in np.flatnonzero(bits)]


def test_an_explanation_numbers_cells_row_by_row() -> None:
    """3 rows of 5: V is not a multiple of 8 bits."""
    counts = VisualTokenCounts(15, 2, (6, 3, 2))
    name = explained_identifier("request", 0, (140, 84), tag_identifier("abc", counts))
    record = {
        "patches": [0, 4, 5, 9, 12, 14],
        "labels": [0, 0, 1, 1, 0, 1],
        "saliency": [i / 15 for i in range(15)],
        "shallow": [0, 3, 5],
        "merged": [[0, 1], [3, 2]],
        "deep": [1, 2],
    }
    explanation = explain_image(grid_preview(), name, {name: record})
    assert explanation["grids"] == [{"rows": 3, "columns": 5, "row_marks": False}]
    assert explanation["saliency_source"] == "received"
    assert [kept(stage, 15) for stage in explanation["stages"]] == [
        [0, 4, 5, 9, 12, 14],
        [0, 9, 14],
        [9, 14],
    ]
    merged = [stage["merged"] for stage in explanation["stages"]]
    assert merged == [[], [[0, 4], [9, 5]], [[9, 5]]]
    assert explanation["clusters"] == [0, -1, -1, -1, 0, 1, -1, -1, -1, 1, -1, -1, 0, -1, 1]


def test_usage_sums_images_of_different_sizes() -> None:
    many, few = VisualTokenCounts(2304, 82, (691, 309, 62)), VisualTokenCounts.unpruned(4)
    inputs = [{"mm_hashes": {"image": [tag_identifier("a", many), tag_identifier("b", few)]}}]
    counts = counts_by_modality(image_identifiers(inputs))["image"]
    usage = grid_preview().model.usage_fields(counts)
    assert usage["visual_tokens"] == {"encoder": 2308, "stages": [695, 313, 66]}
    boundaries = PruningSettings().boundaries(NUM_LAYERS)
    kept_on_average = sum(image.layer_average(boundaries, NUM_LAYERS) for image in counts)
    assert usage["pruning_ratio"] == pytest.approx(1 - kept_on_average / 2308)
