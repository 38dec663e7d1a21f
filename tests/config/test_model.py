import dataclasses
import json
import math

import pytest

from mla_moe import ConfigError, ModelConfig, preset
from mla_moe.config import PRESETS
from mla_moe.nn.model_costs import (
    active_matmul_weights,
    count_parameters,
    kv_cache_bytes_per_token,
    mha_kv_cache_bytes_per_token,
    train_flops_per_token,
)


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("name", "total", "mtp"),
    [
        ("deepseek-v2-lite", 15_706_484_224, 0),
        ("deepseek-v2", 235_741_434_880, 0),
        ("deepseek-v3", 671_026_419_200, 11_610_068_224),
        ("moonlight-16b-a3b", 15_960_110_208, 0),
        ("kimi-k2", 1_026_408_232_448, 0),
        ("glm-4.7-flash", 29_943_393_920, 643_706_176),
        ("a.x-k1", 518_983_052_288, 0),
        ("mistral-small-4", 118_972_826_624, 0),
        ("kimi-k2.5", 1_026_408_232_448, 0),
        ("youtu-llm-2b", 1_961_560_064, 0),
        ("deepseek-v3.2", 671_877_944_064, 11_624_027_648),
        ("glm-5", 743_911_218_432, 9_952_920_576),
        ("glm-5.2", 743_377_019_904, 9_952_920_576),
        ("longcat-flash", 560_664_980_480, 0),
    ],
)
def test_presets_have_the_published_number_of_parameters(name, total, mtp):
    count = count_parameters(preset(name))
    assert (count.total, count.mtp) == (total, mtp)


@pytest.mark.parametrize(("name", "active"), [("deepseek-v3", 37.5e9), ("a.x-k1", 33e9), ("mistral-small-4", 6.5e9)])
def test_active_parameters_are_the_published_ones(name, active):
    assert count_parameters(preset(name)).active == pytest.approx(active, rel=0.025)


@pytest.mark.parametrize(("name", "active"), [("deepseek-v3.2", 37e9), ("glm-5", 40e9), ("glm-5.2", 40e9)])
def test_active_parameters_of_sparse_attention_are_the_published_ones(name, active):
    """Published as of DeepSeek-V3 without indexers; of GLM-5 without the embedding, which is a lookup."""
    cfg = preset(name)
    indexers = cfg.shared_indexers.count(False) * indexer_parameters(cfg)
    assert active_matmul_weights(cfg) - indexers == pytest.approx(active, rel=0.025)


def indexer_parameters(cfg):
    H, width = cfg.index_n_heads, cfg.index_head_dim
    return cfg.q_lora_rank * H * width + cfg.hidden_size * (H + width) + 2 * width


def test_indexers_are_counted_as_they_are_used():
    """Parameters beside those of DeepSeek-V3; FLOPs that grow with the selected keys and, of scores, the length."""
    v3, v32 = preset("deepseek-v3"), preset("deepseek-v3.2")
    assert count_parameters(v32).total - count_parameters(v3).total == 61 * indexer_parameters(v32)
    assert count_parameters(preset("glm-5")).total - count_parameters(preset("glm-5.2")).total == (
        57 * indexer_parameters(preset("glm-5"))
    )
    assert kv_cache_bytes_per_token(v32) == 70_272 + 61 * 128 * 2
    dense = dataclasses.replace(v3, num_nextn_predict_layers=0)
    sparse = dataclasses.replace(v32, num_nextn_predict_layers=0)
    extra = train_flops_per_token(sparse, 2048) - train_flops_per_token(dense, 2048)
    assert extra == pytest.approx(2 * 61 * indexer_parameters(v32), rel=1e-3)
    far = train_flops_per_token(sparse, 8 * 2048) - train_flops_per_token(sparse, 4 * 2048)
    keys = 2048 * (1 / 8 - 1 / 16)  # the mean number of keys comes nearer to 2,048
    per_key = 3 * 2 * 128 * (128 + 64 + 128)
    assert far == pytest.approx(61 * (keys * per_key + 64 * 128 * 4 * 2048), rel=1e-3)


def test_a_tied_head_is_counted_once_as_a_parameter_and_as_work(cfg):
    tied, head = dataclasses.replace(cfg, tie_word_embeddings=True), cfg.vocab_size * cfg.hidden_size
    assert count_parameters(cfg).total - count_parameters(tied).total == head
    assert train_flops_per_token(tied, 64) == train_flops_per_token(cfg, 64)


def test_cache_bytes_of_the_presets():
    v3 = preset("deepseek-v3")
    assert kv_cache_bytes_per_token(v3) == 70_272
    assert kv_cache_bytes_per_token(preset("deepseek-v2-lite")) == 31_104
    assert mha_kv_cache_bytes_per_token(v3) / kv_cache_bytes_per_token(v3) == pytest.approx(56.9, abs=0.05)


def test_flops_grow_with_length_only_by_attention():
    cfg = preset("deepseek-v3")
    per_key = 3 * 2 * 128 * (128 + 64 + 128) / 2 * (61 + 1)  # the MTP module has attention too
    assert train_flops_per_token(cfg, 8192) - train_flops_per_token(cfg, 4096) == pytest.approx(4096 * per_key)


@pytest.mark.parametrize("name", PRESETS)
def test_config_json_round_trip(name):
    cfg = preset(name)
    assert ModelConfig.from_hf(json.loads(json.dumps(cfg.to_hf()))) == cfg


def test_rope_parameters_of_newer_files_are_read():
    config = preset("deepseek-v3").to_hf()
    scaling = config.pop("rope_scaling")
    scaling["rope_type"] = scaling.pop("type")
    config["rope_parameters"] = scaling | {"rope_theta": config.pop("rope_theta")}
    assert ModelConfig.from_hf(config) == preset("deepseek-v3")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"num_experts_per_tok": 9}, "num_experts_per_tok"),
        ({"topk_group": 1, "num_experts_per_tok": 3}, "num_experts_per_tok"),
        ({"n_group": 3}, "n_group"),
        ({"n_group": 8, "topk_group": 2}, "n_group"),
        ({"topk_group": 5}, "topk_group"),
        ({"first_k_dense_replace": 4}, "first_k_dense_replace"),
        ({"qk_rope_head_dim": 3}, "qk_rope_head_dim"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"kv_lora_rank": -1}, "kv_lora_rank"),
        ({"num_nextn_predict_layers": 2}, "num_nextn_predict_layers"),
        ({"scoring_func": "softmax"}, "norm_topk_prob"),
        ({"topk_method": "group_limited"}, "topk_method"),
    ],
)
def test_invalid_models_name_the_field(cfg, change, field):
    with pytest.raises(ConfigError) as error:
        dataclasses.replace(cfg, **change)
    assert error.value.field == field


YARN = {"type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"tie_word_embeddings": "yes"}, "config.json.tie_word_embeddings"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.type"),
        ({"rope_scaling": {"type": ["yarn"], "factor": 2.0}}, "rope_scaling.type"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_scaling.original_max_position_embeddings"),
        ({"vocab_size": None}, "config.json.vocab_size"),
        ({"rope_scaling": {"type": "yarn", "attention_factor": 1.5}}, "rope_scaling.attention_factor"),
        ({"vocab_size": "many"}, "config.json.vocab_size"),
        ({"model_type": "deepseek_v4"}, "model_type"),
        ({"routed_scaling_factor": None}, "config.json.routed_scaling_factor"),
        ({"n_group": None}, "topk_group"),  # one group of all experts, of which four are not selected
        ({"rope_scaling": YARN | {"truncate": False}}, "rope_scaling.truncate"),
        ({"rope_scaling": YARN | {"mscale": math.inf}}, "rope_scaling.mscale"),
        ({"rope_scaling": YARN | {"mscale_all_dim": 1e9}}, "rope_scaling.mscale_all_dim"),
        (
            {"rope_parameters": {"partial_rotary_factor": 0.5}, "rope_scaling": None},
            "rope_scaling.partial_rotary_factor",
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": "4", "original_max_position_embeddings": 3}},
            "rope_scaling.factor",
        ),
    ],
)
def test_config_json_of_another_architecture_is_an_error(change, field):
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_hf(preset("deepseek-v3").to_hf() | change)
    assert error.value.field == field


def test_variants_in_released_files_are_read():
    """Kimi's model type; the values that transformers writes for an unchanged setting; greedy V2 without groups."""
    v3 = preset("deepseek-v3").to_hf()
    unchanged = {"truncate": True, "attention_factor": None, "partial_rotary_factor": 1.0}
    v3["rope_scaling"] |= unchanged
    assert ModelConfig.from_hf(v3 | {"model_type": "kimi_k2"}) == preset("deepseek-v3")
    v2 = {k: v for k, v in preset("deepseek-v2-lite").to_hf().items() if k not in ("n_group", "topk_group")}
    assert ModelConfig.from_hf(v2) == preset("deepseek-v2-lite")


def test_null_shared_experts_are_zero():
    assert ModelConfig.from_hf(preset("deepseek-v3").to_hf() | {"n_shared_experts": None}).n_shared_experts == 0


def test_unknown_preset_names_the_choices():
    with pytest.raises(ConfigError, match="moonlight-16b-a3b"):
        preset("gpt-2")
