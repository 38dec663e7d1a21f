"""The model configuration, with the field names of a Hugging Face `config.json`, and presets of released models."""

import dataclasses
import math
import typing
from collections.abc import Mapping
from typing import Any, Literal

from mla_moe.config.errors import ConfigError, require, require_each, structure
from mla_moe.config.resume import field


@dataclasses.dataclass(frozen=True)
class Yarn:
    """YaRN context extension (arXiv 2309.00071), as in `rope_scaling` of DeepSeek's `config.json`."""

    factor: float
    """Context length divided by the original context length."""
    original_max_position_embeddings: int
    """Context length of the training before the extension."""
    beta_fast: float = 32.0
    """Dimensions with more rotations than this over the original context keep their frequency."""
    beta_slow: float = 1.0
    """Dimensions with fewer rotations than this have their frequency divided by `factor`."""
    mscale: float = 1.0
    """Coefficient of the scale of the rotary part of queries and keys."""
    mscale_all_dim: float = 1.0
    """Coefficient of the softmax scale."""

    def __post_init__(self):
        names = "factor beta_fast beta_slow"
        require_each(self, "rope_scaling", names, lambda x: 0 < x < math.inf, "a positive number")
        if self.factor < 1:
            raise ConfigError("rope_scaling.factor", self.factor, "a context extension is at least 1")
        if self.original_max_position_embeddings < 1:
            raise ConfigError(
                "rope_scaling.original_max_position_embeddings",
                self.original_max_position_embeddings,
                "set the context length of the training before the extension",
            )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A model of the DeepSeek family. Field names and meanings are those of the released `config.json` files."""

    vocab_size: int
    """Number of token ids."""
    hidden_size: int
    """Width of the residual stream."""
    num_hidden_layers: int
    """Transformer layers, without the MTP module."""
    num_attention_heads: int
    """Attention heads."""
    intermediate_size: int
    """Hidden width of the MLP in dense layers."""
    moe_intermediate_size: int
    """Hidden width of one expert."""
    n_routed_experts: int
    """Routed experts per MoE layer."""
    num_experts_per_tok: int
    """Routed experts per token (top-k)."""
    n_shared_experts: int = 1
    """Shared experts, which process every token."""
    first_k_dense_replace: int = 1
    """Number of first layers with a dense MLP instead of a mixture of experts."""
    kv_lora_rank: int = 512
    """Width of the key-value latent, which the KV cache stores (MLA)."""
    q_lora_rank: int | None = None
    """Width of the query latent; None projects queries directly."""
    qk_nope_head_dim: int = 128
    """Width per head of queries and keys without rotary embedding."""
    qk_rope_head_dim: int = 64
    """Width per head of queries and keys with rotary embedding. All heads share these keys."""
    v_head_dim: int = 128
    """Width per head of values."""
    scoring_func: Literal["sigmoid", "softmax"] = "sigmoid"
    """Router scores: sigmoid (V3) or softmax (V2)."""
    topk_method: Literal["noaux_tc", "greedy", "group_limited_greedy"] = "noaux_tc"
    """Expert selection: noaux_tc (V3: scores plus router bias, limited to groups), greedy, or group_limited_greedy."""
    n_group: int = 1
    """Groups of experts for group-limited routing."""
    topk_group: int = 1
    """Groups per token from which experts are selected."""
    norm_topk_prob: bool = True
    """Normalize the routing weights of a token's experts to sum 1."""
    routed_scaling_factor: float = 1.0
    """Factor on the routing weights."""
    max_position_embeddings: int = field(4096, init_from="may_differ")
    """Context length: longest sequence."""
    rope_theta: float = field(10_000.0, init_from="may_differ")
    """Base of the rotary frequencies."""
    rope_scaling: Yarn | None = field(None, init_from="may_differ")
    """YaRN context extension, or None."""
    rms_norm_eps: float = 1e-6
    """Added to the mean square in RMSNorm."""
    initializer_range: float = field(0.006, init_from="may_differ")
    """Standard deviation of the initial weights."""
    num_nextn_predict_layers: int = field(0, init_from="may_differ", full_state="equal")
    """Multi-token-prediction (MTP) modules after the last layer: 0 or 1."""
    mtp_shares_embedding: bool = True
    """Whether the MTP module uses the model's embedding and output head, as in the paper, or has its own."""

    def __post_init__(self):
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            may_be_zero = f.name in ("n_shared_experts", "first_k_dense_replace", "num_nextn_predict_layers")
            if f.type in (int, int | None) and value is not None:
                minimum = 0 if may_be_zero else 1
                require(minimum <= value < 1 << 31, f.name, value, "a size is a positive integer below 2**31")
            if typing.get_origin(f.type) is Literal:
                structure(f.type, value, f.name)
            if f.type is float:
                require(0 < value < math.inf, f.name, value, "a positive number")
        if self.num_experts_per_tok > self.n_routed_experts:
            raise ConfigError(
                "num_experts_per_tok",
                self.num_experts_per_tok,
                f"choose at most n_routed_experts = {self.n_routed_experts}",
            )
        if self.first_k_dense_replace > self.num_hidden_layers:
            raise ConfigError(
                "first_k_dense_replace",
                self.first_k_dense_replace,
                f"at most num_hidden_layers = {self.num_hidden_layers}",
            )
        if self.n_routed_experts % self.n_group:
            raise ConfigError("n_group", self.n_group, f"must divide n_routed_experts = {self.n_routed_experts}")
        if self.topk_group > self.n_group:
            raise ConfigError("topk_group", self.topk_group, f"at most n_group = {self.n_group}")
        reachable = self.topk_group * (self.n_routed_experts // self.n_group)
        if self.topk_method != "greedy" and self.num_experts_per_tok > reachable:
            raise ConfigError(
                "num_experts_per_tok",
                self.num_experts_per_tok,
                f"at most {reachable}: the experts in the {self.topk_group} selected groups",
            )
        if self.topk_method == "noaux_tc" and self.n_group > 1 and self.n_routed_experts // self.n_group < 2:
            raise ConfigError(
                "n_group", self.n_group, "the score of a group is that of its two best experts: give each at least 2"
            )
        if (self.topk_method == "noaux_tc") != (self.scoring_func == "sigmoid"):
            raise ConfigError(
                "scoring_func", self.scoring_func, "noaux_tc goes with sigmoid, the V2 methods with softmax"
            )
        if self.scoring_func == "softmax" and self.norm_topk_prob:
            raise ConfigError("norm_topk_prob", True, "softmax gates (V2) do not normalise: set it to false")
        if self.qk_rope_head_dim % 2:
            raise ConfigError(
                "qk_rope_head_dim", self.qk_rope_head_dim, "rotary embedding rotates pairs: use an even width"
            )
        if self.num_nextn_predict_layers > 1:
            raise ConfigError("num_nextn_predict_layers", self.num_nextn_predict_layers, "0 or 1 MTP module")

    @property
    def num_moe_layers(self) -> int:
        return self.num_hidden_layers - self.first_k_dense_replace

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "ModelConfig":
        """Read the contents of a Hugging Face `config.json` (DeepSeek-V2, V3, R1, Moonlight, Kimi-K2).

        The model's name is not used. Raises `ConfigError` for a missing field, and for a value that is not part of the
        family's architecture.
        """
        kind = config.get("model_type")
        require(kind in _FAMILY, "model_type", kind, f"another architecture; supported are {', '.join(_FAMILY[1:])}")
        for name, only in (("hidden_act", "silu"), ("tie_word_embeddings", False), ("attention_bias", False),
                           ("moe_layer_freq", 1), ("ep_size", 1), ("rope_interleave", True)):  # fmt: skip
            if config.get(name, only) not in (only, None):
                raise ConfigError(name, config[name], f"only {only!r} is part of this architecture")
        method = config.get("topk_method") or ("greedy" if kind == "deepseek_v2" else "noaux_tc")
        if method == "noaux_tc":  # they cannot be derived from tensors
            for name in ("routed_scaling_factor", "n_group", "topk_group"):
                require(config.get(name) is not None, f"config.json.{name}", None, "is required")
        values = {f.name: config[f.name] for f in dataclasses.fields(cls) if config.get(f.name) is not None}
        values |= {
            "topk_method": method,
            "scoring_func": config.get("scoring_func") or ("sigmoid" if method == "noaux_tc" else "softmax"),
            "norm_topk_prob": config.get("norm_topk_prob", method == "noaux_tc"),
        }
        # transformers 5 writes `rope_parameters`, which includes theta; the released files have `rope_scaling`.
        rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
        require(isinstance(rope, dict), "rope_scaling", rope, "an object")
        rope = dict(rope)
        values["rope_theta"] = rope.pop("rope_theta", values.get("rope_theta", 10_000.0))
        scaling = rope.pop("type", None) or rope.pop("rope_type", None) or "default"
        if scaling not in ("default", "yarn"):
            raise ConfigError("rope_scaling.type", scaling, "use 'yarn' or no scaling")
        values["rope_scaling"] = None
        if config.get("n_shared_experts", 1) is None:
            values["n_shared_experts"] = 0
        for name, only in (("attention_factor", None), ("truncate", True), ("partial_rotary_factor", 1)):
            if rope.get(name, only) not in (only, None):
                raise ConfigError(f"rope_scaling.{name}", rope[name], "is not part of this architecture")
        if scaling == "yarn" and "original_max_position_embeddings" not in rope:
            raise ConfigError("rope_scaling.original_max_position_embeddings", None, "YaRN needs the original length")
        if scaling == "yarn":
            known = {f.name for f in dataclasses.fields(Yarn)}
            given = {name: value for name, value in rope.items() if name in known and value is not None}
            values["rope_scaling"] = {"mscale_all_dim": 0.0} | given  # the default of transformers
        if method == "greedy":  # V2 files with greedy selection name groups, but do not use them
            values["n_group"] = values["topk_group"] = 1
        return structure(cls, values, "config.json")

    def to_hf(self) -> dict[str, Any]:
        """The contents of a `config.json` for `transformers`, vLLM and SGLang. `from_hf` reads back an equal model."""
        v2 = self.scoring_func == "softmax"
        config = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        config["rope_scaling"] = (
            {"type": "yarn", **dataclasses.asdict(self.rope_scaling)} if self.rope_scaling else None
        )
        if self.mtp_shares_embedding:
            del config["mtp_shares_embedding"]  # the released architecture, which has no such field
        return config | {
            "architectures": ["DeepseekV2ForCausalLM" if v2 else "DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v2" if v2 else "deepseek_v3",
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "attention_bias": False,
            "moe_layer_freq": 1,
            "num_key_value_heads": self.num_attention_heads,
        }


_FAMILY = (None, "deepseek_v2", "deepseek_v3", "kimi_k2")
"""Values of `model_type`."""


def _yarn40(mscale: float) -> Yarn:
    return Yarn(factor=40.0, original_max_position_embeddings=4096, mscale=mscale, mscale_all_dim=mscale)


_V2: dict[str, Any] = dict(
    vocab_size=102400, scoring_func="softmax", norm_topk_prob=False, n_shared_experts=2, num_experts_per_tok=6,
    max_position_embeddings=163840, rope_scaling=_yarn40(0.707),
)  # fmt: skip

PRESETS: dict[str, ModelConfig] = {
    "tiny": ModelConfig(
        vocab_size=512, hidden_size=128, num_hidden_layers=3, num_attention_heads=4, intermediate_size=384,
        moe_intermediate_size=96, n_routed_experts=8, num_experts_per_tok=2, q_lora_rank=64, kv_lora_rank=32,
        qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32, n_group=2, topk_group=1, routed_scaling_factor=2.5,
        max_position_embeddings=2048, initializer_range=0.02, num_nextn_predict_layers=1,
    ),
    "deepseek-v2-lite": ModelConfig(
        **_V2, hidden_size=2048, num_hidden_layers=27, num_attention_heads=16, intermediate_size=10944,
        moe_intermediate_size=1408, n_routed_experts=64, topk_method="greedy",
    ),
    "deepseek-v2": ModelConfig(
        **_V2, hidden_size=5120, num_hidden_layers=60, num_attention_heads=128, intermediate_size=12288,
        moe_intermediate_size=1536, n_routed_experts=160, topk_method="group_limited_greedy", n_group=8, topk_group=3,
        routed_scaling_factor=16.0, q_lora_rank=1536,
    ),
    "deepseek-v3": ModelConfig(
        vocab_size=129280, hidden_size=7168, num_hidden_layers=61, num_attention_heads=128, intermediate_size=18432,
        moe_intermediate_size=2048, n_routed_experts=256, num_experts_per_tok=8, first_k_dense_replace=3, n_group=8,
        topk_group=4, routed_scaling_factor=2.5, q_lora_rank=1536, max_position_embeddings=163840,
        rope_scaling=_yarn40(1.0), num_nextn_predict_layers=1,
    ),
    "moonlight-16b-a3b": ModelConfig(
        vocab_size=163840, hidden_size=2048, num_hidden_layers=27, num_attention_heads=16, intermediate_size=11264,
        moe_intermediate_size=1408, n_routed_experts=64, num_experts_per_tok=6, n_shared_experts=2,
        routed_scaling_factor=2.446, max_position_embeddings=8192, rope_theta=50_000.0, rms_norm_eps=1e-5,
    ),
    "kimi-k2": ModelConfig(
        vocab_size=163840, hidden_size=7168, num_hidden_layers=61, num_attention_heads=64, intermediate_size=18432,
        moe_intermediate_size=2048, n_routed_experts=384, num_experts_per_tok=8, routed_scaling_factor=2.827,
        q_lora_rank=1536, max_position_embeddings=131072, rope_theta=50_000.0,
        rope_scaling=Yarn(factor=32.0, original_max_position_embeddings=4096, beta_fast=1.0, beta_slow=1.0),
    ),
}  # fmt: skip


def preset(name: str) -> ModelConfig:
    """The configuration of a released model, from `PRESETS`. Raises `ConfigError` with the choices for another name."""
    if name not in PRESETS:
        raise ConfigError("preset", name, f"choose one of {', '.join(PRESETS)}")
    return PRESETS[name]
