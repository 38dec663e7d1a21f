"""DeepSeek-V3.2 and V3.2-Exp (DeepSeek, 2025): DeepSeek-V3 with DeepSeek Sparse Attention (DSA).

In each layer an indexer selects the `index_topk` keys that a query attends to (`nn.indexer`). Its rotary embedding
rotates the halves of the width, that of attention pairs of neighbours. The first release of the inference code rotated
neighbours in both, which its README of 2025-11-17 names as a mistake; transformers 5.24.0 and this are as corrected.
transformers leaves out the Hadamard transform and the FP8 of the released indexer, and so does this.
"""

from collections.abc import Mapping
from typing import Any

from mla_moe.config.architectures.architecture import DSA, Architecture, leading_dense_layers
from mla_moe.config.architectures.deepseek_v3 import DeepseekV3
from mla_moe.config.errors import require_field
from mla_moe.config.model import ModelConfig


class DeepseekV32(Architecture):
    model_type = "deepseek_v32"
    hf_class = "DeepseekV32ForCausalLM"
    models = "DeepSeek-V3.2, V3.2-Exp"
    differs = "an indexer in each layer selects the keys of a query (DSA)"
    extensions = tuple(name for name in DSA if name != "indexer_types")
    reads: tuple[str, ...] = ("mlp_layer_types", "layer_types")
    required = (*Architecture.required, "index_topk")
    defaults: Mapping[str, Any] = {"first_k_dense_replace": 3}
    """Fields of `config.json` whose default in transformers is not that of `ModelConfig`."""
    presets: Mapping[str, Mapping[str, Any]] = {
        "deepseek-v3.2": dict(DeepseekV3.presets["deepseek-v3"], index_topk=2048),
    }  # fmt: skip

    def read(self, config: Mapping[str, Any]) -> dict[str, Any]:
        given = {name: value for name, value in config.items() if value is not None or name not in self.defaults}
        config = {**self.defaults, **given}
        return super().read(config) | {"first_k_dense_replace": leading_dense_layers(config)}

    def check(self, cfg: ModelConfig) -> None:
        super().check(cfg)
        require_field(cfg, "index_topk", cfg.index_topk is not None, f"{self.model_type} has an indexer")

    def write(self, cfg: ModelConfig) -> dict[str, Any]:
        config, dense = super().write(cfg), cfg.first_k_dense_replace
        return config | {"mlp_layer_types": ["dense"] * dense + ["sparse"] * cfg.num_moe_layers}


ARCHITECTURE = DeepseekV32()
