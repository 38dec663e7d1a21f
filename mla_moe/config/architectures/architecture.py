"""What the registry knows of an architecture, and how DeepSeek-V2 and V3 read and write `config.json`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mla_moe.config.architectures.ignored import check_ignored
from mla_moe.config.errors import require, require_field
from mla_moe.config.model import ModelConfig
from mla_moe.config.rope import Yarn, rope_scaling

FIXED: Mapping[str, Any] = {
    "hidden_act": "silu", "attention_bias": False, "moe_layer_freq": 1,
}  # fmt: skip
"""Fields of `config.json` that have one value in most architectures."""
DSA = ("index_topk", "index_n_heads", "index_head_dim", "indexer_rope_interleave", "indexer_types")
"""The `EXTENSIONS` that describe the indexer of DeepSeek Sparse Attention."""
EXTENSIONS = (
    "rope_interleave", "mla_scale_q_lora", "mla_scale_kv_lora", "zero_expert_num", "moe_shortcut", "post_mlp_norm",
    *DSA,
)  # fmt: skip
"""Fields of `ModelConfig` that not every architecture has: at its default such a field changes nothing."""


class Architecture:
    """A `model_type` of `config.json`. A file in this package defines a subclass, and an instance `ARCHITECTURE`.

    What differs in the modules is said by fields of `ModelConfig`, which `read` sets: modules know no architecture.
    """

    model_type: str
    hf_class: str
    """The class of `transformers`, in the field `architectures` of `config.json`."""
    models: str
    """Released models, for the table in the docs."""
    differs: str
    """What differs from DeepSeek-V3, for the table in the docs."""
    aliases: tuple[str, ...] = ()
    """Other values of `model_type` for the same; what is written has the first."""
    fixed: Mapping[str, Any] = FIXED
    """Fields of `config.json` that have one value. Another one is an error."""
    router: Mapping[str, Any] = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
    """Fields of the router that have one value, whether `config.json` says them or not."""
    extensions: tuple[str, ...] = ()
    """The `EXTENSIONS`, and YaRN's `llama_4_scaling_beta`, that are part of this architecture."""
    reads: tuple[str, ...] = ()
    """Further fields of `config.json` that `read` uses."""
    required: tuple[str, ...] = ("routed_scaling_factor", "n_group", "topk_group")
    """Fields of `config.json` that have a default in `ModelConfig`, but not here: no tensor shows a wrong value."""
    stacked_experts: bool = False
    """Whether the matrices of a layer's experts are one tensor, and gate and up projections too."""
    unused_modules: tuple[str, ...] = ()
    """Modules beside the language model in released files, such as a vision tower, whose tensors `is_unused` names."""
    bias_may_be_missing: bool = False
    """Whether a checkpoint without router biases is one of a router without them, whatever `config.json` says."""
    presets: Mapping[str, Mapping[str, Any]] = {}
    """Released models by the names of their presets: the fields of `ModelConfig` that are not defaults."""

    @property
    def field_value(self) -> str | None:
        """The value of `ModelConfig.model_type`, which is None for DeepSeek's own."""
        return self.model_type

    def read(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of a `ModelConfig` from the contents of a `config.json`. Raises `ConfigError` for values that are
        not part of the architecture."""
        fixed = {f.name: f.default for f in self._missing_fields()} | dict(self.fixed)
        for name, only in {**fixed, **self.router, "ep_size": 1, "partial_rotary_factor": 1}.items():
            given = config.get(name)
            require(given in (only, None), name, given, f"only {only!r} is part of this architecture")
        known = {f.name for f in dataclasses.fields(ModelConfig)} | fixed.keys() | set(self.reads)
        check_ignored(config, known | {"num_key_value_heads", "partial_rotary_factor"})
        for name in self.required:
            given = name in config if name in ("n_group", "topk_group") else config.get(name) is not None
            require(given, f"config.json.{name}", None, "is required")  # groups may be null: all experts are one
        values = {f.name: config[f.name] for f in dataclasses.fields(ModelConfig) if config.get(f.name) is not None}
        values["model_type"] = self.field_value
        if config.get("n_shared_experts", 1) is None:
            values["n_shared_experts"] = 0
        return values | self.read_rope(config) | self.read_router(config)

    def read_router(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of the router."""
        return dict(self.router)

    def read_rope(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """`rope_theta` and `rope_scaling`. transformers 5 writes `rope_parameters`, which includes theta; the released
        files have `rope_scaling`."""
        given = config.get("rope_scaling") or config.get("rope_parameters") or {}
        require(isinstance(given, dict), "rope_scaling", given, "must be an object")
        rope = dict(given)
        theta = rope.pop("rope_theta", None) or config.get("rope_theta") or 10_000.0
        scaling = rope_scaling(rope)
        yarn = scaling is None or isinstance(scaling, Yarn)
        require(yarn, "rope_scaling.type", rope.get("rope_type", rope.get("type")), "use 'yarn' or no scaling")
        return {"rope_theta": theta, "rope_scaling": scaling and dataclasses.asdict(scaling)}

    def write(self, cfg: ModelConfig) -> dict[str, Any]:
        """The contents of a `config.json`; `read` is the inverse."""
        config = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(cfg)}
        for f in self._missing_fields():
            del config[f.name]
        if yarn := cfg.rope_scaling:
            config["rope_scaling"] = {"type": "yarn", **dataclasses.asdict(yarn)}
            if not yarn.llama_4_scaling_beta:
                del config["rope_scaling"]["llama_4_scaling_beta"]
        if cfg.mtp_shares_embedding:
            del config["mtp_shares_embedding"]  # the released architecture, which has no such field
        config |= {"architectures": [self.hf_class], "model_type": self.model_type}
        return {**config, **self.fixed, "num_key_value_heads": cfg.num_attention_heads}

    def check(self, cfg: ModelConfig) -> None:
        """Raise `ConfigError` for a model that is not of this architecture, and that its `config.json` cannot say."""
        for name, only in {**{f.name: f.default for f in self._missing_fields()}, **self.router}.items():
            require_field(cfg, name, getattr(cfg, name) == only, f"{self.model_type} has {only!r}; see model_type")
        beta = cfg.rope_scaling.llama_4_scaling_beta if cfg.rope_scaling else 0.0
        ok = "llama_4_scaling_beta" in self.extensions or not beta
        require(ok, "rope_scaling.llama_4_scaling_beta", beta, f"is no part of {self.model_type}; set 0")

    def tensor_name(self, name: str) -> str:
        """The name in a checkpoint of a tensor that has this `name` in DeepSeek-V3."""
        return name

    def is_unused(self, cfg: ModelConfig, name: str) -> bool:
        """Whether a tensor of a checkpoint is no part of the model `cfg`, though of released files. Conversions between
        such files keep it."""
        return name.startswith(tuple(f"{module}." for module in self.unused_modules))

    def _missing_fields(self) -> list["dataclasses.Field[Any]"]:
        """The fields of a `ModelConfig` that are no part of this architecture."""
        return [f for f in dataclasses.fields(ModelConfig) if f.name in EXTENSIONS and f.name not in self.extensions]


def leading_dense_layers(config: Mapping[str, Any]) -> int:
    """How many of the first layers are dense, by `mlp_layer_types` or `first_k_dense_replace`; 1 without either. Raises
    `ConfigError` where a dense layer follows a sparse one."""
    types = config.get("mlp_layer_types")
    if types is None:
        first = config.get("first_k_dense_replace")
        return 1 if first is None else first
    require(isinstance(types, list), "mlp_layer_types", types, "must be a list of 'dense' and 'sparse'")
    dense, layers = types.count("dense"), config.get("num_hidden_layers")
    fix = f"only dense layers before sparse ones, {layers} in all, are part of this architecture"
    require(types == ["dense"] * dense + ["sparse"] * (len(types) - dense), "mlp_layer_types", types, fix)
    require(len(types) == layers, "mlp_layer_types", types, fix)
    return dense
