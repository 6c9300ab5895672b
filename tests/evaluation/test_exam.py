"""Question folders, and the generated exam, as examples."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from demo import questions
from evaluation.client import data_url
from evaluation.exam import ExamError, Example, Turn, digest, from_demo, read_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.new("RGB", (3, 2), "red").save(tmp_path / "a.png")
    Image.new("RGB", (3, 2), "blue").save(tmp_path / "b.jpg")
    return tmp_path


def write(folder: Path, *lines: Any, name: str = "exam.jsonl") -> None:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / name).write_text("\n".join(texts) + "\n", encoding="utf-8")


def test_all_forms_of_a_line(folder):
    write(
        folder,
        {"image": "a.png", "question": "Q1", "answer": "A1"},
        "",
        {"images": ["a.png", "b.jpg"], "question": "Q2", "answer": ["A2", "a2"], "family": "two"},
        name="b.jsonl",
    )
    turns = [{"question": "Q3", "answer": "A3"}, {"question": "Q4", "answer": ["A4"]}]
    write(folder, {"image": "b.jpg", "turns": turns}, name="a.jsonl")
    a, b = folder / "a.png", folder / "b.jpg"
    assert read_folder(folder) == [
        Example("a", (b,), (Turn("Q3", ("A3",)), Turn("Q4", ("A4",)))),
        Example("b", (a,), (Turn("Q1", ("A1",)),)),
        Example("two", (a, b), (Turn("Q2", ("A2", "a2")),)),
    ]


GOOD = {"image": "a.png", "question": "Q", "answer": "A"}


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("{", "not JSON: .* at column"),
        ("[1]", "must be a JSON object, not list"),
        ({**GOOD, "anwser": "A"}, "unknown key 'anwser'; known: answer, family"),
        ({**GOOD, "images": ["a.png"]}, "either 'image' or 'images'"),
        ({"question": "Q", "answer": "A"}, "either 'image' or 'images'"),
        ({**GOOD, "image": "c.png"}, r"no image .*c\.png"),
        ({**GOOD, "image": "exam.jsonl"}, "cannot be read as an image"),
        ({**GOOD, "image": ["a.png"]}, "'image' must be a text"),
        ({"images": [], "question": "Q", "answer": "A"}, "'images' must be a list"),
        ({"images": "a.png", "question": "Q", "answer": "A"}, "'images' must be a list"),
        ({**GOOD, "question": " "}, "'question' must be a text"),
        ({**GOOD, "question": 3}, "'question' must be a text"),
        ({"image": "a.png", "question": "Q"}, "'answer' must be a text"),
        ({**GOOD, "answer": 3}, "'answer' must be a text"),
        ({**GOOD, "answer": []}, "'answer' must be a text"),
        ({**GOOD, "answer": ["A", ""]}, "'answer' must be a text"),
        ({**GOOD, "family": 1}, "'family' must be a text"),
        ({**GOOD, "family": "mean"}, "cannot be called 'mean'"),
        ({**GOOD, "turns": []}, "either 'question' and 'answer' or 'turns'"),
        ({"image": "a.png", "turns": []}, "'turns' must be a list"),
        ({"image": "a.png", "answer": "A", "turns": [{}]}, "'answer' belongs into each"),
        ({"image": "a.png", "turns": ["Q"]}, "must be a JSON object, not str"),
        ({"image": "a.png", "turns": [{"question": "Q", "image": "a.png"}]}, "unknown key 'image'"),
        ({"image": "a.png", "turns": [{"question": "Q"}]}, "'answer' must be a text"),
    ],
)
def test_faults_are_told_with_their_line(folder, line, fault):
    write(folder, GOOD, line)
    with pytest.raises(ExamError, match=rf"^\S*exam\.jsonl:2: .*{fault}"):
        read_folder(folder)


def test_every_fault_is_told(folder):
    write(folder, "{", GOOD, {})
    write(folder, {"image": 3}, name="other.jsonl")
    (folder / "third.jsonl").write_bytes(b'{"image": "\xff"}\n')
    with pytest.raises(ExamError) as error:
        read_folder(folder)
    places = [line.split(": ")[0] for line in str(error.value).splitlines()]
    assert [Path(place).name for place in places] == [
        "exam.jsonl:1",
        "exam.jsonl:3",
        "other.jsonl:1",
        "third.jsonl:1",
    ]
    assert str(error.value).endswith("not UTF-8")


def test_nothing_to_read(tmp_path):
    with pytest.raises(ExamError, match=r"no \*\.jsonl"):
        read_folder(tmp_path)
    write(tmp_path, "")
    with pytest.raises(ExamError, match="empty"):
        read_folder(tmp_path)


def test_generated_exam_is_encoded_without_loss():
    image = Image.radial_gradient("L").convert("RGB")
    [example] = from_demo([questions.Example("f", (image,), (questions.Turn("Q", "A"),))])
    assert (example.family, example.turns) == ("f", (Turn("Q", ("A",)),))
    [encoded] = example.images
    assert isinstance(encoded, bytes)
    assert Image.open(io.BytesIO(encoded)).tobytes() == image.tobytes()


def test_data_urls_tell_the_kind_of_image(folder):
    assert data_url(b"\x00").startswith("data:image/png;base64,AA")
    assert data_url(folder / "b.jpg").startswith("data:image/jpeg;base64,/9j/")


def test_digest_sees_everything(folder):
    turn = Turn("Q", ("A",))
    exams = [
        [Example("f", (folder / "a.png",), (turn,))],
        [Example("g", (folder / "a.png",), (turn,))],
        [Example("f", (folder / "b.jpg",), (turn,))],
        [Example("f", (folder / "a.png",), (Turn("Q", ("B",)),))],
        [Example("f", (folder / "a.png",), (turn, turn))],
        [Example("f", (folder / "a.png",), (turn,))] * 2,
    ]
    assert len({digest(exam) for exam in exams}) == len(exams)
    # Where an image lies does not matter, what is in it does.
    assert digest(exams[0]) == digest([Example("f", ((folder / "a.png").read_bytes(),), (turn,))])
