"""The registry of architectures."""

import dataclasses
import logging

import pytest

from mla_moe import ConfigError, ModelConfig, preset
from mla_moe.checkpoint.hf_mapping import tensor_mappings
from mla_moe.config import architectures
from mla_moe.config.architectures.deepseek_v3 import DeepseekV3


def test_unknown_model_type_names_the_choices():
    with pytest.raises(ConfigError, match="deepseek_v3, kimi_k2"):
        ModelConfig.from_hf({"model_type": "llama"})
    with pytest.raises(ConfigError) as error:
        dataclasses.replace(preset("tiny"), model_type="llama")
    assert error.value.field == "model_type"


def test_a_model_that_its_config_json_cannot_say_is_an_error():
    with pytest.raises(ConfigError, match="post_mlp_norm = False: axk1 has this norm"):
        dataclasses.replace(preset("a.x-k1"), post_mlp_norm=False)


def test_a_file_is_all_that_an_architecture_needs(tmp_path, monkeypatch):
    """A file in the package is found; the class in it says the fields of `config.json` and the names of tensors."""
    (tmp_path / "renamed.py").write_text(
        "from mla_moe.config.architectures.deepseek_v3 import DeepseekV3\n"
        "class Renamed(DeepseekV3):\n"
        "    model_type, hf_class = 'renamed', 'RenamedForCausalLM'\n"
        "    aliases = ('other',)\n"
        "    @property\n"
        "    def field_value(self): return self.model_type\n"
        "    def tensor_name(self, name): return f'text.{name}'\n"
        "ARCHITECTURE = Renamed()\n"
    )
    monkeypatch.setattr(architectures, "__path__", [*architectures.__path__, str(tmp_path)])
    found = architectures._discover()
    assert {name for name in found if name not in architectures.ARCHITECTURES} == {"renamed", "other"}
    monkeypatch.setattr(architectures, "ARCHITECTURES", found)
    cfg = ModelConfig.from_hf(preset("tiny").to_hf() | {"model_type": "other"})
    assert cfg.to_hf()["architectures"] == ["RenamedForCausalLM"]
    assert ModelConfig.from_hf(cfg.to_hf()) == cfg != preset("tiny")
    assert {mapping.name.split(".")[0] for mapping in tensor_mappings(cfg)} == {"text"}


def test_every_file_defines_one_architecture():
    assert all(isinstance(a, architectures.Architecture) for a in architectures.ARCHITECTURES.values())
    assert isinstance(architectures.find_architecture("kimi_k2"), DeepseekV3)


RELEASED = {
    "deepseek-v3.2": {
        "architectures": ["DeepseekV32ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "ep_size": 1,
        "first_k_dense_replace": 3, "hidden_act": "silu", "index_head_dim": 128, "index_n_heads": 64,
        "index_topk": 2048, "model_type": "deepseek_v32", "moe_layer_freq": 1, "n_group": 8, "topk_group": 4,
        "num_nextn_predict_layers": 1, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
        "quantization_config": {"fmt": "e4m3", "quant_method": "fp8", "scale_fmt": "ue8m0"},
    },
    "glm-5.2": {
        "architectures": ["GlmMoeDsaForCausalLM"], "first_k_dense_replace": 3, "head_dim": 192, "index_head_dim": 128,
        "index_n_heads": 32, "index_share_for_mtp_iteration": True, "index_skip_topk_offset": 3, "index_topk": 2048,
        "index_topk_freq": 4, "index_topk_pattern": None, "indexer_rope_interleave": True, "model_type": "glm_moe_dsa",
        "mlp_layer_types": ["dense"] * 3 + ["sparse"] * 75, "moe_layer_freq": 1, "moe_router_dtype": "float32",
        "n_group": 1, "topk_group": 1, "qk_head_dim": 256, "rope_interleave": True, "topk_method": "noaux_tc",
        "rope_parameters": {"rope_theta": 8000000, "rope_type": "default"},
    },
}  # fmt: skip


@pytest.mark.parametrize("name", RELEASED)
def test_released_fields_of_sparse_attention_are_read(name, caplog):
    """The layers that share keys are in GLM-5.2's file by name, and derived without; nothing is logged as ignored."""
    written = preset(name).to_hf()
    sizes = {k: v for k, v in written.items() if "index" not in k and not ("rope" in k and "glm" in name)}
    with caplog.at_level(logging.WARNING):
        cfg = ModelConfig.from_hf(sizes | RELEASED[name])
    assert cfg == preset(name)
    assert not caplog.records
    assert written.get("indexer_types", []).count("full") == (21 if name == "glm-5.2" else 0)


def test_layers_that_share_keys_are_a_valid_list():
    config = preset("glm-5.2").to_hf()
    pattern = {**config, "indexer_types": None, "index_topk_pattern": "F" + "S" * 77}
    assert ModelConfig.from_hf(pattern).shared_indexers == (False, *[True] * 77)
    for types, field in (
        (["full", "shared"], "indexer_types"),
        (["shared", "full"] * 39, "indexer_types"),
        (["shared", "half"] * 39, "config.json.indexer_types[1]"),
    ):
        with pytest.raises(ConfigError) as error:
            ModelConfig.from_hf(config | {"indexer_types": types})
        assert error.value.field == field
    with pytest.raises(ConfigError, match="index_topk = None: glm_moe_dsa has an indexer"):
        dataclasses.replace(preset("glm-5"), index_topk=None)
