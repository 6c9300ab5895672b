"""The page's files and their HTTP headers."""

from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from tests.server.page.person import SAMPLES, VIDEO_SAMPLE
from vitcop_server.page import attach_page
from vitcop_server.settings import ServerSettings

FOLDER = Path(__file__).parents[3] / "server" / "vitcop_server" / "samples"


@pytest.mark.slow
def test_page_and_samples_have_strict_headers(url):
    with httpx.Client(base_url=url) as client:
        for path, kind in (
            ("/ui", "text/html; charset=utf-8"),
            ("/ui/samples/plum.png", "image/png"),
            ("/ui/samples/shapes.webm", "video/webm"),
        ):
            answer = client.get(path)
            assert (answer.status_code, answer.headers["content-type"]) == (200, kind)
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert answer.headers["referrer-policy"] == "no-referrer"
            policy = answer.headers["content-security-policy"]
            assert policy.startswith("default-src 'none'")
            assert "unsafe" not in policy
            again = client.get(path, headers={"If-None-Match": answer.headers["etag"]})
            assert (again.status_code, again.content) == (304, b"")
            assert client.get(path, headers={"If-None-Match": '"other"'}).status_code == 200


def test_samples_are_small():
    samples = [*FOLDER.iterdir()]
    assert {sample.name for sample in samples} == {*SAMPLES, VIDEO_SAMPLE}
    assert sum(sample.stat().st_size for sample in samples) < 200_000


@pytest.mark.parametrize(("page", "status"), [(True, 200), (False, 404)])
def test_an_operator_can_turn_the_page_off(page, status):
    app = FastAPI()
    app.state.pruning_server_settings = ServerSettings(page=page)
    attach_page(app)
    assert TestClient(app).get("/ui").status_code == status
