"""Functions of ``vitcop_demo.yaml``; lmms-eval's tasks call this file ``utils``."""

from collections.abc import Mapping, Sequence
from typing import Any

from evaluation.scoring import exact

Doc = Mapping[str, Any]
"""A conversation of the exam: ``images``, ``family`` and ``turns``."""


def single_turns(docs: Any) -> Any:
    """Conversations of one turn: lmms-eval's OpenAI clients support no second turn."""
    return docs.filter(lambda turns: len(turns) == 1, input_columns="turns")


def doc_to_visual(doc: Doc) -> list[Any]:
    return [image.convert("RGB") for image in doc["images"]]


def doc_to_text(doc: Doc) -> str:
    return str(doc["turns"][0]["question"])


def doc_to_target(doc: Doc) -> str:
    return str(doc["turns"][0]["answers"][0])


def process_results(doc: Doc, results: Sequence[str]) -> dict[str, float]:
    """The answer's score, 0 or 1, as the metric of the exam and of its family."""
    score = float(exact(results[0], doc["turns"][0]["answers"]))
    return {"score": score, doc["family"]: score}
