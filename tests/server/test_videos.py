"""Chat requests with videos, on a server of a family that takes them and on one that does not."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.families.family import QWEN2_5_VL, Family
from tests.server.clients import Server, assert_refused, kept_places, metrics
from tests.server.process import TINY_OPTIONS, running_server
from tests.server.sample_images import png_url
from tests.server.sample_videos import video_file, video_url

VIDEO = video_url(video_file(36, (160, 120)))
"""6 seconds. vLLM's loader reads 2 frames of each."""


@pytest.fixture(scope="module")
def qwen(checkpoint_of: Callable[[Family], Path]) -> Iterator[Server]:
    limits = ("--server", '{"explain": true, "max_video_frames": 500}')
    with running_server(str(checkpoint_of(QWEN2_5_VL)), *TINY_OPTIONS, *limits) as (url, _):
        yield Server(url, {})


def asked(text: str, *parts: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def video(url: object = VIDEO) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": url}}


def image(size: tuple[int, int]) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": png_url(1, size)}}


def test_a_video_is_pruned_and_usage_sums_its_frames(qwen: Server) -> None:
    usages = []
    for ratio in (0.0, 8 / 9):
        answer = qwen.chat(messages=asked("What moves?", video()), pruning_ratio=ratio)
        assert answer.status_code == 200, answer.text
        usages.append(answer.json()["usage"])
    whole, pruned = (usage["visual_tokens"] for usage in usages)
    num_frames, counts = 6, 4 * 6  # the encoder joins two frames that are read
    assert whole == {
        "encoder": num_frames * counts,
        "stages": [num_frames * counts] * 3,
        "frames": num_frames,
    }
    assert pruned["encoder"] == whole["encoder"]
    assert all(kept % num_frames == 0 for kept in pruned["stages"])
    assert pruned["stages"][0] == num_frames * int(0.3 * counts)
    assert usages[0]["prompt_tokens"] - usages[1]["prompt_tokens"] == (
        whole["stages"][0] - pruned["stages"][0]
    )
    assert usages[1]["pruning_ratio"] == pytest.approx(8 / 9, abs=0.05)


def test_metrics_count_frames(qwen: Server) -> None:
    before = metrics(qwen.http)
    messages = asked("What moves?", video(), image((112, 84)))
    usage = qwen.chat(messages=messages, pruning_ratio=8 / 9).json()["usage"]["visual_tokens"]
    after = metrics(qwen.http)

    def increase(name: str, labels: str) -> float:
        name = f"vitcop_{name}_total{{{labels}}}"
        return after[name] - before.get(name, 0)

    frames = 'modality="video"'
    assert increase("images", frames) == usage["frames"] == 6
    assert increase("images", 'modality="image"') == 1
    kept = [
        sum(
            increase("visual_tokens_kept", f'modality="{modality}",stage="I"')
            for modality in modalities
        )
        for modalities in (("image", "video"), ("video",))
    ]
    assert kept[0] == usage["stages"][0]
    dropped = increase("visual_tokens_dropped", f'{frames},stage="I"')
    assert kept[1] + dropped == 6 * 4 * 6


def test_a_second_question_reuses_the_video(qwen: Server) -> None:
    messages = asked("What moves in it?", video(VIDEO), image((112, 84)))
    first = qwen.chat(messages=messages, pruning_ratio=2 / 3).json()["usage"]
    messages = asked("And where does it go?", video(VIDEO), image((112, 84)))
    second = qwen.chat(messages=messages, pruning_ratio=2 / 3).json()["usage"]
    assert second["visual_tokens"] == first["visual_tokens"]
    assert first["visual_tokens"]["frames"] == 6
    reused = second["prompt_tokens_details"]["cached_tokens"]
    assert reused > first["visual_tokens"]["stages"][0]


@pytest.mark.parametrize(
    ("url", "words"),
    [
        (video_url(b""), "the video is empty"),
        (video_url(b"\0" * 5000), "the video cannot be read"),
        (video_url(video_file()[:200]), "the video cannot be read"),
        (png_url(1), "video"),
        (video_url(video_file(501, (32, 32))), "max_video_frames"),
        ("data:video/jpeg;base64,AAAA,AAAA", "image"),
        ("http://127.0.0.1:9/a.mp4", "not fetched"),
        (None, ""),
        (7, ""),
        ("", ""),
    ],
)
def test_a_hostile_video_is_refused_and_the_server_lives(
    qwen: Server, url: object, words: str
) -> None:
    with qwen.stays_usable():
        assert_refused(qwen.chat(messages=asked("What?", video(url))), 400, words)


def test_a_truncated_video_is_answered_or_refused(qwen: Server) -> None:
    """A container that is indexed at its begin can be read up to where it ends."""
    whole = video_file(24, (160, 120), kind="avi")
    for share in (0.1, 0.5, 0.9):
        with qwen.stays_usable():
            url = video_url(whole[: int(share * len(whole))], "video/avi")
            answer = qwen.chat(messages=asked("What?", video(url)), pruning_ratio=0.5)
            assert answer.status_code in (200, 400), answer.text


def test_clients_cannot_choose_how_frames_are_read(qwen: Server) -> None:
    options = {"media_io_kwargs": {"video": {"num_frames": 2}}}
    assert_refused(
        qwen.chat(messages=asked("What?", video()), **options), 400, "media_io_kwargs is not"
    )


def test_embeddings_of_a_video_are_refused(qwen: Server) -> None:
    part = {"type": "video_embeds", "video_embeds": "AAAA"}
    assert_refused(qwen.chat(messages=asked("What?", part)), 400, "video_embeds")


def explain(server: Server, *parts: dict[str, Any], ratio: float) -> httpx.Response:
    body = {"model": server.model, "messages": asked("What moves?", *parts), "max_tokens": 1}
    return server.http.post("/v1/pruning/explain", json={**body, "pruning_ratio": ratio})


def test_an_explanation_has_the_selections_of_each_frame(qwen: Server) -> None:
    """Of 36 frames in 6 seconds the loader reads 12, and the encoder joins two."""
    other = video(video_url(video_file(24, (160, 120))))
    parts = (video(), image((112, 84)), other)
    first, again = (explain(qwen, *parts, ratio=8 / 9).json() for _ in range(2))
    assert (first["images"], first["videos"]) == (again["images"], again["videos"])
    assert len(first["images"]) == 1
    shown, shorter = first["videos"]
    usage = first["completion"]["usage"]["visual_tokens"]
    kept = [[0, 0, 0] for _ in range(3)]
    for number, frames in enumerate(([*first["images"]], shown["frames"], shorter["frames"])):
        for frame in frames:
            for place, stage in enumerate(frame["stages"]):
                assert len(kept_places(stage, frame["encoder_tokens"])) == stage["tokens"]
                kept[number][place] += stage["tokens"]
            assert len(frame["saliency"]) == frame["encoder_tokens"]
    assert [sum(stage) for stage in zip(*kept, strict=True)] == usage["stages"]
    assert len(shown["frames"]) + len(shorter["frames"]) == usage["frames"]
    assert (shown["width"], shown["height"]) == (160, 120)
    query = {"width": "160", "height": "120", "frames": "12"}
    (plan_grid,) = qwen.http.get("/v1/pruning/plan", params=query).json()["grids"]
    assert plan_grid["rows"] * plan_grid["columns"] == 24
    assert [frame["grids"] for frame in shown["frames"]] == [[plan_grid]] * 6
    assert shown["frames"][0]["box"] == [0, 0, 160, 120]
    times = [time for frame in shown["frames"] for time in frame["times"]]
    assert times == [number / 2 for number in range(12)]
    # The square moves, so frames keep other places.
    places = {frame["stages"][0]["kept"] for frame in shown["frames"]}
    assert len(places) > 1


def test_an_unpruned_explanation_keeps_all(qwen: Server) -> None:
    (shown,) = explain(qwen, video(), ratio=0).json()["videos"]
    for frame in shown["frames"]:
        assert [len(kept_places(stage, 24)) for stage in frame["stages"]] == [24] * 3
        assert frame["saliency"] is None


def test_an_explanation_selects_what_an_answer_selects(qwen: Server) -> None:
    """The first token's log-probability is that of the same request without an explanation."""
    options = {
        "logprobs": True,
        "top_logprobs": 3,
        "pruning_ratio": 8 / 9,
        "max_tokens": 1,
        "temperature": 0,
    }
    messages = asked("What moves?", video())
    body = {"model": qwen.model, "messages": messages, **options}
    explained = qwen.http.post("/v1/pruning/explain", json=body).json()["completion"]
    plain = qwen.chat(messages=messages, **options).json()

    def likeliest(answer: dict[str, Any]) -> list[float]:
        (token,) = answer["choices"][0]["logprobs"]["content"]
        return [top["logprob"] for top in token["top_logprobs"]]

    assert likeliest(explained) == pytest.approx(likeliest(plain), abs=1e-4)


@pytest.mark.parametrize("ratio", [0.0, 2 / 3, 8 / 9])
def test_the_plan_of_a_video_is_what_a_request_keeps(qwen: Server, ratio: float) -> None:
    query = {"width": "160", "height": "120", "frames": "12", "ratio": f"{ratio:.6f}"}
    plan = qwen.http.get("/v1/pruning/plan", params=query).json()
    answer = qwen.chat(messages=asked("What moves?", video()), pruning_ratio=round(ratio, 6))
    usage = answer.json()["usage"]
    assert [stage["tokens"] for stage in plan["stages"]] == usage["visual_tokens"]["stages"]
    assert plan["encoder_tokens"] == usage["visual_tokens"]["encoder"]
    assert plan["frames"] == usage["visual_tokens"]["frames"]
    assert plan["effective_ratio"] == pytest.approx(usage["pruning_ratio"])
    assert qwen.http.get("/v1/pruning/config").json()["takes_videos"] is True


@pytest.mark.parametrize("frames", ["0", "-1", "many", "100000000"])
def test_a_plan_of_impossible_frames_is_refused(qwen: Server, frames: str) -> None:
    query = {"width": "160", "height": "120", "frames": frames}
    assert_refused(qwen.http.get("/v1/pruning/plan", params=query), 400, "frames")


def test_a_family_without_videos_refuses_them(server: Server) -> None:
    with server.stays_usable():
        answer = server.chat(messages=asked("What?", video()))
        assert_refused(answer, 400, "videos are not accepted")
