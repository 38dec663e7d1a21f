"""What a model is: one frozen dataclass with the field names of a Hugging Face `config.json`, and the presets."""

import dataclasses
import math
import typing
from collections.abc import Mapping
from typing import Any, Literal

from mla_moe.config.errors import ConfigError, require, structure


@dataclasses.dataclass(frozen=True)
class Yarn:
    """YaRN context extension (arXiv 2309.00071), as in `rope_scaling` of DeepSeek's `config.json`."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0

    def __post_init__(self):
        for name in ("factor", "beta_fast", "beta_slow"):
            value = getattr(self, name)
            require(0 < value < math.inf, f"rope_scaling.{name}", value, "a positive number")
        if self.factor < 1:
            raise ConfigError("rope_scaling.factor", self.factor, "a context extension is at least 1")
        if self.original_max_position_embeddings < 1:
            raise ConfigError(
                "rope_scaling.original_max_position_embeddings",
                self.original_max_position_embeddings,
                "give the length the model was first trained with",
            )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A DeepSeek-family model. Names and meanings are those of the released `config.json` files."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    """Width of the dense first layers' MLP."""
    moe_intermediate_size: int
    """Width of one expert."""
    n_routed_experts: int
    num_experts_per_tok: int
    n_shared_experts: int = 1
    first_k_dense_replace: int = 1
    """How many of the first layers have a dense MLP in place of experts."""
    kv_lora_rank: int = 512
    q_lora_rank: int | None = None
    """Width of the query latent; None projects queries directly."""
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    scoring_func: Literal["sigmoid", "softmax"] = "sigmoid"
    topk_method: Literal["noaux_tc", "greedy", "group_limited_greedy"] = "noaux_tc"
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    max_position_embeddings: int = 4096
    rope_theta: float = 10_000.0
    rope_scaling: Yarn | None = None
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.006
    num_nextn_predict_layers: int = 0
    """Multi-token-prediction modules after the last layer (0 or 1)."""
    mtp_shares_embedding: bool = True
    """Whether the prediction module uses the model's embedding and head, as in the paper, or has its own."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            zero_is_fine = field.name in ("n_shared_experts", "first_k_dense_replace", "num_nextn_predict_layers")
            if field.type in (int, int | None) and value is not None:
                least = 0 if zero_is_fine else 1
                require(least <= value < 1 << 31, field.name, value, "a size is a positive whole number, below 2**31")
            if typing.get_origin(field.type) is Literal:
                structure(field.type, value, field.name)
            if field.type is float:
                require(0 < value < math.inf, field.name, value, "a positive number")
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
                f"the {self.topk_group} chosen groups hold {reachable} experts",
            )
        if self.topk_method == "noaux_tc" and self.n_group > 1 and self.n_routed_experts // self.n_group < 2:
            raise ConfigError(
                "n_group", self.n_group, "a group is scored by its two best experts: give each at least 2"
            )
        if (self.topk_method == "noaux_tc") != (self.scoring_func == "sigmoid"):
            raise ConfigError(
                "scoring_func", self.scoring_func, "noaux_tc goes with sigmoid, the V2 methods with softmax"
            )
        if self.scoring_func == "softmax" and self.norm_topk_prob:
            raise ConfigError("norm_topk_prob", True, "softmax gates (V2) do not normalise: set it to false")
        if self.qk_rope_head_dim % 2:
            raise ConfigError(
                "qk_rope_head_dim", self.qk_rope_head_dim, "rotary embedding turns pairs: use an even width"
            )
        if self.num_nextn_predict_layers > 1:
            raise ConfigError("num_nextn_predict_layers", self.num_nextn_predict_layers, "0 or 1 prediction module")

    @property
    def num_moe_layers(self) -> int:
        return self.num_hidden_layers - self.first_k_dense_replace

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "ModelConfig":
        """Read the contents of a Hugging Face `config.json` (DeepSeek-V2, V3, R1, Moonlight, Kimi-K2).

        Everything is read from the file and nothing from the model's name. Raises `ConfigError` for a field that is
        missing or asks for something the family's architecture does not have.
        """
        kind = config.get("model_type")
        require(kind in _FAMILY, "model_type", kind, f"another architecture; this one has {', '.join(_FAMILY[1:])}")
        for field, only in (("hidden_act", "silu"), ("tie_word_embeddings", False), ("attention_bias", False),
                            ("moe_layer_freq", 1), ("ep_size", 1), ("rope_interleave", True)):  # fmt: skip
            if config.get(field, only) not in (only, None):
                raise ConfigError(field, config[field], f"only {only!r} is part of this architecture")
        method = config.get("topk_method") or ("greedy" if kind == "deepseek_v2" else "noaux_tc")
        if method == "noaux_tc":  # no tensor tells
            for field in ("routed_scaling_factor", "n_group", "topk_group"):
                require(config.get(field) is not None, f"config.json.{field}", None, "is required")
        values = {f.name: config[f.name] for f in dataclasses.fields(cls) if config.get(f.name) is not None}
        values |= {
            "topk_method": method,
            "scoring_func": config.get("scoring_func") or ("sigmoid" if method == "noaux_tc" else "softmax"),
            "norm_topk_prob": config.get("norm_topk_prob", method == "noaux_tc"),
        }
        # transformers 5 writes `rope_parameters`, with theta inside; the released files have `rope_scaling` beside it.
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
        for field, only in (("attention_factor", None), ("truncate", True), ("partial_rotary_factor", 1)):
            if rope.get(field, only) not in (only, None):
                raise ConfigError(f"rope_scaling.{field}", rope[field], "is not part of this architecture")
        if scaling == "yarn" and "original_max_position_embeddings" not in rope:
            raise ConfigError("rope_scaling.original_max_position_embeddings", None, "YaRN needs the original length")
        if scaling == "yarn":
            known = {f.name for f in dataclasses.fields(Yarn)}
            given = {name: value for name, value in rope.items() if name in known and value is not None}
            values["rope_scaling"] = {"mscale_all_dim": 0.0} | given  # as transformers has it where a file is silent
        if method == "greedy":  # the groups that a greedy V2 file names are not used
            values["n_group"] = values["topk_group"] = 1
        return structure(cls, values, "config.json")

    def to_hf(self) -> dict[str, Any]:
        """The contents of a `config.json` that `transformers`, vLLM and SGLang read, and `from_hf` reads back equal."""
        v2 = self.scoring_func == "softmax"
        config = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        config["rope_scaling"] = (
            {"type": "yarn", **dataclasses.asdict(self.rope_scaling)} if self.rope_scaling else None
        )
        if self.mtp_shares_embedding:
            del config["mtp_shares_embedding"]  # the released architecture, which names no such field
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
"""What `model_type` may be."""


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
    """A named configuration; `PRESETS` holds them all. Raises `ConfigError`, naming the choices, for another name."""
    if name not in PRESETS:
        raise ConfigError("preset", name, f"choose one of {', '.join(PRESETS)}")
    return PRESETS[name]
