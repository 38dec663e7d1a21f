"""Mistral-Small-4 (Mistral AI, 2026).

Groups that are left out have the score 0 in transformers 5.24.0 and −inf here: a softmax score is positive, so both
select the same experts. Without `rope_parameters.llama_4_scaling_beta` transformers fails; files always have it, with
YaRN, and so has what is written.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mla_moe.config.architectures.architecture import Architecture
from mla_moe.config.errors import require, require_field
from mla_moe.config.model import ModelConfig
from mla_moe.config.rope import Yarn


class Mistral4(Architecture):
    model_type = "mistral4"
    hf_class = "Mistral4ForCausalLM"
    models = "Mistral-Small-4, its text model"
    differs = "softmax scores, normalised, without router bias; queries scaled by position; experts in one tensor"
    router: Mapping[str, Any] = {"topk_method": "group_limited_top2", "scoring_func": "softmax"}
    extensions = ("rope_interleave", "llama_4_scaling_beta")
    required = ()
    stacked_experts = True
    presets: Mapping[str, Mapping[str, Any]] = {
        "mistral-small-4": dict(
            vocab_size=131072, hidden_size=4096, num_hidden_layers=36, num_attention_heads=32, intermediate_size=12288,
            moe_intermediate_size=2048, n_routed_experts=128, num_experts_per_tok=4, first_k_dense_replace=0,
            topk_method="group_limited_top2", scoring_func="softmax", q_lora_rank=1024, kv_lora_rank=256,
            qk_nope_head_dim=64, qk_rope_head_dim=64, v_head_dim=128, max_position_embeddings=1048576,
            rope_scaling=Yarn(factor=128.0, original_max_position_embeddings=8192, llama_4_scaling_beta=0.1),
        ),
    }  # fmt: skip

    def read(self, config: Mapping[str, Any]) -> dict[str, Any]:
        values = super().read(config)
        return values | {"first_k_dense_replace": values.get("first_k_dense_replace", 0)}

    def read_rope(self, config: Mapping[str, Any]) -> dict[str, Any]:
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        require(isinstance(rope, dict), "rope_parameters", rope, "must be an object")
        rope = {name: value for name, value in rope.items() if name != "max_position_embeddings"}
        partial = rope.pop("partial_rotary_factor", None)
        widths = [config.get(name) for name in ("qk_rope_head_dim", "qk_nope_head_dim")]
        R, N = (n if isinstance(n, int) else 0 for n in widths)
        ok = partial is None or (isinstance(partial, float | int) and abs(partial * (R + N) - R) < 1e-3)
        fix = "is qk_rope_head_dim / (qk_nope_head_dim + qk_rope_head_dim) in this architecture"
        require(ok, "rope_parameters.partial_rotary_factor", partial, fix)
        return super().read_rope({"rope_theta": config.get("rope_theta"), "rope_scaling": rope})

    def write(self, cfg: ModelConfig) -> dict[str, Any]:
        config, R = super().write(cfg), cfg.qk_rope_head_dim
        assert cfg.rope_scaling  # `check`
        config["rope_parameters"] = {
            "rope_type": "yarn", "rope_theta": config.pop("rope_theta"), **dataclasses.asdict(cfg.rope_scaling),
            "partial_rotary_factor": R / (R + cfg.qk_nope_head_dim),
        }  # fmt: skip
        del config["rope_scaling"], config["topk_method"], config["scoring_func"]
        return config

    def check(self, cfg: ModelConfig) -> None:
        super().check(cfg)
        require_field(cfg, "rope_scaling", cfg.rope_scaling is not None, "mistral4 has YaRN; its factor may be 1")


ARCHITECTURE = Mistral4()
