"""GLM-5, 5.1 and 5.2 (Z.ai, 2026): DeepSeek-V3.2 whose indexer rotates pairs of neighbours.

In GLM-5.2 most layers are without indexer and use the keys that the layer before them does (IndexShare, arXiv
2603.12201): `indexer_types`, or what transformers 5.24.0 derives it from. `indexer_rope_interleave` is true in released
files; transformers ignores the field and rotates neighbours always, vLLM and this read it. The MTP module has an
indexer of its own. transformers expects the layer of MTP to be ignored.
"""

from collections.abc import Mapping
from typing import Any

from mla_moe.config.architectures.architecture import DSA
from mla_moe.config.architectures.deepseek_v32 import DeepseekV32
from mla_moe.config.errors import require
from mla_moe.config.model import ModelConfig

_GLM_5: Mapping[str, Any] = dict(
    vocab_size=154880, hidden_size=6144, num_hidden_layers=78, num_attention_heads=64, intermediate_size=12288,
    moe_intermediate_size=2048, n_routed_experts=256, num_experts_per_tok=8, first_k_dense_replace=3,
    routed_scaling_factor=2.5, q_lora_rank=2048, qk_nope_head_dim=192, v_head_dim=256, rms_norm_eps=1e-5,
    index_topk=2048, index_n_heads=32, indexer_rope_interleave=True, num_nextn_predict_layers=1,
)  # fmt: skip


def _types(layers: int, frequency: int, offset: int) -> tuple[str, ...]:
    """Full in every so many layers, and in those up to the offset."""
    own = (max(layer - offset + 1, 0) % frequency == 0 for layer in range(layers))
    return tuple("full" if full else "shared" for full in own)


class GlmMoeDsa(DeepseekV32):
    model_type = "glm_moe_dsa"
    hf_class = "GlmMoeDsaForCausalLM"
    models = "GLM-5, 5.1, 5.2"
    differs = "as DeepSeek-V3.2, with another rotary embedding of the indexer; layers may share the selected keys"
    extensions = DSA
    defaults: Mapping[str, Any] = {**DeepseekV32.defaults, "index_n_heads": 32, "indexer_rope_interleave": True}
    reads = (
        *DeepseekV32.reads, "index_topk_freq", "index_topk_pattern", "index_skip_topk_offset",
        "index_share_for_mtp_iteration",
    )  # fmt: skip
    presets: Mapping[str, Mapping[str, Any]] = {
        "glm-5": dict(_GLM_5, max_position_embeddings=202752, rope_theta=1_000_000.0),
        "glm-5.2": dict(
            _GLM_5, max_position_embeddings=1048576, rope_theta=8_000_000.0, indexer_types=_types(78, 4, 3),
        ),
    }  # fmt: skip

    def read(self, config: Mapping[str, Any]) -> dict[str, Any]:
        types = config.get("indexer_types") or self._derived_types(config)
        ok = isinstance(types, list | tuple) and all(isinstance(kind, str) for kind in types)
        require(ok, "indexer_types", types, "must be a list of 'full' and 'shared'")
        return super().read(config) | {"indexer_types": types if "shared" in types else None}

    def write(self, cfg: ModelConfig) -> dict[str, Any]:
        types = cfg.indexer_types or ("full",) * cfg.num_hidden_layers
        return super().write(cfg) | {"indexer_types": list(types)}

    def _derived_types(self, config: Mapping[str, Any]) -> Any:
        layers, pattern = config.get("num_hidden_layers"), config.get("index_topk_pattern")
        if pattern is not None:
            return [{"F": "full", "S": "shared"}.get(kind, kind) for kind in pattern]
        frequency, offset = config.get("index_topk_freq"), config.get("index_skip_topk_offset")
        frequency, offset = 1 if frequency is None else frequency, 2 if offset is None else offset
        for name, value in (("num_hidden_layers", layers), ("index_topk_freq", frequency)):
            require(type(value) is int and value > 0, name, value, "must be a positive integer")
        require(type(offset) is int, "index_skip_topk_offset", offset, "must be an integer")
        assert isinstance(layers, int)
        return _types(min(layers, 10**6), frequency, offset)


ARCHITECTURE = GlmMoeDsa()
