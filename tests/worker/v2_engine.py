"""A program that runs an engine with model runner V2 and the Triton kernels, on a CPU.

Arguments: the checkpoint's folder, and a file to which it writes :class:`Results` as JSON. vLLM
supports this runner on CPUs for which Triton can compile. On other CPUs Triton's interpreter runs
the same kernels; vLLM checks that a Triton backend exists, so :func:`main` registers an empty one.
"""

import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.engine.comparing import comparing_frames
from tests.engine.requests import (
    ENGINE_OPTIONS,
    VIDEO_MARKS,
    RequestSpec,
    generate,
    generate_in_turn,
    model_type,
)

REQUESTS = [
    RequestSpec("short", (1,), 8 / 9, max_tokens=3),
    RequestSpec("a somewhat longer question about it " * 3, (1,), 2 / 3, max_tokens=5),
    RequestSpec("first or second?", (2, 3), 7 / 9, max_tokens=6),
    RequestSpec("unpruned", (4,), 0.0, max_tokens=4),
    RequestSpec("no image, " * 40, max_tokens=7),
]

TURNS = [
    RequestSpec("What is it?", (5, 6), 8 / 9, max_tokens=2),
    RequestSpec("And how many are there?", (5, 6), 8 / 9, max_tokens=3),
]

VIDEOS = [
    RequestSpec("short", ratio=8 / 9, videos=(1,), max_tokens=3),
    RequestSpec("in chunks", (2,), 0.5, max_tokens=4, videos=(4, 2), order="viv"),
]
"""For models that take videos."""

EXPLAINED = RequestSpec("What is this?", (7,), 2 / 3, max_tokens=2)


@dataclass
class Results:
    """An engine's answers, for each feature that the model runners implement separately.

    Attributes:
        together: Tokens of ``REQUESTS``, in one batch.
        preempted: The same, with all requests preempted after some steps.
        from_graphs: The same, with decode steps run from graphs.
        graphs: Sizes of the graphs that ran.
        turns: Tokens of ``TURNS``, one after the other.
        reused: Prompt tokens of each turn that came from the prefix cache.
        explained: Recorded selections of the image of ``EXPLAINED``.
        videos: Tokens of ``VIDEOS``; empty if the model takes no videos.
        compared: The same with ``compare_frames``.
    """

    together: list[list[int]]
    preempted: list[list[int]]
    from_graphs: list[list[int]]
    graphs: list[int]
    turns: list[list[int]]
    reused: list[int]
    explained: dict[str, Any]
    videos: list[list[int]]
    compared: list[list[int]]


def tokens(answers: list[Any]) -> list[list[int]]:
    return [answer.tokens for answer in answers]


def preempted(llm: Any, after: int) -> list[list[int]]:
    """Answers to ``REQUESTS`` if all requests lose their blocks after that many steps."""
    engine = llm.llm_engine
    for number, spec in enumerate(REQUESTS):
        engine.add_request(str(number), spec.prompt(model_type(llm)), spec.sampling_params())
    answers = {}
    steps = 0
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                answers[output.request_id] = list(output.outputs[0].token_ids)
        steps += 1
        if steps == after:
            assert engine.reset_prefix_cache(reset_running_requests=True)
    return [answers[str(number)] for number in range(len(REQUESTS))]


def explained(llm: Any) -> dict[str, Any]:
    prompt = EXPLAINED.prompt(model_type(llm))
    prompt["mm_processor_kwargs"]["explain_as"] = "one"
    (image,) = answered_images(llm, prompt)
    (records,) = llm.collective_rpc("take_selections", args=([image],))
    return dict(records[image])


def answered_images(llm: Any, prompt: dict[str, Any]) -> list[str]:
    """Answer a prompt. Returns the identifiers of its images."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    names: list[str] = []
    with pytest.MonkeyPatch.context() as monkeypatch:
        add_request = scheduler.add_request

        def recording(request: Any) -> None:
            names.extend(feature.identifier for feature in request.mm_features)
            add_request(request)

        monkeypatch.setattr(scheduler, "add_request", recording)
        llm.generate([prompt], [EXPLAINED.sampling_params()], use_tqdm=False)
    return names


def collect_results(llm: Any) -> Results:
    """All results of an engine, with either runner."""
    turns = generate_in_turn(llm, TURNS)
    videos: list[list[list[int]]] = [[], []]
    if model_type(llm) in VIDEO_MARKS:
        for compares in (False, True):
            with comparing_frames(llm, compares):
                videos[compares] = tokens(generate(llm, VIDEOS))
    results = Results(
        together=tokens(generate(llm, REQUESTS)),
        preempted=preempted(llm, after=5),
        from_graphs=[],
        graphs=[],
        turns=tokens(turns),
        reused=[turn.reused for turn in turns],
        explained=explained(llm),
        videos=videos[False],
        compared=videos[True],
    )
    from tests.worker.graphs import capture_decode_graphs

    with pytest.MonkeyPatch.context() as monkeypatch:
        results.graphs = capture_decode_graphs(llm, monkeypatch)
        results.from_graphs = tokens(generate(llm, REQUESTS))
    return results


def encode_for_a_removed_request(llm: Any) -> None:
    """A request preempted in the step that encodes its images still gets them encoded.

    V2 removes the request before it runs the encoder, but the scheduler expects its images to be
    encoded.
    """
    from tests.engine.scheduling import add_request, new_scheduler

    state = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model_state
    scheduler = new_scheduler(llm, llm.llm_engine.vllm_config)
    add_request(llm, scheduler, "gone", RequestSpec("Q", (41, 42), 8 / 9))
    features = scheduler.requests["gone"].mm_features
    cache = state.encoder_cache
    cache.add_request("gone", features)
    state.remove_request("gone")
    cache.remove_request("gone")
    state.execute_mm_encoder({"gone": [1]})
    assert [feature.identifier in cache.encoder_outputs for feature in features] == [False, True]
    assert "gone" not in cache.mm_features


def patch_language_once() -> None:
    """Triton's interpreter replaces the language's functions at each call, also of helpers."""
    import triton.language as tl
    from triton.runtime import interpreter

    both = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    interpreter._patch_lang(both)
    unpatched = SimpleNamespace(restore=lambda: None)
    interpreter._patch_lang = lambda function: unpatched


def main(checkpoint: str, path: str) -> None:
    os.environ |= {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}
    from triton.backends import Backend, backends
    from triton.backends.compiler import BaseBackend
    from triton.backends.driver import DriverBase

    backends["cpu"] = Backend(compiler=BaseBackend, driver=DriverBase)
    from transformers import AutoConfig
    from vllm import LLM
    from vllm.model_executor.models import qwen3_vl
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    from vitcop_vllm.pruning.kernels import TRITON

    patch_language_once()
    # V1 adds up the tower's positions without Triton, too. vLLM's kernel takes minutes here.
    qwen3_vl.HAS_TRITON = False
    takes_videos = (
        AutoConfig.from_pretrained(checkpoint, trust_remote_code=True).model_type in VIDEO_MARKS
    )
    settings = {"pruning": {"kernels": "triton", "compare_frames": takes_videos}}
    llm = LLM(checkpoint, **ENGINE_OPTIONS, additional_config=settings)
    runner: Any = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    assert isinstance(runner, GPUModelRunner)
    state = runner.model_state
    assert runner.model._segments_ran  # at start-up, which leaves nothing of it
    assert not state.step_adapter.planner._slots
    assert not state.encoder_cache.encoder_outputs
    assert runner.model.kernels is TRITON
    results = collect_results(llm)
    encode_for_a_removed_request(llm)
    Path(path).write_text(json.dumps(asdict(results)))


if __name__ == "__main__":
    main(*sys.argv[1:])
