"""The registry of architectures."""

import dataclasses

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
