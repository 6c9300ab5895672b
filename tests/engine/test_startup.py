"""Start-up settles the configuration, or refuses with a sentence."""

import json
import os
from types import SimpleNamespace

import pytest
from vllm import envs

from benchmarks.qwen3_checkpoint import save_random_qwen3
from tests.checkpoints import tiny
from tests.checkpoints.stage_one_checkpoints import save_random_qwen3_5
from tests.families.family import INTERNVL_CHAT
from vitcop_vllm.engine.checks import StartUp
from vitcop_vllm.engine.config import (
    SPAN_LIMIT_KEY,
    VLLM_HOOKS,
    PrunedModelConfig,
    logger,
    pruning_settings_of,
    span_limit_of,
)
from vitcop_vllm.pruning.settings import PruningSettings


def config_of(checkpoint, **options):
    from vllm.engine.arg_utils import EngineArgs
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    return EngineArgs(model=str(checkpoint), max_model_len=1024, **options).create_engine_config()


def test_selecting_the_architecture_is_enough(checkpoint):
    config = config_of(checkpoint)
    assert not config.scheduler_config.disable_chunked_mm_input
    assert config.cache_config.enable_prefix_caching
    assert config.cache_config.block_size == 32
    assert pruning_settings_of(config.model_config.hf_config).default_ratio == 0.0
    assert not config.use_v2_model_runner


@pytest.mark.parametrize(
    ("options", "limit"),
    [
        ({"max_num_batched_tokens": 300}, 300),
        ({"max_num_batched_tokens": 300, "max_num_scheduled_tokens": 64}, 64),
        ({"max_num_batched_tokens": 300, "long_prefill_token_threshold": 70}, 70),
    ],
)
def test_a_pruned_image_must_fit_into_the_request_s_part_of_a_step(checkpoint, options, limit):
    config = config_of(checkpoint, max_num_seqs=8, **options)
    assert span_limit_of(config.model_config.hf_config) == limit


def test_an_image_too_large_for_a_step_is_refused_if_pruned(llm, monkeypatch):
    from tests.engine.requests import RequestSpec, generate

    config = llm.llm_engine.model_config.hf_config
    monkeypatch.setattr(config, SPAN_LIMIT_KEY, 100)
    with pytest.raises(ValueError, match=r"holds 100 tokens, .* keeps 128 in Stage I"):
        generate(llm, [RequestSpec("Q", (1,), 2 / 3)])
    whole, small = generate(llm, [RequestSpec("Q", (1,), 0.0), RequestSpec("Q", (1,), 8 / 9)])
    assert whole.tokens
    assert small.tokens


def test_settings_come_from_additional_config(checkpoint):
    config = config_of(checkpoint, additional_config={"pruning": {"default_ratio": 0.5}})
    assert pruning_settings_of(config.model_config.hf_config).default_ratio == 0.5


def test_a_block_size_the_user_chose_is_kept(checkpoint):
    assert config_of(checkpoint, block_size=64).cache_config.block_size == 64


READING = {"additional_config": {"pruning": {"selector": "fastv", "max_pruning_ratio": 0.8}}}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"pipeline_parallel_size": 2}, "pipeline parallelism"),
        ({"enable_lora": True}, "--enable-lora"),
        ({"disable_hybrid_kv_cache_manager": True}, "--disable-hybrid-kv-cache-manager"),
        ({"enable_prompt_embeds": True}, "--enable-prompt-embeds"),
        ({"scheduler_cls": "some.Scheduler"}, "--scheduler-cls"),
        ({"worker_cls": "some.Worker"}, "--worker-cls"),
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
            "--speculative-config",
        ),
        (
            {
                "kv_transfer_config": {
                    "kv_connector": "ExampleConnector",
                    "kv_role": "kv_both",
                }
            },
            "--kv-transfer-config",
        ),
        ({"kv_events_config": {"enable_kv_cache_events": True}}, "--kv-events-config"),
        ({"kv_offloading_size": 1.0}, "--kv-offloading-size"),
        ({"kv_cache_dtype_skip_layers": ["0"]}, "--kv-cache-dtype-skip-layers"),
        ({"kv_cache_dtype": "int8_per_token_head"}, "set --kv-cache-dtype to auto or fp8"),
        ({"offload_group_size": 2}, "--offload-group-size"),
        ({"prefix_match_unit": 16}, "--prefix-match-unit"),
        ({"watermark_config": {"key": 1}}, "set VLLM_USE_V2_MODEL_RUNNER=1"),
        ({"compilation_config": {"mode": 1}}, "unset the compilation config's mode"),
        ({"mm_processor_kwargs": {"pruning_ratio": 0.5}}, "default_ratio"),
        ({"additional_config": {"pruning": {"shallow_boundary": 7}}}, "boundaries .* do not fit"),
        ({"additional_config": {"pruning": {"defualt_ratio": 0.5}}}, "default_ratio"),
        ({"additional_config": {"pruning": {"default_ratio": 1.0}}}, "default_ratio"),
        ({"additional_config": {"pruning": [1]}}, "mapping"),
        (
            {"additional_config": {"pruning": {"selector": "fast"}}},
            "selector: no selector is called 'fast'; choose cls, contrast, dart",
        ),
        (
            {"additional_config": {"pruning": {"selector": "cls", "encoder_signal": "cls"}}},
            "selector cls does not read encoder_signal; remove encoder_signal",
        ),
        ({"additional_config": {"pruning": {"kernels": "triton"}}}, "set kernels to auto or torch"),
        ({"additional_config": {"pruning": {"kernels": "cuda"}}}, "kernels: Input should be"),
        (
            {"additional_config": {"pruning": {"selector": "key_norm"}}},
            "selector key_norm keeps every visual token in the first 1 of 8 layers; "
            "set max_pruning_ratio to at most 0.875",
        ),
        (
            {
                "additional_config": {
                    "pruning": {"selector": "dart", "max_pruning_ratio": 0.7, "shallow_boundary": 3}
                }
            },
            "first 3 of 8 layers; set max_pruning_ratio to at most 0.625",
        ),
        (
            {**READING, "max_num_batched_tokens": 1000},
            r"raise --max-num-batched-tokens \(and --max-num-scheduled-tokens\) to 1024, or lower "
            "--max-model-len",
        ),
        (
            {**READING, "max_num_batched_tokens": 1024, "max_num_scheduled_tokens": 600},
            r"raise --max-num-batched-tokens \(and --max-num-scheduled-tokens\) to 1024, or lower "
            "--max-model-len",
        ),
        (
            {**READING, "max_num_batched_tokens": 1024, "long_prefill_token_threshold": 512},
            "unset --long-prefill-token-threshold",
        ),
        (
            {
                "additional_config": {
                    "pruning": {"selector": "cls", "max_pruning_ratio": 0.8}
                    | {"decoder_signal": "values"}
                }
            },
            "selector cls does not read decoder_signal; remove decoder_signal",
        ),
        (
            {"additional_config": {"pruning": {"compare_frames": True}}},
            "no video of this model can be compared; remove compare_frames",
        ),
        ({"hf_overrides": {"vision_feature_select_strategy": "full"}}, "select_strategy"),
        ({"hf_overrides": {"vision_feature_layer": [-2, -3]}}, "vision_feature_layer"),
    ],
)
def test_unsupported_options_are_refused_at_start_up(checkpoint, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        config_of(checkpoint, **options)


def test_offloaded_weights_are_reached_in_halves_of_layers_through_uva_alone(
    checkpoint, monkeypatch
):
    envs.disable_envs_cache()
    config_of(checkpoint, cpu_offload_gb=1)
    monkeypatch.setenv("VLLM_WEIGHT_OFFLOADING_DISABLE_UVA", "1")
    with pytest.raises(ValueError, match="unset VLLM_WEIGHT_OFFLOADING_DISABLE_UVA"):
        config_of(checkpoint, cpu_offload_gb=1)


def test_a_ratio_named_by_a_refusal_is_accepted_with_it(checkpoint):
    pruning = {"selector": "key_norm", "max_pruning_ratio": 0.875, "default_ratio": 0.875}
    config = config_of(checkpoint, additional_config={"pruning": pruning})
    assert pruning_settings_of(config.model_config.hf_config).selector == "key_norm"


def test_ratios_in_refusals_are_rounded_down():
    text = SimpleNamespace(num_hidden_layers=24)
    vllm_config = SimpleNamespace(model_config=SimpleNamespace(hf_text_config=text))
    settings = PruningSettings(selector="key_norm")
    start_up = StartUp(vllm_config, settings, True, ())
    assert start_up.boundaries[0] == 2
    assert start_up.max_ratio_down == 0.9166


@pytest.mark.parametrize("asked", [True, False, None])
def test_a_selector_that_reads_the_question_is_never_cached(checkpoint, asked, monkeypatch):
    """Nobody can tell here who asked for caching, so the log says it loudly; the server can."""
    warnings = []
    monkeypatch.setattr(logger, "warning", lambda text, *args: warnings.append(text % args))
    options = {**READING, "max_num_batched_tokens": 1024, "enable_prefix_caching": asked}
    config = config_of(checkpoint, **options)
    assert not config.cache_config.enable_prefix_caching
    said = [text for text in warnings if "selector fastv reads the question" in text]
    assert len(said) == (asked is not False)


def test_renumbered_positions_are_never_cached(checkpoint, monkeypatch):
    warnings = []
    monkeypatch.setattr(logger, "warning", lambda text, *args: warnings.append(text % args))
    config = config_of(checkpoint, additional_config={"pruning": {"positions": "reference"}})
    assert not config.cache_config.enable_prefix_caching
    assert any("positions: reference" in text for text in warnings)


@pytest.fixture
def v2(monkeypatch):
    """Model runner V2 asked for, where Triton compiles."""
    envs.disable_envs_cache()
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", "0")  # to be put back as it was
    monkeypatch.delenv("VLLM_USE_BREAKABLE_CUDAGRAPH")
    for module in ("vllm.config.vllm", "vllm.triton_utils"):
        monkeypatch.setattr(f"{module}.HAS_TRITON", True)


def test_model_runner_v2_is_used_on_request_only(checkpoint, v2, monkeypatch):
    assert config_of(checkpoint).use_v2_model_runner
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER")
    assert not config_of(checkpoint).use_v2_model_runner


def test_breakable_graphs_are_refused_with_model_runner_v2(checkpoint, v2, monkeypatch):
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    config_of(checkpoint)
    assert os.environ["VLLM_USE_BREAKABLE_CUDAGRAPH"] == "0"
    monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", "1")
    with pytest.raises(ValueError, match="unset VLLM_USE_BREAKABLE_CUDAGRAPH"):
        config_of(checkpoint)


def test_an_engine_started_earlier_in_this_process_has_settled_the_runner(
    checkpoint, v2, monkeypatch
):
    envs.enable_envs_cache()
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    with pytest.raises(ValueError, match="use model runner V1, and something in"):
        config_of(checkpoint)
    envs.disable_envs_cache()
    assert not config_of(checkpoint).use_v2_model_runner


def test_model_runner_v2_needs_triton(checkpoint, v2, monkeypatch):
    monkeypatch.setattr("vllm.triton_utils.HAS_TRITON", False)
    with pytest.raises(ValueError, match=r"V2 needs Triton.*unset VLLM_USE_V2_MODEL_RUNNER"):
        config_of(checkpoint)


def test_another_vision_tower_is_refused(checkpoint, tmp_path):
    from transformers import AutoConfig, SiglipVisionConfig

    config = AutoConfig.from_pretrained(checkpoint)
    config.vision_config = SiglipVisionConfig(image_size=224, patch_size=14)
    for file in checkpoint.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").unlink()
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["vision_config"]
    with pytest.raises(ValueError, match="SiglipVisionConfig"):
        config_of(tmp_path)


@pytest.fixture(scope="module")
def deepstack_checkpoint(tmp_path_factory):
    """Qwen3-VL, with features of the encoder after two decoder layers; without weights."""
    path = tmp_path_factory.mktemp("qwen3")
    save_random_qwen3(path, tiny.QWEN3)
    (path / "model.safetensors").unlink()
    return path


def settings_of(path, **given):
    config = config_of(path, additional_config={"pruning": given})
    return pruning_settings_of(config.model_config.hf_config)


def test_the_signal_follows_from_the_decoder(checkpoint, deepstack_checkpoint, monkeypatch):
    warnings = []
    monkeypatch.setattr(logger, "warning", lambda message, *values: warnings.append(message))
    assert settings_of(checkpoint).decoder_signal == "keys"
    assert settings_of(checkpoint, decoder_signal="values").decoder_signal == "values"
    assert settings_of(checkpoint, selector="cls").decoder_signal is None
    assert settings_of(deepstack_checkpoint, selector="received").decoder_signal is None
    assert not warnings
    assert settings_of(deepstack_checkpoint).decoder_signal == "values"
    assert settings_of(deepstack_checkpoint, decoder_signal="keys").decoder_signal == "keys"
    assert ["No trained weights" in warning for warning in warnings] == [True, True]


def test_stage_two_comes_after_the_deepstack_features(checkpoint, deepstack_checkpoint):
    assert settings_of(checkpoint).shallow_boundary is None
    assert settings_of(deepstack_checkpoint).boundaries(8) == (2, 6)
    assert settings_of(deepstack_checkpoint, shallow_boundary=4).boundaries(8) == (4, 6)
    with pytest.raises(ValueError, match=r"first 2 layers.*set shallow_boundary to 2 or more"):
        settings_of(deepstack_checkpoint, shallow_boundary=1)


@pytest.mark.parametrize("selector", ["grid", "random", "divprune", "dart", "fastv", "key_norm"])
def test_frames_are_compared_by_selectors_that_rank_by_saliency(deepstack_checkpoint, selector):
    assert not settings_of(deepstack_checkpoint).compare_frames
    for ranking in ("vitcop", "received"):
        assert settings_of(
            deepstack_checkpoint, selector=ranking, compare_frames=True
        ).compare_frames
    with pytest.raises(ValueError, match=rf"selector {selector} does not rank them; remove comp"):
        settings_of(
            deepstack_checkpoint, selector=selector, compare_frames=True, max_pruning_ratio=0.5
        )


def test_another_decoder_of_internvl_is_refused(checkpoint_of, tmp_path):
    for file in checkpoint_of(INTERNVL_CHAT).iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((tmp_path / "config.json").read_text())
    config["llm_config"]["model_type"] = "internlm2"
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"the decoder is internlm2, .*; serve it with stock vLLM"):
        config_of(tmp_path, trust_remote_code=True)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"mm_encoder_tp_mode": "data"}, "remove --mm-encoder-tp-mode data"),
        ({"compilation_config": {"compile_mm_encoder": True}}, "unset .* compile_mm_encoder"),
        ({"compilation_config": {"cudagraph_mm_encoder": True}}, "unset .* cudagraph_mm_encoder"),
    ],
)
def test_encoders_of_internvl_that_bypass_stage_one_are_refused(checkpoint_of, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        config_of(checkpoint_of(INTERNVL_CHAT), trust_remote_code=True, **options)


@pytest.fixture(scope="module")
def stage_one_checkpoint(tmp_path_factory):
    """Qwen3.5, whose decoder has no segments; without weights."""
    path = tmp_path_factory.mktemp("qwen3_5")
    save_random_qwen3_5(path)
    (path / "model.safetensors").unlink()
    return path


def test_stage_one_alone_leaves_decoder_and_scheduler_to_vllm(stage_one_checkpoint):
    config = config_of(stage_one_checkpoint)
    assert config.scheduler_config.scheduler_cls is None
    assert config.parallel_config.worker_cls.endswith("StageOneCPUWorker")
    settings = pruning_settings_of(config.model_config.hf_config)
    assert (settings.selector, settings.decoder_signal) == ("received", None)
    assert span_limit_of(config.model_config.hf_config) > 10**9
    assert settings_of(stage_one_checkpoint, selector="divprune").selector == "divprune"


@pytest.mark.parametrize(
    ("pruning", "sentence"),
    [
        ({"selector": "vitcop"}, r"selector vitcop drops tokens between decoder layers.*received"),
        ({"selector": "key_norm"}, "selector key_norm drops tokens between decoder layers"),
        ({"shallow_boundary": 1}, "remove shallow_boundary and deep_boundary"),
        ({"positions": "reference"}, "set positions: original"),
        ({"decoder_signal": "values"}, "selector received does not read decoder_signal"),
        ({"selector": "cls"}, "reads .CLS., which this model's encoder does not have"),
    ],
)
def test_settings_of_the_decoder_are_refused_with_stage_one_alone(
    stage_one_checkpoint, pruning, sentence
):
    with pytest.raises(ValueError, match=sentence):
        settings_of(stage_one_checkpoint, **pruning)


def test_stage_one_alone_refuses_model_runner_v2(stage_one_checkpoint, v2):
    with pytest.raises(ValueError, match="Stage I alone runs with model runner V1"):
        config_of(stage_one_checkpoint)


def test_registering_twice_changes_nothing():
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from vitcop_vllm.plugin import register

    register()
    register()
    assert MODELS_CONFIG_MAP["LlavaForConditionalGeneration"] is PrunedModelConfig


def test_a_hook_of_vllm_s_own_runs_first(checkpoint, monkeypatch):
    from vllm.model_executor.models.config import VerifyAndUpdateConfig

    calls = []

    class Theirs(VerifyAndUpdateConfig):
        @staticmethod
        def verify_and_update_config(vllm_config):
            calls.append("engine")

        @staticmethod
        def verify_and_update_model_config(model_config):
            calls.append("model")

    monkeypatch.setitem(VLLM_HOOKS, "LlavaForConditionalGeneration", Theirs)
    assert pruning_settings_of(config_of(checkpoint).model_config.hf_config).selector == "vitcop"
    assert calls == ["model", "engine"]


@pytest.mark.parametrize("version", ["0.31.2", "0.34.0", "0.3", "1.0", "unknown"])
def test_another_vllm_is_not_touched(version, monkeypatch, caplog):
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from vitcop_vllm import plugin

    monkeypatch.setattr(plugin, "installed_vllm_version", lambda: version)
    monkeypatch.delitem(MODELS_CONFIG_MAP, "LlavaForConditionalGeneration", raising=False)
    with caplog.at_level("ERROR", logger="vllm"):
        plugin.register()
    assert "LlavaForConditionalGeneration" not in MODELS_CONFIG_MAP


def test_a_ratio_out_of_range_fails_the_request_and_nothing_else(llm):
    from tests.engine.requests import RequestSpec, generate

    for ratio in (-0.1, 1.5, 0.96, float("nan"), "abc", None, True):
        prompt = RequestSpec("Q", (1,), 0.5).prompt()
        prompt["mm_processor_kwargs"]["pruning_ratio"] = ratio
        with pytest.raises(ValueError, match="pruning_ratio must be a decimal number"):
            llm.generate(prompt, use_tqdm=False)
    assert generate(llm, [RequestSpec("Q", (1,), 0.5)])[0].tokens


def test_compiled_code_of_a_pruned_model_is_not_taken_for_stock_vllms(checkpoint, monkeypatch):
    """vLLM keys compiled code by the inner configuration, which must tell them apart."""
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    def key(**options) -> str:
        config = config_of(checkpoint, block_size=32, enable_prefix_caching=False, **options)
        return config.with_hf_config(config.model_config.hf_text_config).compute_hash()

    ours = key()
    assert key() == ours
    assert key(additional_config={"pruning": {"deep_boundary": 4}}) != ours
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    monkeypatch.delitem(MODELS_CONFIG_MAP, "LlavaForConditionalGeneration")
    assert key() != ours


def test_a_image_known_by_its_uuid_need_not_be_sent_again(llm):
    from vllm import SamplingParams

    from tests.engine.requests import RequestSpec, generate

    ask = RequestSpec("Q", (1,), 0.5)
    prompt = ask.prompt() | {"multi_modal_uuids": {"image": ["known"]}}
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    first = llm.generate(prompt, params, use_tqdm=False)[0].outputs[0].token_ids
    prompt["multi_modal_data"] = {"image": [None]}
    again = llm.generate(prompt, params, use_tqdm=False)[0].outputs[0].token_ids
    assert list(first) == list(again) == generate(llm, [ask])[0].tokens[:4]


def test_rocm_which_calls_its_devices_cuda_is_refused_by_name(checkpoint, monkeypatch):
    from vllm.platforms import current_platform

    monkeypatch.setattr(current_platform, "device_type", "cuda")
    monkeypatch.setattr(current_platform, "is_rocm", lambda: True)
    with pytest.raises(ValueError, match="not on rocm"):
        config_of(checkpoint)


def test_a_compiled_decoder_needs_a_compiler(checkpoint, monkeypatch):
    compiled = {"enforce_eager": False, "compilation_config": {"mode": 3}}
    config_of(checkpoint, **compiled)
    monkeypatch.setattr("vitcop_vllm.engine.checks.has_cpp_compiler", lambda: False)
    with pytest.raises(ValueError, match=r"install g\+\+, or set --enforce-eager"):
        config_of(checkpoint, **compiled)
    config_of(checkpoint, enforce_eager=True)
