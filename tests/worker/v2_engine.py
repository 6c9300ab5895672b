"""A program: an engine with vLLM's model runner V2 and our Triton kernels, on a CPU.

Reads a path to a checkpoint and one to write to; writes what :class:`Seen` describes. vLLM has
that runner for CPUs on which Triton can compile. Where it cannot, Triton's own interpreter runs
the same kernels; vLLM has only to believe that there is a backend.
"""

import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.engine.requests import ENGINE_OPTIONS, Ask, generate, generate_in_turn, model_type

ASKS = [
    Ask("short", (1,), 8 / 9, max_tokens=3),
    Ask("a somewhat longer question about it " * 3, (1,), 2 / 3, max_tokens=5),
    Ask("first or second?", (2, 3), 7 / 9, max_tokens=6),
    Ask("unpruned", (4,), 0.0, max_tokens=4),
    Ask("no image, " * 40, max_tokens=7),
]

TURNS = [
    Ask("What is it?", (5, 6), 8 / 9, max_tokens=2),
    Ask("And how many are there?", (5, 6), 8 / 9, max_tokens=3),
]

EXPLAINED = Ask("What is this?", (7,), 2 / 3, max_tokens=2)


@dataclass
class Seen:
    """What an engine answers, in ways that model runners have code of their own for.

    Attributes:
        together: Tokens of ``ASKS``, in one batch.
        preempted: The same, where all requests are preempted after some steps.
        from_graphs: The same, where decode steps are run from graphs.
        graphs: Sizes of the graphs that ran.
        turns: Tokens of ``TURNS``, one after the other.
        reused: Tokens that each of them had from the prefix cache.
        explained: What was chosen for the image of ``EXPLAINED``.
    """

    together: list[list[int]]
    preempted: list[list[int]]
    from_graphs: list[list[int]]
    graphs: list[int]
    turns: list[list[int]]
    reused: list[int]
    explained: dict[str, Any]


def tokens(answers: list[Any]) -> list[list[int]]:
    return [answer.tokens for answer in answers]


def preempted(llm: Any, after: int) -> list[list[int]]:
    """Answers to ``ASKS`` of requests that lose their blocks after that many steps."""
    engine = llm.llm_engine
    for number, ask in enumerate(ASKS):
        engine.add_request(str(number), ask.prompt(model_type(llm)), ask.params())
    answers = {}
    steps = 0
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                answers[output.request_id] = list(output.outputs[0].token_ids)
        steps += 1
        if steps == after:
            assert engine.reset_prefix_cache(reset_running_requests=True)
    return [answers[str(number)] for number in range(len(ASKS))]


def explained(llm: Any) -> dict[str, Any]:
    prompt = EXPLAINED.prompt(model_type(llm))
    prompt["mm_processor_kwargs"]["explain_as"] = "one"
    (feature,) = recorded_features(llm, prompt)
    (told,) = llm.collective_rpc("take_selections", args=([feature],))
    return dict(told[feature])


def recorded_features(llm: Any, prompt: dict[str, Any]) -> list[str]:
    """Names of the images of a prompt, after the engine has answered it."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    names: list[str] = []
    with pytest.MonkeyPatch.context() as monkeypatch:
        add_request = scheduler.add_request

        def recording(request: Any) -> None:
            names.extend(feature.identifier for feature in request.mm_features)
            add_request(request)

        monkeypatch.setattr(scheduler, "add_request", recording)
        llm.generate([prompt], [EXPLAINED.params()], use_tqdm=False)
    return names


def see(llm: Any) -> Seen:
    """Everything that is to be compared, of an engine with either runner."""
    turns = generate_in_turn(llm, TURNS)
    seen = Seen(
        together=tokens(generate(llm, ASKS)),
        preempted=preempted(llm, after=5),
        from_graphs=[],
        graphs=[],
        turns=tokens(turns),
        reused=[turn.reused for turn in turns],
        explained=explained(llm),
    )
    from tests.worker.graphs import capture_decode_graphs

    with pytest.MonkeyPatch.context() as monkeypatch:
        seen.graphs = capture_decode_graphs(llm, monkeypatch)
        seen.from_graphs = tokens(generate(llm, ASKS))
    return seen


def encode_for_a_request_that_left(llm: Any) -> None:
    """The scheduler counts on images of a request preempted in the step that encodes them.

    V2 has forgotten the request before it runs the encoder.
    """
    from tests.engine.scheduling import add_request, new_scheduler

    state = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model_state
    scheduler = new_scheduler(llm, llm.llm_engine.vllm_config)
    add_request(llm, scheduler, "gone", Ask("Q", (41, 42), 8 / 9))
    features = scheduler.requests["gone"].mm_features
    cache = state.encoder_cache
    cache.add_request("gone", features)
    state.remove_request("gone")
    cache.remove_request("gone")
    state.execute_mm_encoder({"gone": [1]})
    assert [feature.identifier in cache.encoder_outputs for feature in features] == [False, True]
    assert "gone" not in cache.mm_features


def main(checkpoint: str, path: str) -> None:
    os.environ |= {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}
    from triton.backends import Backend, backends
    from triton.backends.compiler import BaseBackend
    from triton.backends.driver import DriverBase

    backends["cpu"] = Backend(compiler=BaseBackend, driver=DriverBase)
    from vllm import LLM
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    from vitcop_vllm.pruning.kernels import TRITON

    settings = {"pruning": {"kernels": "triton"}}
    llm = LLM(checkpoint, **ENGINE_OPTIONS, additional_config=settings)
    runner: Any = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    assert isinstance(runner, GPUModelRunner)
    state = runner.model_state
    assert runner.model._stages_ran  # at start-up, which leaves nothing of it
    assert not state.step_adapter.planner._slots
    assert not state.encoder_cache.encoder_outputs
    assert runner.model.kernels is TRITON
    seen = see(llm)
    encode_for_a_request_that_left(llm)
    Path(path).write_text(json.dumps(asdict(seen)))


if __name__ == "__main__":
    main(*sys.argv[1:])
