"""A.X-K1 (SK Telecom, arXiv 2601.09200): DeepSeek-V3 with a norm behind each mixture of experts.

Its files are without router bias, have the norm in dense layers too, which do not use it, and say
`first_k_dense_replace`; transformers 5.24.0 reads a missing bias as 0, and so does this. The code that came with the
release could not be read here: groups without a bias are scored as in transformers, by their two best experts.
"""

import re
from collections.abc import Mapping
from typing import Any

from mla_moe.config.architectures.architecture import Architecture, leading_dense_layers
from mla_moe.config.errors import require_field
from mla_moe.config.model import ModelConfig


class AXK1(Architecture):
    model_type = "axk1"
    reads = ("mlp_layer_types",)
    hf_class = "AXK1ForCausalLM"
    models = "A.X-K1"
    differs = "a norm behind each mixture of experts; the router may have no bias"
    aliases = ("AXK1",)
    router: Mapping[str, Any] = {"scoring_func": "sigmoid"}
    extensions = ("rope_interleave", "post_mlp_norm")
    bias_may_be_missing = True
    presets: Mapping[str, Mapping[str, Any]] = {
        "a.x-k1": dict(
            vocab_size=163840, hidden_size=7168, num_hidden_layers=61, num_attention_heads=64, intermediate_size=18432,
            moe_intermediate_size=2048, n_routed_experts=192, num_experts_per_tok=8, n_group=8, topk_group=4,
            topk_method="group_limited_top2", routed_scaling_factor=2.5, q_lora_rank=1536, post_mlp_norm=True,
            max_position_embeddings=131072,
        ),
    }  # fmt: skip

    def read(self, config: Mapping[str, Any]) -> dict[str, Any]:
        dense = leading_dense_layers(config)
        return super().read(config) | {"first_k_dense_replace": dense, "post_mlp_norm": True}

    def read_router(self, config: Mapping[str, Any]) -> dict[str, Any]:
        bias = config.get("topk_method") in (None, "noaux_tc")
        return super().read_router(config) | {"topk_method": "noaux_tc" if bias else "group_limited_top2"}

    def write(self, cfg: ModelConfig) -> dict[str, Any]:
        config, dense = super().write(cfg), cfg.first_k_dense_replace
        del config["post_mlp_norm"]
        return config | {"mlp_layer_types": ["dense"] * dense + ["sparse"] * cfg.num_moe_layers}

    def is_unused(self, cfg: ModelConfig, name: str) -> bool:
        match = re.fullmatch(r"model\.layers\.(\d+)\.post_mlp_layernorm\.weight", name)
        return match is not None and int(match[1]) < cfg.first_k_dense_replace

    def check(self, cfg: ModelConfig) -> None:
        super().check(cfg)
        methods = "noaux_tc", "group_limited_top2"
        fix = f"axk1 has {methods[0]}, or without bias {methods[1]}"
        require_field(cfg, "topk_method", cfg.topk_method in methods, fix)
        require_field(cfg, "post_mlp_norm", cfg.post_mlp_norm, "axk1 has this norm; its config.json has no such field")


ARCHITECTURE = AXK1()
