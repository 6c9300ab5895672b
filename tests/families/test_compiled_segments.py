"""Compiled segments give the same answers as uncompiled ones.

The tests use the real Dynamo and vLLM's dispatch. The ``eager`` backend skips the generation of
C++ code, which would take minutes.
"""

from functools import cache

import pytest
from vllm import LLM
from vllm.config import CompilationMode

from tests.engine.requests import ENGINE_OPTIONS, RequestSpec, generate
from tests.engine.scheduling import engine_core
from tests.families.family import Family

pytestmark = pytest.mark.slow

REQUESTS = [
    RequestSpec("two of three Stages", (1,), 8 / 9),
    RequestSpec("first or second?", (2, 3), 2 / 3, max_tokens=12),
    RequestSpec("nothing dropped after the encoder", (4,), 0.3),
    RequestSpec("unpruned", (5,), 0.0),
    RequestSpec("no image, " * 20),
]

VIDEOS = [
    RequestSpec("two of three Stages", videos=(1,), ratio=8 / 9),
    RequestSpec("in chunks", (2,), 0.5, videos=(4, 2), order="viv"),
]


@pytest.fixture(scope="session")
def compiled_of(checkpoint_of):
    """Family -> its engine with compiled segments.

    Engines live until the session ends: deleting one destroys the process groups of all engines.
    """

    @cache
    def compiled_of(family: Family) -> LLM:
        options = {
            **ENGINE_OPTIONS,
            "enforce_eager": False,
            "compilation_config": {"mode": CompilationMode.DYNAMO_TRACE_ONCE, "backend": "eager"},
        }
        return LLM(str(checkpoint_of(family)), **options)

    return compiled_of


@pytest.fixture
def compiled(family, compiled_of):
    return compiled_of(family)


def test_compiled_segments_give_the_answers_of_uncompiled_ones(family, llm, compiled):
    specs = [*REQUESTS, *(VIDEOS if family.frames else ())]
    for answer, expected in zip(generate(compiled, specs), generate(llm, specs), strict=True):
        assert answer.tokens == expected.tokens
        assert answer.logprobs == [pytest.approx(step, abs=1e-4) for step in expected.logprobs]


def test_every_stage_is_compiled_at_start(llm, compiled):
    def segments(engine):
        worker = engine_core(engine).model_executor.driver_worker.worker
        return worker.model_runner.get_model().staged_decoder._segments

    assert [segment.do_not_compile for segment in segments(llm)] == [True] * 3
    assert [segment.do_not_compile for segment in segments(compiled)] == [False] * 3
    assert [segment.compiled for segment in segments(compiled)] == [True] * 3
