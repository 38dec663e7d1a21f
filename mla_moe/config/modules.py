"""The settings of attention and of a mixture of experts alone: the fields that `ModelConfig` yields for its layers."""

import dataclasses
import math
import typing
from collections.abc import Callable
from typing import Any, Literal

from mla_moe.config.errors import MAX_SIZE, require, require_field, structure
from mla_moe.config.rope import RopeScaling


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Multi-head latent attention. Defaults are DeepSeek-V3's widths per head."""

    hidden_size: int
    """Width of the input and of the output."""
    num_heads: int
    """Attention heads."""
    kv_lora_rank: int = 512
    """Width of the key-value latent, which the KV cache stores."""
    q_lora_rank: int | None = None
    """Width of the query latent; None projects queries directly."""
    qk_nope_head_dim: int = 128
    """Width per head of queries and keys without rotary embedding."""
    qk_rope_head_dim: int = 64
    """Width per head of queries and keys with rotary embedding. All heads share these keys."""
    v_head_dim: int = 128
    """Width per head of values."""
    rope_theta: float | None = 10_000.0
    """Base of the rotary frequencies; None rotates nothing."""
    rope_scaling: RopeScaling | None = None
    """Context extension of the rotary embedding: `LinearScaling`, `Yarn`, `Llama3Scaling`, or None."""
    rope_interleave: bool = True
    """Rotary embedding rotates the pairs (2i, 2i + 1) of the width; false: (i, i + R / 2), its halves."""
    mla_scale_q_lora: bool = False
    """Multiply the query latent by √(hidden_size / q_lora_rank), behind its norm (LongCat-Flash)."""
    mla_scale_kv_lora: bool = False
    """Multiply the key-value latent by √(hidden_size / kv_lora_rank), behind its norm."""
    causal: bool = True
    """Whether a token attends to itself and earlier ones only."""
    sliding_window: int | None = None
    """A token attends to the last so many tokens, its own included; if not causal, to those at most so far away."""
    dropout: float = 0.0
    """Probability that an attention weight is dropped in training."""
    index_topk: int | None = None
    """Keys per query that an indexer selects (DeepSeek Sparse Attention, DSA); None attends to all."""
    index_n_heads: int = 64
    """Heads of the indexer."""
    index_head_dim: int = 128
    """Width per head of the indexer's queries and keys, of which the first `qk_rope_head_dim` are rotated."""
    indexer_rope_interleave: bool = False
    """`rope_interleave` of the indexer."""
    initializer_range: float = 0.006
    """Standard deviation of the initial weights."""

    def __post_init__(self):
        require_values(self, may_be_zero=("dropout",))
        require_field(self, "dropout", self.dropout < 1, "must be a probability below 1")
        message = "rotary embedding rotates pairs: use an even width"
        require_field(self, "qk_rope_head_dim", self.qk_rope_head_dim % 2 == 0, message)
        ok = self.rope_scaling is None or isinstance(self.rope_scaling, RopeScaling)
        require_field(self, "rope_scaling", ok, "is read by mla_moe.rope_scaling({…}): give what that returns")
        message = "scales rotary frequencies: set rope_theta"
        require_field(self, "rope_scaling", self.rope_theta is not None or self.rope_scaling is None, message)
        message = "scales the query latent: set q_lora_rank"
        require_field(self, "mla_scale_q_lora", self.q_lora_rank is not None or not self.mla_scale_q_lora, message)
        if self.index_topk is not None:
            message = "an indexer reads the query latent: set q_lora_rank, or no index_topk"
            require_field(self, "q_lora_rank", self.q_lora_rank is not None, message)
            require_field(self, "causal", self.causal, "an indexer selects among earlier tokens; set no index_topk")
            message = f"must be above qk_rope_head_dim = {self.qk_rope_head_dim}, the part that is rotated"
            require_field(self, "index_head_dim", self.index_head_dim > self.qk_rope_head_dim, message)


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """A mixture of experts and its router. Defaults are DeepSeek-V3's router without groups."""

    hidden_size: int
    """Width of the input and of the output."""
    num_experts: int
    """Routed experts."""
    num_experts_per_tok: int = 2
    """Routed experts per token (top-k)."""
    zero_expert_num: int = 0
    """Zero-computation experts, which return their input: the router selects among them too, as the experts behind the
    routed ones (LongCat-Flash, arXiv 2509.01322, section 2.1)."""
    moe_intermediate_size: int | None = None
    """Hidden width of one expert; None is `hidden_size`."""
    n_shared_experts: int = 0
    """Shared experts, which process every token: one MLP of so many times the width."""
    hidden_act: str | Callable[[Any], Any] = "silu"
    """Activation of an expert's gate: a name of `ops.experts.ACTIVATIONS`, or an elementwise function of an array."""
    scoring_func: Literal["sigmoid", "softmax"] = "sigmoid"
    """Router scores: sigmoid (V3) or softmax over all experts (V2)."""
    router_bias: bool = True
    """Whether the router has a bias per expert, which affects the selection only (auxiliary-loss-free balancing)."""
    n_group: int = 1
    """Groups of experts for group-limited routing."""
    topk_group: int = 1
    """Groups per token from which experts are selected."""
    group_score: Literal["top2", "max"] = "top2"
    """The score of a group: the sum of its two best experts (V3), or its best (V2)."""
    norm_topk_prob: bool = True
    """Normalize the routing weights of a token's experts to sum 1."""
    routed_scaling_factor: float = 1.0
    """Factor on the routing weights."""
    initializer_range: float = 0.006
    """Standard deviation of the initial weights."""

    @property
    def expert_width(self) -> int:
        """The hidden width of one expert."""
        return self.moe_intermediate_size or self.hidden_size

    @property
    def router_width(self) -> int:
        """Experts that the router selects among: routed ones, then zero-computation ones."""
        return self.num_experts + self.zero_expert_num

    def __post_init__(self):
        require_values(self, may_be_zero=("n_shared_experts", "zero_expert_num"))
        E, K, G = self.router_width, self.num_experts_per_tok, self.n_group
        require_field(self, "zero_expert_num", G == 1 or not self.zero_expert_num, "needs a router without groups")
        require_field(self, "num_experts_per_tok", K <= E, f"choose at most the number of experts, {E}")
        require_field(self, "n_group", E % G == 0, f"must divide the number of experts, {E}")
        require_field(self, "topk_group", self.topk_group <= G, f"must be at most n_group = {G}")
        reachable = self.topk_group * (E // G)
        message = f"must be at most {reachable}: the experts in the {self.topk_group} selected groups"
        require_field(self, "num_experts_per_tok", reachable >= K, message)
        message = "the score of a group is that of its two best experts: give each at least 2"
        require_field(self, "n_group", self.group_score != "top2" or G == 1 or E // G >= 2, message)


def require_values(config: Any, may_be_zero: tuple[str, ...] = ()) -> None:
    """Raise `ConfigError` for the first size that is no positive integer, number that is not positive, and name that is
    none of its choices."""
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if f.type in (int, int | None) and value is not None:
            minimum = 0 if f.name in may_be_zero else 1
            ok = isinstance(value, int) and minimum <= value <= MAX_SIZE
            require(ok, f.name, value, "a size is a positive integer below 2**31")
        if typing.get_origin(f.type) is Literal:
            structure(f.type, value, f.name)
        if f.type in (float, float | None) and value is not None:
            ok = 0 < value < math.inf or (value == 0 and f.name in may_be_zero)
            require(ok, f.name, value, "must be a positive number")
