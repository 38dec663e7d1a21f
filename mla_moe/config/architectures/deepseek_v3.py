"""DeepSeek-V3 (arXiv 2412.19437) and R1, and models of others under its name or with its architecture."""

from collections.abc import Mapping
from typing import Any

from mla_moe.config.architectures.architecture import Architecture
from mla_moe.config.rope import Yarn


class DeepseekV3(Architecture):
    model_type = "deepseek_v3"
    hf_class = "DeepseekV3ForCausalLM"
    models = "DeepSeek-V3, V3.1, R1; Moonlight; Kimi-K2"
    differs = "the reference: sigmoid scores, router bias, groups by their two best experts"
    aliases = ("kimi_k2",)
    extensions = ("rope_interleave",)
    presets: Mapping[str, Mapping[str, Any]] = {
        "tiny": dict(
            vocab_size=512, hidden_size=128, num_hidden_layers=3, num_attention_heads=4, intermediate_size=384,
            moe_intermediate_size=96, n_routed_experts=8, num_experts_per_tok=2, q_lora_rank=64, kv_lora_rank=32,
            qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32, n_group=2, topk_group=1, routed_scaling_factor=2.5,
            max_position_embeddings=2048, initializer_range=0.02, num_nextn_predict_layers=1,
        ),
        "deepseek-v3": dict(
            vocab_size=129280, hidden_size=7168, num_hidden_layers=61, num_attention_heads=128, intermediate_size=18432,
            moe_intermediate_size=2048, n_routed_experts=256, num_experts_per_tok=8, first_k_dense_replace=3, n_group=8,
            topk_group=4, routed_scaling_factor=2.5, q_lora_rank=1536, max_position_embeddings=163840,
            rope_scaling=Yarn(factor=40.0, original_max_position_embeddings=4096), num_nextn_predict_layers=1,
        ),
        "moonlight-16b-a3b": dict(
            vocab_size=163840, hidden_size=2048, num_hidden_layers=27, num_attention_heads=16, intermediate_size=11264,
            moe_intermediate_size=1408, n_routed_experts=64, num_experts_per_tok=6, n_shared_experts=2,
            routed_scaling_factor=2.446, max_position_embeddings=8192, rope_theta=50_000.0, rms_norm_eps=1e-5,
        ),
        "kimi-k2": dict(
            vocab_size=163840, hidden_size=7168, num_hidden_layers=61, num_attention_heads=64, intermediate_size=18432,
            moe_intermediate_size=2048, n_routed_experts=384, num_experts_per_tok=8, routed_scaling_factor=2.827,
            q_lora_rank=1536, max_position_embeddings=131072, rope_theta=50_000.0,
            rope_scaling=Yarn(factor=32.0, original_max_position_embeddings=4096, beta_fast=1.0, beta_slow=1.0),
        ),
    }  # fmt: skip

    @property
    def field_value(self) -> str | None:
        return None


ARCHITECTURE = DeepseekV3()
