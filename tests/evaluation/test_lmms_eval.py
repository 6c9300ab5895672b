"""The lmms-eval task's file and functions; lmms-eval itself is not installed here."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from demo.questions import EXAMINED
from evaluation.evaluate import parse_arguments
from evaluation.lmms_eval import utils

TASK = Path(utils.__file__).with_name("vitcop_demo.yaml")


class Loader(yaml.SafeLoader):
    """Reads ``!function utils.name`` as the function, like lmms-eval."""


def load_function(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> Any:
    module, name = node.value.split(".")
    assert module == "utils"
    return getattr(utils, name)


Loader.add_constructor("!function", load_function)


@pytest.fixture
def task() -> Any:
    return yaml.load(TASK.read_text(), Loader)


def doc(*turns: tuple[str, list[str]], images: int = 1) -> dict[str, Any]:
    return {
        "images": [Image.new("RGBA", (2, 2))] * images,
        "family": "two pictures",
        "turns": [{"question": question, "answers": answers} for question, answers in turns],
    }


def test_every_single_turn_family_is_a_metric(task):
    names = [row["metric"] for row in task["metric_list"]]
    assert names == ["score", *(family for family in EXAMINED if family != "dialogue")]


def test_it_asks_like_our_own_evaluation(task):
    assert task["generation_kwargs"] == {
        "max_new_tokens": parse_arguments([]).max_tokens,
        "temperature": 0,
    }
    example = doc(("Which picture shows a cross?", ["second", "2"]), images=2)
    assert task["doc_to_text"](example) == "Which picture shows a cross?"
    assert [image.mode for image in task["doc_to_visual"](example)] == ["RGB", "RGB"]
    assert task["doc_to_target"](example) == "second"


@pytest.mark.parametrize(("answer", "score"), [("Second.", 1), ("2", 1), ("first", 0)])
def test_answers_are_scored(task, answer, score):
    example = doc(("Which?", ["second", "2"]))
    assert task["process_results"](example, [answer]) == {"score": score, "two pictures": score}


def test_multi_turn_conversations_are_left_out(task):
    class Docs(list[dict[str, Any]]):
        def filter(self, keep, input_columns):
            return [item for item in self if keep(item[input_columns])]

    single, several = doc(("Q", ["A"])), doc(("Q", ["A"]), ("R", ["B"]))
    assert task["process_docs"](Docs([single, several])) == [single]
