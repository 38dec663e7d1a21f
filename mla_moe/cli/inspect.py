"""`mla-moe inspect`."""

import dataclasses
from pathlib import Path

import tyro

from mla_moe.checkpoint.reader import read_model_config
from mla_moe.config import PRESETS, ModelConfig, preset
from mla_moe.config.errors import MAX_SIZE, require_between
from mla_moe.config.storage import is_url, require_path
from mla_moe.nn import model_costs
from mla_moe.training.console import Console, si


@dataclasses.dataclass(frozen=True)
class Inspect:
    """Print a model's architecture, parameters, KV cache bytes and training FLOPs per token. Loads no weights."""

    model: tyro.conf.Positional[str]
    """A preset (deepseek-v3, …), a Hugging Face directory or its config.json, or a run's directory or checkpoint, or
    hf://ORG/NAME."""
    length: int = 4096
    """Sequence length in tokens; attention FLOPs depend on it."""

    def __post_init__(self):
        require_between(self, "", "length", 1, MAX_SIZE)

    def run(self) -> None:
        require_path("model", self.model)
        path = Path(self.model)
        known = path.exists() or is_url(path)
        cfg = preset(self.model) if self.model in PRESETS or not known else read_model_config(path)
        scaling = "no scaling"
        if yarn := cfg.rope_scaling:
            scaling = f"YaRN {yarn.factor:g} x {yarn.original_max_position_embeddings}, mscale {yarn.mscale:g}, "
            scaling += f"beta {yarn.beta_fast:g}/{yarn.beta_slow:g}"
        count, flops = model_costs.count_parameters(cfg), si(model_costs.train_flops_per_token(cfg, self.length))
        latent = model_costs.kv_cache_bytes_per_token(cfg)
        multi_head = model_costs.mha_kv_cache_bytes_per_token(cfg)
        heads = (cfg.kv_lora_rank, cfg.qk_nope_head_dim, cfg.qk_rope_head_dim, cfg.v_head_dim)
        rows = [
            ("vocabulary", f"{cfg.vocab_size}"),
            ("hidden / layers / heads", f"{cfg.hidden_size} / {cfg.num_hidden_layers} / {cfg.num_attention_heads}"),
            ("dense / expert width", f"{cfg.intermediate_size} / {cfg.moe_intermediate_size}"),
            ("first dense layers", f"{cfg.first_k_dense_replace}"),
            *(_router(cfg) if cfg.num_moe_layers else [("experts", "none: every layer is dense")]),
            ("q_lora_rank", f"{cfg.q_lora_rank or 'none'}"),
            ("kv_lora / nope / rope / v", " / ".join(map(str, heads))),
            *(_indexer(cfg) if cfg.index_topk else []),
            ("rope theta, scaling", f"{cfg.rope_theta:g}, {scaling}"),
            ("max positions", f"{cfg.max_position_embeddings}"),
            ("norm epsilon", f"{cfg.rms_norm_eps:g}"),
            ("MTP modules", f"{cfg.num_nextn_predict_layers}"),
            ("parameters", f"{count.total:,} ({si(count.total)})"),
            ("active per token", f"{count.active:,} ({si(count.active)})"),
            ("in MTP modules", f"{count.mtp:,} ({si(count.mtp)})" if count.mtp else "none"),
            ("KV cache bytes per token", f"{latent:,} in bfloat16"),
            ("  multi-head attention", f"{multi_head:,} ({multi_head / latent:.1f} times as many)"),
            ("training FLOPs per token", f"{flops} at sequence length {self.length}"),
        ]
        Console(enabled=True).startup_table(self.model, rows)


def _indexer(cfg: ModelConfig) -> list[tuple[str, str]]:
    layers = f"{cfg.shared_indexers.count(False)} of {cfg.num_hidden_layers}"
    return [
        ("indexers, in layers", layers),
        ("  heads / width / keys", f"{cfg.index_n_heads} / {cfg.index_head_dim} / {cfg.index_topk}"),
    ]


def _router(cfg: ModelConfig) -> list[tuple[str, str]]:
    return [
        ("routed / shared / top-k", f"{cfg.n_routed_experts} / {cfg.n_shared_experts} / {cfg.num_experts_per_tok}"),
        *([("zero-computation experts", f"{cfg.zero_expert_num}")] if cfg.zero_expert_num else []),
        ("groups / top groups", f"{cfg.n_group} / {cfg.topk_group}"),
        ("score, normalised", f"{cfg.scoring_func}, {'yes' if cfg.norm_topk_prob else 'no'}"),
        ("routed scaling", f"{cfg.routed_scaling_factor:g}"),
    ]
