"""Youtu-LLM-2B (Tencent, arXiv 2512.24618): DeepSeek-V3's attention with dense MLPs, and tied embeddings."""

from collections.abc import Mapping
from typing import Any

from mla_moe.config.architectures.architecture import Architecture
from mla_moe.config.errors import require_field
from mla_moe.config.model import ModelConfig

_MOE = {
    "n_routed_experts": 1, "num_experts_per_tok": 1, "moe_intermediate_size": 1, "n_shared_experts": 0, "n_group": 1,
    "topk_group": 1, "routed_scaling_factor": 1.0, "norm_topk_prob": True, "num_nextn_predict_layers": 0,
}  # fmt: skip
"""Fields of a `ModelConfig` that describe experts, of which this architecture has none."""


class Youtu(Architecture):
    model_type = "youtu"
    hf_class = "YoutuForCausalLM"
    models = "Youtu-LLM-2B"
    differs = "dense MLPs alone; tied embeddings"
    aliases = ("youtu_llm",)
    extensions = ("rope_interleave",)
    reads = ("embedding_initializer_range",)
    required = ()
    presets: Mapping[str, Mapping[str, Any]] = {
        "youtu-llm-2b": dict(
            **_MOE, vocab_size=128256, hidden_size=2048, num_hidden_layers=32, num_attention_heads=16,
            intermediate_size=6144, first_k_dense_replace=32, q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128,
            qk_rope_head_dim=64, v_head_dim=128, max_position_embeddings=131072, rope_theta=1_600_000.0,
            tie_word_embeddings=True,
        ),
    }  # fmt: skip

    def read(self, config: Mapping[str, Any]) -> dict[str, Any]:
        tied = config.get("tie_word_embeddings")
        same = {"first_k_dense_replace": config.get("num_hidden_layers"), "tie_word_embeddings": tied is not False}
        return super().read({name: value for name, value in config.items() if name not in _MOE}) | _MOE | same

    def write(self, cfg: ModelConfig) -> dict[str, Any]:
        experts = {*_MOE, "first_k_dense_replace", "topk_method", "scoring_func"}
        return {name: value for name, value in super().write(cfg).items() if name not in experts}

    def check(self, cfg: ModelConfig) -> None:
        super().check(cfg)
        dense = cfg.first_k_dense_replace == cfg.num_hidden_layers
        require_field(cfg, "first_k_dense_replace", dense, f"all {cfg.num_hidden_layers} layers of youtu are dense")
        for name, only in _MOE.items():
            require_field(cfg, name, getattr(cfg, name) == only, f"youtu has no experts; leave it at {only}")


ARCHITECTURE = Youtu()
