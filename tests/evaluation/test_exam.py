"""Reading and writing exams."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from demo import questions
from evaluation import exam
from evaluation.exam import Example, Turn, read_exam, write_exam
from vitcop_server.calibrate.folder import METADATA, FolderError, data_url


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.new("RGB", (3, 2), "red").save(tmp_path / "a.png")
    Image.new("RGB", (3, 2), "blue").save(tmp_path / "b.jpg")
    return tmp_path


def write(folder: Path, *lines: Any) -> None:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / METADATA).write_text("\n".join(texts) + "\n", encoding="utf-8")


TURN = {"question": "Q", "answers": ["A"]}
GOOD = {"images_file_names": ["a.png"], "family": "f", "turns": [TURN]}


def test_conversations_with_several_images_are_read(folder):
    turns = [TURN, {"question": "Q2", "answers": ["A2", "a2"]}]
    write(folder, GOOD, {**GOOD, "images_file_names": ["a.png", "b.jpg"], "turns": turns})
    a, b = folder / "a.png", folder / "b.jpg"
    turn = Turn(question="Q", answers=("A",))
    assert read_exam(folder) == [
        Example(images=(a,), family="f", turns=(turn,)),
        Example(images=(a, b), family="f", turns=(turn, Turn(question="Q2", answers=("A2", "a2")))),
    ]


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("{", "Invalid JSON"),
        ("[1]", "should be an object"),
        ({**GOOD, "anwser": "A"}, r"anwser\s+Extra inputs"),
        ({"family": "f", "turns": [TURN]}, r"images_file_names\s+Field required"),
        ({**GOOD, "images_file_names": ["c.png"]}, r"No such file.*c\.png"),
        ({**GOOD, "images_file_names": [METADATA]}, "cannot identify image file"),
        ({**GOOD, "images_file_names": []}, "at least 1 item"),
        ({**GOOD, "images_file_names": "a.png"}, "valid array"),
        ({**GOOD, "family": 1}, "family"),
        ({**GOOD, "turns": []}, "at least 1 item"),
        ({**GOOD, "turns": [{**TURN, "question": ""}]}, "turns.0.question"),
        ({**GOOD, "turns": [{"question": "Q"}]}, r"turns.0.answers\s+Field required"),
        ({**GOOD, "turns": [{**TURN, "answers": []}]}, "at least 1 item"),
    ],
)
def test_a_fault_names_its_line(folder, line, fault):
    write(folder, GOOD, line)
    with pytest.raises(FolderError, match=rf"(?s)^\S*{re.escape(METADATA)}:2: .*{fault}"):
        read_exam(folder)


def test_a_missing_or_empty_exam_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_exam(tmp_path)
    (tmp_path / METADATA).touch()
    with pytest.raises(FolderError, match="empty"):
        read_exam(tmp_path)


def test_a_written_exam_reads_back_unchanged(tmp_path):
    image = Image.radial_gradient("L").convert("RGB")
    turns = (questions.Turn("Q", "A"), questions.Turn("Q2", "A2"))
    write_exam(tmp_path / "new", [questions.Example("f", (image, image), turns)])
    [example] = read_exam(tmp_path / "new")
    assert example.family == "f"
    assert [(turn.question, turn.answers) for turn in example.turns] == [
        ("Q", ("A",)),
        ("Q2", ("A2",)),
    ]
    assert [Image.open(path).tobytes() for path in example.images] == [image.tobytes()] * 2
    with pytest.raises(FolderError, match="not empty"):
        write_exam(tmp_path / "new", [])


def test_the_program_writes_the_demo_exam(tmp_path, monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["exam", str(tmp_path / "exam"), "--per-family", "1", "--seed", "3"]
    )
    exam.main()
    written = [(e.family, e.turns[0].question) for e in read_exam(tmp_path / "exam")]
    assert written == [(e.family, e.turns[0].question) for e in questions.exam(1, 3)]


def test_data_urls_hold_the_image_s_media_type(folder):
    assert data_url(folder / "a.png").startswith("data:image/png;base64,iVBOR")
    assert data_url(folder / "b.jpg").startswith("data:image/jpeg;base64,/9j/")
