"""The demo models answer right, and as in stock vLLM and in transformers."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from demo.questions import Example, exam
from evaluation.client import converse, text_of
from evaluation.evaluate import evaluate, main, parse_arguments
from evaluation.exam import read_exam, write_exam
from evaluation.report import tables
from tests.server.process import LITTLE_MEMORY, TINY_OPTIONS, running_server
from vitcop_vllm.demo.checkpoint import DEMO_MODEL

EXAM_SEED = 7
CONFIGS = Path("configs")
QWEN = Path("demo/qwen")


@pytest.fixture(scope="module")
def accuracy(demo_url: str) -> dict[str, Any]:
    """Ratio -> per cent of right answers of the server that ``make serve`` starts."""
    options = ["--per-family", "15", "--seed", str(EXAM_SEED), "--ratios", "0", "2/3"]
    cells, failures = evaluate(parse_arguments(["--url", f"{demo_url}/v1", *options]))
    assert not failures
    [row] = tables(cells)["answers"]
    return row


@pytest.mark.slow
def test_the_unpruned_model_answers_95_percent_right(accuracy):
    assert accuracy["0"] >= 95


@pytest.mark.slow
def test_ratio_two_thirds_costs_at_most_three_points(accuracy):
    assert accuracy["2/3"] >= accuracy["0"] - 3


def ask(url: str, folder: Path) -> list[list[str]]:
    """Answers to each turn of an exam. Requests have no ratio, so that stock vLLM accepts them."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        model = client.models.list().data[0].id
        return [
            [text_of(answer) for answer in converse(client, model, 32, example)]
            for example in read_exam(folder)
        ]


def ask_transformers(folder: Path, examples: list[Example]) -> list[list[str]]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor: Any = AutoProcessor.from_pretrained(folder)
    model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    answers = []
    for example in examples:
        messages: list[dict[str, Any]] = []
        example_answers = []
        for turn in example.turns:
            images = [{"type": "image"}] * (0 if messages else len(example.images))
            text = {"type": "text", "text": turn.question}
            messages.append({"role": "user", "content": [*images, text]})
            prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
            inputs = processor(
                images=list(example.images),
                text=prompt,
                return_tensors="pt",
                add_special_tokens=False,
            )
            ids = model.eval().generate(**inputs, max_new_tokens=32, do_sample=False)
            answer = processor.decode(
                ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
            )
            messages.append({"role": "assistant", "content": answer})
            example_answers.append(answer)
        answers.append(example_answers)
    return answers


@pytest.mark.slow
def test_stock_vllm_and_transformers_give_the_same_answers(demo_url, tmp_path, capsys):
    examples = exam(2, EXAM_SEED)
    write_exam(tmp_path, examples)
    served = ask(demo_url, tmp_path)
    with running_server("--model", str(DEMO_MODEL), *TINY_OPTIONS, stock=True) as (url, _):
        stock = ask(url, tmp_path)
        assert main(["--url", f"{url}/v1", "--data", str(tmp_path)]) == 1
    assert "the server ignores X-Pruning-Ratio" in capsys.readouterr().err
    assert served == stock
    assert served == ask_transformers(DEMO_MODEL, examples)
    # If all answers were equal, the comparisons above would prove nothing.
    assert len({answer for answers in served for answer in answers}) > 10


@pytest.fixture(scope="module")
def qwen_url() -> Iterator[str]:
    with running_server("--config", str(CONFIGS / "demo-qwen-cpu.yaml"), *LITTLE_MEMORY) as (
        url,
        _,
    ):
        yield url


@pytest.mark.slow
def test_qwen_s_form_answers_as_in_transformers(qwen_url, tmp_path):
    examples = exam(2, EXAM_SEED, varied=True)
    write_exam(tmp_path, examples)
    served = ask(qwen_url, tmp_path)
    assert served == ask_transformers(QWEN, examples)
    assert len({answer for answers in served for answer in answers}) > 10


@pytest.mark.parametrize("folder", [DEMO_MODEL, QWEN])
def test_a_model_has_at_most_25_mb(folder):
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 25_000_000
