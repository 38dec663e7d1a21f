"""DeepSeek-V2 (arXiv 2405.04434) and V2-Lite."""

from collections.abc import Mapping
from typing import Any

from mla_moe.config.architectures.architecture import Architecture
from mla_moe.config.errors import require_field
from mla_moe.config.model import ModelConfig
from mla_moe.config.rope import Yarn

_COMMON: Mapping[str, Any] = dict(
    vocab_size=102400, scoring_func="softmax", norm_topk_prob=False, n_shared_experts=2, num_experts_per_tok=6,
    max_position_embeddings=163840,
    rope_scaling=Yarn(factor=40.0, original_max_position_embeddings=4096, mscale=0.707, mscale_all_dim=0.707),
)  # fmt: skip


class DeepseekV2(Architecture):
    model_type = "deepseek_v2"
    hf_class = "DeepseekV2ForCausalLM"
    models = "DeepSeek-V2, V2-Lite"
    differs = "softmax scores without normalisation or router bias, groups by their best expert"
    required = ()
    router: Mapping[str, Any] = {"scoring_func": "softmax", "norm_topk_prob": False}
    presets: Mapping[str, Mapping[str, Any]] = {
        "deepseek-v2-lite": dict(
            **_COMMON, hidden_size=2048, num_hidden_layers=27, num_attention_heads=16, intermediate_size=10944,
            moe_intermediate_size=1408, n_routed_experts=64, topk_method="greedy",
        ),
        "deepseek-v2": dict(
            **_COMMON, hidden_size=5120, num_hidden_layers=60, num_attention_heads=128, intermediate_size=12288,
            moe_intermediate_size=1536, n_routed_experts=160, topk_method="group_limited_greedy", n_group=8,
            topk_group=3, routed_scaling_factor=16.0, q_lora_rank=1536,
        ),
    }  # fmt: skip

    @property
    def field_value(self) -> None:
        return None

    def read_router(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return super().read_router(config) | {"topk_method": config.get("topk_method") or "greedy"}

    def check(self, cfg: ModelConfig) -> None:
        super().check(cfg)
        methods = "greedy", "group_limited_greedy"
        fix = f"must be one of {', '.join(methods)}, which go with softmax"
        require_field(cfg, "topk_method", cfg.topk_method in methods, fix)


ARCHITECTURE = DeepseekV2()
