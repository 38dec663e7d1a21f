"""GLM-4.7-Flash (Z.ai, 2026): the mathematics of DeepSeek-V3 with wider heads.

Released files say `first_k_dense_replace`, transformers 5.24.0 `mlp_layer_types`, which it prefers; both are read and
written. Its layer 47 is DeepSeek-V3's MTP module.
"""

from collections.abc import Mapping
from typing import Any

from mla_moe.config.architectures.architecture import Architecture, leading_dense_layers
from mla_moe.config.model import ModelConfig


class Glm4MoeLite(Architecture):
    model_type = "glm4_moe_lite"
    reads = ("mlp_layer_types",)
    hf_class = "Glm4MoeLiteForCausalLM"
    models = "GLM-4.7-Flash"
    differs = "`mlp_layer_types`; wider heads"
    presets: Mapping[str, Mapping[str, Any]] = {
        "glm-4.7-flash": dict(
            vocab_size=154880, hidden_size=2048, num_hidden_layers=47, num_attention_heads=20, intermediate_size=10240,
            moe_intermediate_size=1536, n_routed_experts=64, num_experts_per_tok=4, q_lora_rank=768, kv_lora_rank=512,
            qk_nope_head_dim=192, qk_rope_head_dim=64, v_head_dim=256, routed_scaling_factor=1.8,
            max_position_embeddings=202752, rope_theta=1_000_000.0, rms_norm_eps=1e-5,
            num_nextn_predict_layers=1,
        ),
    }  # fmt: skip

    def read(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return super().read(config) | {"first_k_dense_replace": leading_dense_layers(config)}

    def write(self, cfg: ModelConfig) -> dict[str, Any]:
        dense, sparse = cfg.first_k_dense_replace, cfg.num_moe_layers
        return super().write(cfg) | {"mlp_layer_types": ["dense"] * dense + ["sparse"] * sparse}


ARCHITECTURE = Glm4MoeLite()
