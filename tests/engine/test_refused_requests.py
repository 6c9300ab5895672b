"""A request whose counts contradict its prompt fails; the engine and other requests go on."""

import logging
from dataclasses import replace

import pytest
from vllm.v1.engine import FinishReason
from vllm.v1.request import RequestStatus

from tests.engine.requests import RequestSpec, generate
from tests.engine.scheduling import (
    add_request,
    engine_core,
    new_request,
    new_scheduler,
    one_step,
    result_of,
)
from vitcop_vllm.engine.metrics import COUNTS_MISMATCHES
from vitcop_vllm.models.llava_processor import PrunedLlavaMultiModalProcessor
from vitcop_vllm.models.processing import MisprocessedImageError
from vitcop_vllm.pruning.identity import counts_of_identifier, tag_identifier

GOOD = RequestSpec("What is it?", (11,), 8 / 9)
BAD = RequestSpec("What is it?", (12,), 8 / 9)


def forge(identifier: str) -> str:
    """An identifier with valid counts that differ from the prompt's."""
    counts = counts_of_identifier(identifier)
    n1, n2, n3 = counts.stages
    return tag_identifier("f0", replace(counts, stages=(n1 - 1, min(n2, n1 - 1), n3)))


def mismatches(found_by: str) -> float:
    return COUNTS_MISMATCHES.labels(found_by)._value.get()


@pytest.fixture
def logged(caplog):
    """Captures our modules' logs; vLLM's parent logger does not propagate them."""
    names = ("engine.scheduler", "models.llava_processor")
    loggers = [logging.getLogger(f"vllm.vitcop_vllm.{name}") for name in names]
    for logger in loggers:
        logger.addHandler(caplog.handler)
    yield caplog
    for logger in loggers:
        logger.removeHandler(caplog.handler)


def test_wrong_counts_from_the_processor_raise(llm, monkeypatch, logged):
    """The error is raised in the client process, before the engine gets the request."""
    (expected,) = generate(llm, [GOOD])
    before = mismatches("processor")
    get_hashes = PrunedLlavaMultiModalProcessor._get_mm_hashes

    def forged(*args):
        return {"image": [forge(name) for name in get_hashes(*args)["image"]]}

    with monkeypatch.context() as patch:
        patch.setattr(PrunedLlavaMultiModalProcessor, "_get_mm_hashes", forged)
        with pytest.raises(MisprocessedImageError, match="placeholders in the prompt") as caught:
            llm.generate([BAD.prompt()], [BAD.sampling_params()], use_tqdm=False)
    assert caught.value.http_status == 503
    assert mismatches("processor") == before + 1
    assert "placeholders in the prompt" in logged.text
    assert not llm.llm_engine.has_unfinished_requests()
    assert generate(llm, [GOOD]) == [expected]


@pytest.mark.parametrize(
    "identifier", [None, "f00d@5.1.9.9.9"], ids=["contradictory", "impossible"]
)
def test_a_forged_request_in_the_engine_ends_with_an_error(llm, logged, identifier):
    """A running and a waiting request still get their answers."""
    engine, scheduler = llm.llm_engine, engine_core(llm).scheduler
    expected = generate(llm, [GOOD, replace(GOOD, text="And now?")])
    assert llm.reset_prefix_cache()
    before = mismatches("scheduler")

    def render(name, spec):
        (prompt,) = engine.renderer.render_cmpl([spec.prompt()])
        return engine.input_processor.process_inputs(
            name, prompt, spec.sampling_params(), supported_tasks=("generate",)
        )

    bad = render("bad", BAD)
    (feature,) = bad.mm_features
    feature.identifier = identifier or forge(feature.identifier)
    engine.add_request("running", render("running", GOOD), GOOD.sampling_params())
    assert not any(output.finished for output in engine.step())
    engine.add_request("bad", bad, BAD.sampling_params())
    engine.add_request(
        "waiting", render("waiting", replace(GOOD, text="And now?")), GOOD.sampling_params()
    )
    answers = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                answers[output.request_id] = output.outputs[0]
    assert answers["bad"].finish_reason == "error"
    assert not answers["bad"].token_ids
    good = [list(answers[name].token_ids) for name in ("running", "waiting")]
    assert good == [answer.tokens for answer in expected]
    assert mismatches("scheduler") == before + 1
    assert "Request bad" in logged.text
    assert not scheduler.requests
    assert not scheduler.plans
    assert llm.reset_prefix_cache()  # no block is held


def test_an_image_whose_identifier_has_no_counts_is_not_pruned(llm):
    """A prompt processed elsewhere has such identifiers."""
    engine = llm.llm_engine
    spec = RequestSpec("What is it?", (1301,), 0.0)
    (prompt,) = engine.renderer.render_cmpl([spec.prompt()])
    prompt["mm_hashes"]["image"] = ["who@knows"]
    engine.add_request("other", prompt, spec.sampling_params())
    while engine.has_unfinished_requests():
        outputs = engine.step()
    engine.reset_mm_cache()
    (expected,) = generate(llm, [spec])
    assert list(outputs[0].outputs[0].token_ids) == expected.tokens


def test_a_session_with_a_forged_turn_ends_with_an_error(llm):
    scheduler = new_scheduler(llm, llm.llm_engine.vllm_config)
    first = replace(GOOD, max_tokens=1)
    add_request(llm, scheduler, "talk", first, resumable=True)
    for _ in range(3):
        one_step(scheduler)
    session = scheduler.requests["talk"]
    assert session.status == RequestStatus.WAITING_FOR_STREAMING_REQ
    request = new_request(llm, "talk", BAD, resumable=True)
    request.mm_features[0].identifier = forge(request.mm_features[0].identifier)
    scheduler.add_request(request)
    scheduled = scheduler.schedule()
    assert not scheduled.num_scheduled_tokens
    (output,) = scheduler.update_from_output(scheduled, result_of(scheduler, scheduled))[0].outputs
    assert output.finish_reason == FinishReason.ERROR
    assert not scheduler.requests
    assert not scheduler.plans
