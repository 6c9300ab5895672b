"""Reading a folder of images."""

import json
from pathlib import Path

import pytest

from tests.server.calibrate.rule_server import save_image
from vitcop_server.calibrate.folder import FolderError, read_folder

QUESTIONS = {"read": "What text?", "count": "How many?"}


def test_sub_folders_are_kinds_and_each_image_gets_each_question(tmp_path: Path) -> None:
    for name in ("forms/a.png", "forms/2024/b.JPG", "photos/c.webp", ".trash/d.png"):
        save_image(tmp_path / name, 0.5)
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    found = read_folder(tmp_path, QUESTIONS)
    assert [(one.name, one.kind, one.use, one.questions) for one in found] == [
        (name, kind, use, (question,))
        for name, kind in (("b.JPG", "forms"), ("a.png", "forms"), ("c.webp", "photos"))
        for use, question in QUESTIONS.items()
    ]


def test_images_beside_each_other_are_of_the_folder_s_kind(tmp_path: Path) -> None:
    save_image(tmp_path / "scans" / "a.png", 0.5)
    (one,) = read_folder(tmp_path / "scans", {"read": "What text?"})
    assert one.kind == "scans"


def test_metadata_has_the_questions_with_or_without_answers(tmp_path: Path) -> None:
    for name in ("x/a.png", "x/b.png"):
        save_image(tmp_path / name, 0.5)
    lines = [
        {"images_file_names": ["x/a.png", "x/b.png"], "turns": [{"question": "Same?"}]},
        {
            "images_file_names": ["x/b.png"],
            "family": "dates",
            "turns": [{"question": "When?", "answers": ["1999"]}, {"question": "Where?"}],
        },
    ]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    two, dates = read_folder(tmp_path, QUESTIONS)
    assert (two.name, two.kind, two.use, len(set(two.hashes))) == (
        "a.png, b.png",
        "x",
        "question",
        1,
    )
    assert (dates.use, dates.questions) == ("dates", ("When?", "Where?"))


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, r"has no images \(looked for \.png"),
        ({"a.txt": "x"}, "has no images"),
        ({"a.png": "no image"}, "cannot identify image file .*a.png"),
        ({"metadata.jsonl": ""}, "metadata.jsonl is empty"),
        ({"metadata.jsonl": '{"turns": []}'}, "metadata.jsonl:1: "),
        (
            {"metadata.jsonl": '{"images_file_names": ["z.png"], "turns": [{"question": "Q"}]}'},
            "metadata.jsonl:1: .*z.png",
        ),
    ],
)
def test_faults_are_named(tmp_path: Path, files: dict[str, str], words: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(FolderError, match=words):
        read_folder(tmp_path, QUESTIONS)


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(FolderError, match="is no folder"):
        read_folder(tmp_path / "none", QUESTIONS)
