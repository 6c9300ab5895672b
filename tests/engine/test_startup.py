"""Start-up settles the configuration, or refuses with a sentence."""

import json

import pytest

from vitcop_vllm.engine.config import PrunedModelConfig, settings_of


def config_of(checkpoint, **options):
    from vllm.engine.arg_utils import EngineArgs
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    return EngineArgs(model=str(checkpoint), max_model_len=1024, **options).create_engine_config()


def test_selecting_the_architecture_is_enough(checkpoint):
    config = config_of(checkpoint)
    assert config.scheduler_config.disable_chunked_mm_input
    assert not config.cache_config.enable_prefix_caching
    assert config.cache_config.block_size == 32
    assert settings_of(config.model_config.hf_config).default_ratio == 0.0
    assert not config.use_v2_model_runner


def test_settings_come_from_additional_config(checkpoint):
    config = config_of(checkpoint, additional_config={"pruning": {"default_ratio": 0.5}})
    assert settings_of(config.model_config.hf_config).default_ratio == 0.5


def test_a_block_size_the_user_chose_is_kept(checkpoint):
    assert config_of(checkpoint, block_size=64).cache_config.block_size == 64


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
        ({"additional_config": {"pruning": {"counts": "block_aligned"}}}, None),
        ({"additional_config": {"pruning": {"shallow_boundary": 7}}}, "stage boundaries"),
        ({"additional_config": {"pruning": {"defualt_ratio": 0.5}}}, "default_ratio"),
        ({"additional_config": {"pruning": {"default_ratio": 1.0}}}, "default_ratio"),
        ({"additional_config": {"pruning": [1]}}, "mapping"),
        ({"hf_overrides": {"vision_feature_select_strategy": "full"}}, "select_strategy"),
        ({"hf_overrides": {"vision_feature_layer": [-2, -3]}}, "vision_feature_layer"),
    ],
)
def test_what_cannot_be_done_right_is_refused(checkpoint, options, sentence):
    if sentence is None:
        config_of(checkpoint, **options)
        return
    with pytest.raises(ValueError, match=sentence):
        config_of(checkpoint, **options)


def test_model_runner_v2_is_refused(checkpoint, monkeypatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    with pytest.raises(ValueError, match="VLLM_USE_V2_MODEL_RUNNER"):
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


def test_registering_twice_changes_nothing():
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from vitcop_vllm.plugin import register

    register()
    register()
    assert MODELS_CONFIG_MAP["LlavaForConditionalGeneration"] is PrunedModelConfig


def test_another_vllm_is_not_touched(monkeypatch, caplog):
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from vitcop_vllm import plugin

    monkeypatch.setattr(plugin, "installed_vllm_version", lambda: "0.33.1")
    monkeypatch.delitem(MODELS_CONFIG_MAP, "LlavaForConditionalGeneration", raising=False)
    with caplog.at_level("ERROR", logger="vllm"):
        plugin.register()
    assert "LlavaForConditionalGeneration" not in MODELS_CONFIG_MAP


def test_a_ratio_out_of_range_fails_the_request_and_nothing_else(llm):
    from tests.engine.requests import Ask, generate

    for ratio in (-0.1, 1.5, 0.96, float("nan"), "abc", None, True):
        prompt = Ask("Q", (1,), 0.5).prompt()
        prompt["mm_processor_kwargs"]["pruning_ratio"] = ratio
        with pytest.raises(ValueError, match="pruning_ratio must be a decimal number"):
            llm.generate(prompt, use_tqdm=False)
    assert generate(llm, [Ask("Q", (1,), 0.5)])[0].tokens
