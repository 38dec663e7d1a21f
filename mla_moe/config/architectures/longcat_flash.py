"""LongCat-Flash (Meituan, arXiv 2509.01322): pairs of layers with dense MLPs and a mixture of experts beside them.

A layer of its files is a pair of layers here. Released with it is a layer of multi-token prediction, `model.mtp`, of a
dense MLP and an embedding of its own: transformers 5.24.0 does not use it and neither does this; conversions keep it.

transformers scales latents whatever `mla_scale_q_lora` and `mla_scale_kv_lora` say; here they count, as in the release.
It also has gate and up projections of zero-computation experts, which nothing computes with and released files are
without: it loads none of them unless `LongcatFlashExperts.gate_up_proj` is cut to `n_routed_experts`. Files that it
has written have these tensors too; they are kept and not used.
"""

import re
from collections.abc import Mapping
from typing import Any

from mla_moe.config.architectures.architecture import Architecture
from mla_moe.config.errors import require, require_field
from mla_moe.config.model import ModelConfig

_NAMES = {
    "ffn_hidden_size": "intermediate_size", "expert_ffn_hidden_size": "moe_intermediate_size",
    "moe_topk": "num_experts_per_tok",
}  # fmt: skip
"""Fields of `config.json` that have another name in a `ModelConfig`."""
_LAYERS = {
    "moe_shortcut": True, "first_k_dense_replace": 0, "n_shared_experts": 0, "num_nextn_predict_layers": 0,
    "n_group": 1, "topk_group": 1,
}  # fmt: skip
"""Fields of a `ModelConfig` that have one value in this architecture and that its `config.json` does not have."""


class LongcatFlash(Architecture):
    model_type = "longcat_flash"
    hf_class = "LongcatFlashForCausalLM"
    models = "LongCat-Flash"
    differs = "experts beside pairs of dense layers, some without computation; softmax and bias; scaled latents"
    fixed: Mapping[str, Any] = {
        "hidden_act": "silu", "attention_bias": False, "attention_method": "MLA", "router_bias": False,
        "zero_expert_type": "identity",
    }  # fmt: skip
    router: Mapping[str, Any] = {"topk_method": "noaux_tc", "scoring_func": "softmax", "norm_topk_prob": False}
    extensions = ("mla_scale_q_lora", "mla_scale_kv_lora", "zero_expert_num", "moe_shortcut")
    reads = ("num_layers", "router_dtype")
    required = ("num_layers", "routed_scaling_factor", "zero_expert_num", "q_lora_rank")
    defaults: Mapping[str, Any] = {
        "rms_norm_eps": 1e-5, "rope_theta": 10_000_000.0, "mla_scale_q_lora": True, "mla_scale_kv_lora": True,
    }  # fmt: skip
    """Fields of `config.json` whose default in transformers is not that of `ModelConfig`."""
    unused_modules = ("model.mtp",)
    presets: Mapping[str, Mapping[str, Any]] = {
        "longcat-flash": dict(
            **_LAYERS, vocab_size=131072, hidden_size=6144, num_hidden_layers=56, num_attention_heads=64,
            intermediate_size=12288, moe_intermediate_size=2048, n_routed_experts=512, zero_expert_num=256,
            num_experts_per_tok=12, scoring_func="softmax", norm_topk_prob=False, routed_scaling_factor=6.0,
            q_lora_rank=1536, mla_scale_q_lora=True, mla_scale_kv_lora=True, max_position_embeddings=131072,
            rope_theta=10_000_000.0, rms_norm_eps=1e-5,
        ),
    }  # fmt: skip

    def read(self, config: Mapping[str, Any]) -> dict[str, Any]:
        pairs, layers = config.get("num_layers"), config.get("num_hidden_layers")
        require(type(pairs) is int and pairs > 0, "config.json.num_layers", pairs, "a positive integer is required")
        assert isinstance(pairs, int)
        ok = layers in (None, pairs, 2 * pairs)
        require(ok, "num_hidden_layers", layers, f"num_layers = {pairs}, or twice as many, in this architecture")
        given = {_NAMES.get(name, name): value for name, value in config.items() if value is not None}
        return super().read({**self.defaults, **given, "num_hidden_layers": 2 * pairs, **_LAYERS})

    def write(self, cfg: ModelConfig) -> dict[str, Any]:
        config, names = super().write(cfg), {ours: theirs for theirs, ours in _NAMES.items()}
        left_out = {*_LAYERS, *self.router, "num_hidden_layers"}
        written = {names.get(name, name): value for name, value in config.items() if name not in left_out}
        return written | {"num_layers": cfg.num_moe_layers, "head_dim": cfg.qk_rope_head_dim}

    def check(self, cfg: ModelConfig) -> None:
        super().check(cfg)
        for name, only in _LAYERS.items():
            require_field(cfg, name, getattr(cfg, name) == only, f"longcat_flash has {only!r}; see model_type")
        require_field(cfg, "q_lora_rank", cfg.q_lora_rank is not None, "longcat_flash has a query latent")

    def is_unused(self, cfg: ModelConfig, name: str) -> bool:
        match = re.fullmatch(r"model\.layers\.\d+\.mlp\.experts\.(\d+)\.(gate|up)_proj\.weight", name)
        return super().is_unused(cfg, name) or (match is not None and int(match[1]) >= cfg.n_routed_experts)

    def tensor_name(self, name: str) -> str:
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.*)", name)
        if match is None:
            return name
        (pair, which), rest = divmod(int(match[1]), 2), match[2]
        if rest.startswith("self_attn."):
            rest = rest.replace(".", f".{which}.", 1)
        elif "norm." in rest:
            rest = rest.replace(".", f".{which}.")
        elif rest == "mlp.gate.weight":
            rest = "mlp.router.classifier.weight"
        elif rest.startswith("mlp.gate."):
            rest = rest.replace("gate", "router", 1)
        elif not rest.startswith("mlp.experts."):
            rest = rest.replace("mlp.", f"mlps.{which}.", 1)
        return f"model.layers.{pair}.{rest}"


ARCHITECTURE = LongcatFlash()
