"""Functions of ``vitcop_demo.yaml``, in a file with the name that lmms-eval's tasks give it."""

from collections.abc import Mapping, Sequence
from typing import Any

from evaluation.scoring import exact

Doc = Mapping[str, Any]
"""A conversation of the exam: ``images``, ``family`` and ``turns``."""


def single_turns(docs: Any) -> Any:
    """Conversations of one turn: lmms-eval's OpenAI clients have no second one."""
    return docs.filter(lambda turns: len(turns) == 1, input_columns="turns")


def doc_to_visual(doc: Doc) -> list[Any]:
    return [image.convert("RGB") for image in doc["images"]]


def doc_to_text(doc: Doc) -> str:
    return str(doc["turns"][0]["question"])


def doc_to_target(doc: Doc) -> str:
    return str(doc["turns"][0]["answers"][0])


def process_results(doc: Doc, results: Sequence[str]) -> dict[str, float]:
    """Score of the answer, 0 or 1: of the whole exam, and of the family of questions."""
    score = float(exact(results[0], doc["turns"][0]["answers"]))
    return {"score": score, doc["family"]: score}
