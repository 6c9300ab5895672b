"""The training program, with a tiny model and short phases."""

import json
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.qwen_checkpoint import QwenShape
from demo.batch import BatchShape
from demo.form import Form
from demo.llava_form import LlavaForm
from demo.optimiser import orthogonal
from demo.phases import Phase
from demo.questions import FAMILIES
from demo.qwen_form import QwenForm
from demo.train import Run, main
from vitcop_vllm.demo.checkpoint import LlavaShape

FORMS: dict[str, Form] = {
    "llava": LlavaForm(
        LlavaShape(
            image_size=168,
            vision_hidden=32,
            vision_layers=2,
            vision_heads=1,
            hidden=32,
            layers=3,  # one per stage
            heads=2,
            kv_heads=2,
            intermediate=64,
        )
    ),
    "qwen": QwenForm(
        QwenShape(
            max_visual_tokens=64,
            vision_hidden=32,
            vision_layers=2,
            vision_heads=1,
            vision_intermediate=64,
            window=2,
            full_attention=(1,),
            hidden=32,
            layers=3,
            heads=2,
            kv_heads=2,
            intermediate=64,
        ),
        warm_start=None,
    ),
}
PHASES = (
    Phase("patches", 3, BatchShape(112, 4), (1.0, 1.0), (1.0, 1.0)),
    Phase("answers", 4, BatchShape(168, 4, 100, (0.0, 0.5), 0.5), (1.0, 0.1), (0.5, 0.1)),
)


def weights(run: Run) -> dict[str, torch.Tensor]:
    """The float32 masters; the first steps are too small to change bfloat16 weights."""
    names = [name for name, _ in run.model.named_parameters()]
    return {
        name: weight.detach().clone()
        for name, weight in zip(names, run.optimiser.masters, strict=False)
    }


@pytest.fixture(scope="module", params=FORMS)
def form(request):
    return FORMS[request.param]


@pytest.fixture(scope="module")
def whole(form, tmp_path_factory):
    run = Run(tmp_path_factory.mktemp("whole"), form=form)
    run.train(PHASES, workers=0, save_every=1e9)
    return run


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(form, whole, tmp_path: Path):
    class StoppedError(Exception):
        pass

    run = Run(tmp_path, form=form)
    step = run.optimiser.step

    def stop_in_second_phase(share: float, tower_share: float) -> None:
        if (run.phase, run.step) == (1, 2):
            raise StoppedError
        step(share, tower_share)

    run.optimiser.step = stop_in_second_phase  # type: ignore[method-assign]
    with pytest.raises(StoppedError):
        run.train(PHASES, workers=0, save_every=0.0)  # saves after every step

    again = Run(tmp_path, form=form)
    again.load()
    assert (again.phase, again.step) == (1, 2)
    again.train(PHASES, workers=1, save_every=1e9)
    expected = weights(whole)
    for name, weight in weights(again).items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=0, msg=name)


def test_a_run_begins_with_the_weights_of_a_trained_model(form, whole, tmp_path: Path):
    trained = whole.folder / "model"
    run = Run(tmp_path, form=form, begin=trained)
    expected = whole.model.state_dict()
    for name, weight in run.model.state_dict().items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=0, msg=name)


def test_the_first_phase_is_one_of_the_form_s(capsys, monkeypatch, tmp_path: Path):
    arguments = ["--form", "qwen", "--out", str(tmp_path / "run"), "--first-phase", "end"]
    monkeypatch.setattr("sys.argv", ["demo.train", *arguments])
    with pytest.raises(SystemExit):
        main()
    assert "--first-phase is none of: patches, " in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_training_changes_every_weight_that_answers_depend_on(form, whole, tmp_path: Path):
    fresh = weights(Run(tmp_path, form=form))
    same = [name for name, weight in weights(whole).items() if torch.equal(weight, fresh[name])]
    # LLaVA reads the layer before the last and does not use [CLS]'s final norm.
    assert same == [name for name in same if "post_layernorm" in name]


def test_the_log_holds_losses_and_accuracy_by_family(form, tmp_path: Path):
    run = Run(tmp_path, form=form)
    run.train(
        (Phase("answers", 20, BatchShape(112, 2, 100), (1.0, 1.0), (1.0, 1.0)),),
        workers=0,
        save_every=1e9,
    )
    (record,) = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    assert record["phase"] == "answers"
    assert record["step"] == 20
    assert record["answer"] > 0
    families = [family for family in FAMILIES if family in record]
    assert {"colour", "text", "count"} <= set(families)
    assert all(0 <= record[family] <= 1 for family in families)


@pytest.mark.parametrize("shape", [(24, 64), (64, 24)])
def test_muon_in_float32_is_torchs_to_the_precision_of_bfloat16(shape):
    from torch.optim._muon import _zeropower_via_newtonschulz

    grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    arguments: tuple[Any, ...] = ((3.4445, -4.7750, 2.0315), 5, 1e-7)
    ours = orthogonal(grad, *arguments)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(
        ours, _zeropower_via_newtonschulz(grad, *arguments).float(), rtol=0, atol=0.03
    )


def test_training_in_float32_goes_the_way_of_bfloat16(form, whole, tmp_path: Path, monkeypatch):
    calls = Mock(side_effect=orthogonal)
    monkeypatch.setattr("demo.optimiser.orthogonal", calls)
    run = Run(tmp_path, form=form, dtype=torch.float32)
    begin = weights(run)
    run.train(PHASES, workers=0, save_every=1e9)
    assert calls.called  # torch's own function computes in bfloat16
    ours, expected = (
        torch.cat([(end[name] - begin[name]).flatten() for name in begin])
        for end in (weights(run), weights(whole))
    )
    # Muon scales small gradients up, and with them what a type rounds.
    assert torch.cosine_similarity(ours, expected, dim=0) > 0.6
    saved = load_file(tmp_path / "model" / "model.safetensors")
    assert {weight.dtype for weight in saved.values()} == {torch.bfloat16}
