"""The model configuration, with the field names of a Hugging Face `config.json`."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mla_moe.config.errors import require, require_field, structure
from mla_moe.config.files import read_json_object
from mla_moe.config.hub import is_hub_id
from mla_moe.config.modules import AttentionConfig, MoEConfig, require_values
from mla_moe.config.resume import field
from mla_moe.config.rope import Yarn
from mla_moe.config.storage import is_url, local_file

if TYPE_CHECKING:
    from mla_moe.config.architectures import Architecture


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A model of the MLA and MoE family. Field names and meanings are those of the released `config.json` files."""

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
    zero_expert_num: int = 0
    """Zero-computation experts, which return their input: the router selects among them too."""
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
    topk_method: Literal["noaux_tc", "greedy", "group_limited_greedy", "group_limited_top2"] = "noaux_tc"
    """Expert selection: noaux_tc (V3: scores plus router bias, limited to the groups with the best two experts),
    group_limited_top2 (the same without bias), greedy, or group_limited_greedy (V2: groups with the best expert)."""
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
    rope_interleave: bool = True
    """Rotary embedding rotates the pairs (2i, 2i + 1) of the width; false: (i, i + R / 2), its halves."""
    mla_scale_q_lora: bool = False
    """Multiply the query latent by √(hidden_size / q_lora_rank), behind its norm."""
    mla_scale_kv_lora: bool = False
    """Multiply the key-value latent by √(hidden_size / kv_lora_rank), behind its norm."""
    rms_norm_eps: float = 1e-6
    """Added to the mean square in RMSNorm."""
    post_mlp_norm: bool = False
    """RMSNorm on the output of each mixture of experts, shared experts included."""
    moe_shortcut: bool = False
    """Shortcut-connected MoE: all layers have dense MLPs, and each pair of layers a mixture of experts beside. It reads
    what the MLP of the first layer does, and its output is added to that of the second."""
    index_topk: int | None = None
    """Keys per query that an indexer selects (DeepSeek Sparse Attention, DSA); None attends to all."""
    index_n_heads: int = 64
    """Heads of the indexer."""
    index_head_dim: int = 128
    """Width per head of the indexer's queries and keys, of which the first `qk_rope_head_dim` are rotated."""
    indexer_rope_interleave: bool = False
    """`rope_interleave` of the indexer."""
    indexer_types: tuple[Literal["full", "shared"], ...] | None = None
    """For each layer whether it has an indexer (full), or uses the keys that the layer before it does (shared); None:
    all have one. The MTP module has its own."""
    initializer_range: float = field(0.006, init_from="may_differ")
    """Standard deviation of the initial weights."""
    num_nextn_predict_layers: int = field(0, init_from="may_differ", full_state="equal")
    """Multi-token-prediction (MTP) modules after the last layer: 0 or 1."""
    mtp_shares_embedding: bool = True
    """Whether the MTP module uses the model's embedding and output head, as in the paper, or has its own."""
    tie_word_embeddings: bool = False
    """Whether the output head is the transposed token embedding."""
    model_type: str | None = None
    """Architecture of `config.json`, from the registry `config.architectures`; None: DeepSeek-V2 or V3, by the router's
    scores. It says how a checkpoint is read and written: the other fields say what a model computes."""

    def __post_init__(self):
        zero = "n_shared_experts", "zero_expert_num", "first_k_dense_replace", "num_nextn_predict_layers"
        require_values(self, may_be_zero=zero)
        L = self.num_hidden_layers
        if self.moe_shortcut:
            fix = "must be 0: every pair of layers has a mixture of experts (moe_shortcut)"
            require_field(self, "first_k_dense_replace", self.first_k_dense_replace == 0, fix)
            require_field(self, "num_hidden_layers", L % 2 == 0, "must be even: moe_shortcut has pairs of layers")
            require_field(self, "index_topk", self.index_topk is None, "no layers of moe_shortcut have an indexer")
            require_field(self, "post_mlp_norm", not self.post_mlp_norm, "no layers of moe_shortcut have this norm")
        ok = self.first_k_dense_replace <= L
        require_field(self, "first_k_dense_replace", ok, f"must be at most num_hidden_layers = {L}")
        require_field(self, "num_nextn_predict_layers", self.num_nextn_predict_layers <= 1, "0 or 1 MTP module")
        if self.indexer_types is not None:
            require_field(self, "indexer_types", self.index_topk is not None, "needs an indexer; set index_topk")
            ok = len(self.indexer_types) == L and self.indexer_types[0] == "full"
            require_field(self, "indexer_types", ok, f"full or shared for each of {L} layers, the first full")
            known = set(self.indexer_types) == {"full", "shared"}
            require_field(self, "indexer_types", known, "only full and shared, and None where no layer is shared")
        self.architecture.check(self)
        _ = self.attention, self.moe  # which check what remains

    @property
    def layers_per_moe(self) -> int:
        """Layers that a mixture of experts belongs to."""
        return 2 if self.moe_shortcut else 1

    @property
    def num_moe_layers(self) -> int:
        return (self.num_hidden_layers - self.first_k_dense_replace) // self.layers_per_moe

    @property
    def has_experts(self) -> bool:
        return self.num_moe_layers + self.num_nextn_predict_layers > 0

    @property
    def shared_indexers(self) -> tuple[bool, ...]:
        """For each layer whether it uses the keys that the layer before it does."""
        return tuple(kind == "shared" for kind in self.indexer_types or ("full",) * self.num_hidden_layers)

    @property
    def attention(self) -> AttentionConfig:
        """The attention of every layer."""
        same = {f.name: getattr(self, f.name) for f in dataclasses.fields(AttentionConfig) if hasattr(self, f.name)}
        return AttentionConfig(num_heads=self.num_attention_heads, **same)

    @property
    def moe(self) -> MoEConfig:
        """The mixture of experts of every MoE layer."""
        same = {f.name: getattr(self, f.name) for f in dataclasses.fields(MoEConfig) if hasattr(self, f.name)}
        if self.topk_method == "greedy":
            same |= {"n_group": 1, "topk_group": 1}
        same |= {"group_score": "max" if self.topk_method == "group_limited_greedy" else "top2"}
        return MoEConfig(num_experts=self.n_routed_experts, router_bias=self.topk_method == "noaux_tc", **same)

    @property
    def architecture(self) -> "Architecture":
        """The entry of the registry that reads and writes this model."""
        return _architecture(self.model_type or ("deepseek_v2" if self.scoring_func == "softmax" else "deepseek_v3"))

    @classmethod
    def from_hf(cls, config: Mapping[str, Any] | str | Path) -> "ModelConfig":
        """Read a Hugging Face `config.json`: its contents, its path, the path of its directory, or a model of the Hub
        as `ORG/NAME` or `hf://ORG/NAME@REVISION`.

        Any architecture in `config.architectures`; without `model_type` it is DeepSeek-V3's. Raises `ConfigError` for a
        missing field, and for a value that is not part of the architecture. Other fields that the model does not use
        are logged by name, unless they have no effect.
        """
        if isinstance(config, str | Path):
            url = f"hf://{config}" if is_hub_id(config) else config
            path = local_file(url, "config.json", "config.json") if is_url(url) else Path(config)
            config = read_json_object(path / "config.json" if path.is_dir() else path, "config.json")
        require(isinstance(config, Mapping), "config.json", config, "give its contents, its path, or its directory")
        model_type = config.get("model_type")
        architecture = _architecture("deepseek_v3" if model_type is None else model_type)
        return structure(cls, architecture.read(config), "config.json")

    def to_hf(self) -> dict[str, Any]:
        """The contents of a `config.json` for `transformers`, vLLM and SGLang. `from_hf` reads back an equal model."""
        return self.architecture.write(self)


def _architecture(model_type: Any) -> "Architecture":
    from mla_moe.config.architectures import find_architecture  # it describes ModelConfig, and imports it

    return find_architecture(model_type)
