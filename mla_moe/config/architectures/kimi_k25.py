"""Kimi-K2.5 and K2.6 (Moonshot AI, 2026): Kimi-K2 as the language model beside a vision tower, which is not used here.

`text_config` says the language model, whose tensors have the prefix `language_model.`. transformers 5.24.0 ties
embedding and head unless the outer `tie_word_embeddings` is false; the released head is its own tensor, and so what is
written says false.
"""

from collections.abc import Mapping
from typing import Any

from mla_moe.config.architectures.deepseek_v3 import DeepseekV3
from mla_moe.config.errors import require
from mla_moe.config.model import ModelConfig
from mla_moe.config.rope import Yarn


class KimiK25(DeepseekV3):
    model_type = "kimi_k25"
    hf_class = "KimiK25ForConditionalGeneration"
    models = "Kimi-K2.5, K2.6: their language model"
    differs = "tensors under `language_model.`; the vision tower is kept in conversions and not used"
    aliases = ()
    unused_modules = ("vision_tower", "mm_projector")
    presets: Mapping[str, Mapping[str, Any]] = {
        "kimi-k2.5": dict(
            DeepseekV3.presets["kimi-k2"], max_position_embeddings=262144, rms_norm_eps=1e-5,
            rope_scaling=Yarn(factor=64.0, original_max_position_embeddings=4096, beta_slow=1.0),
        ),
    }  # fmt: skip

    @property
    def field_value(self) -> str:
        return self.model_type

    def read(self, config: Mapping[str, Any]) -> dict[str, Any]:
        text = config.get("text_config")
        require(
            isinstance(text, dict), "text_config", text, "must be an object: the configuration of the language model"
        )
        assert isinstance(text, dict)
        kind, known = text.get("model_type"), (None, "kimi_k2", "deepseek_v3")
        require(kind in known, "text_config.model_type", kind, f"must be one of {', '.join(known[1:])}")
        return super().read(text)

    def write(self, cfg: ModelConfig) -> dict[str, Any]:
        text = super().write(cfg) | {"model_type": DeepseekV3.model_type, "architectures": [DeepseekV3.hf_class]}
        tied = cfg.tie_word_embeddings
        names = {"architectures": [self.hf_class], "model_type": self.model_type}
        return names | {"text_config": text, "tie_word_embeddings": tied}

    def tensor_name(self, name: str) -> str:
        return f"language_model.{name}"


ARCHITECTURE = KimiK25()
