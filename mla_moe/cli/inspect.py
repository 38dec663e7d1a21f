"""`mla-moe inspect`."""

import dataclasses
from pathlib import Path

import tyro

from mla_moe.checkpoint.reader import read_model_config
from mla_moe.config import PRESETS, ModelConfig, preset
from mla_moe.nn.model_costs import (
    count_parameters,
    kv_cache_bytes_per_token,
    mha_kv_cache_bytes_per_token,
    train_flops_per_token,
)
from mla_moe.training.console import Console, si


@dataclasses.dataclass(frozen=True)
class Inspect:
    """Print a model's architecture, parameters (total and active), KV cache bytes per token and training FLOPs per
    token. No weights are loaded."""

    model: tyro.conf.Positional[str]
    """A preset (deepseek-v3, …), a Hugging Face directory or its config.json, or a run's directory or checkpoint."""
    length: int = 4096
    """Sequence length in tokens; attention FLOPs depend on it."""

    def run(self) -> None:
        path = Path(self.model)
        cfg = preset(self.model) if self.model in PRESETS or not path.exists() else read_model_config(path)
        Console(enabled=True).startup_table(self.model, _shapes(cfg) + _costs(cfg, self.length))


def _shapes(cfg: ModelConfig) -> list[tuple[str, str]]:
    scaling = "no scaling"
    if yarn := cfg.rope_scaling:
        scaling = f"YaRN {yarn.factor:g} x {yarn.original_max_position_embeddings}, mscale {yarn.mscale:g}, "
        scaling += f"beta {yarn.beta_fast:g}/{yarn.beta_slow:g}"
    normalised = "yes" if cfg.norm_topk_prob else "no"
    heads = (cfg.kv_lora_rank, cfg.qk_nope_head_dim, cfg.qk_rope_head_dim, cfg.v_head_dim)
    return [
        ("vocabulary", f"{cfg.vocab_size}"),
        ("hidden / layers / heads", f"{cfg.hidden_size} / {cfg.num_hidden_layers} / {cfg.num_attention_heads}"),
        ("dense / expert width", f"{cfg.intermediate_size} / {cfg.moe_intermediate_size}"),
        ("first dense layers", f"{cfg.first_k_dense_replace}"),
        ("routed / shared / top-k", f"{cfg.n_routed_experts} / {cfg.n_shared_experts} / {cfg.num_experts_per_tok}"),
        ("groups / top groups", f"{cfg.n_group} / {cfg.topk_group}"),
        ("score, normalised", f"{cfg.scoring_func}, {normalised}"),
        ("routed scaling", f"{cfg.routed_scaling_factor:g}"),
        ("q_lora_rank", f"{cfg.q_lora_rank or 'none'}"),
        ("kv_lora / nope / rope / v", " / ".join(map(str, heads))),
        ("rope theta, scaling", f"{cfg.rope_theta:g}, {scaling}"),
        ("max positions", f"{cfg.max_position_embeddings}"),
        ("norm epsilon", f"{cfg.rms_norm_eps:g}"),
        ("MTP modules", f"{cfg.num_nextn_predict_layers}"),
    ]


def _costs(cfg: ModelConfig, length: int) -> list[tuple[str, str]]:
    count = count_parameters(cfg)
    latent, multi_head = kv_cache_bytes_per_token(cfg), mha_kv_cache_bytes_per_token(cfg)
    return [
        ("parameters", f"{count.total:,} ({si(count.total)})"),
        ("active per token", f"{count.active:,} ({si(count.active)})"),
        ("in MTP modules", f"{count.mtp:,} ({si(count.mtp)})" if count.mtp else "none"),
        ("KV cache bytes per token", f"{latent:,} in bfloat16"),
        ("  multi-head attention", f"{multi_head:,} ({multi_head / latent:.1f} times as many)"),
        ("training FLOPs per token", f"{si(train_flops_per_token(cfg, length))} at sequence length {length}"),
    ]
