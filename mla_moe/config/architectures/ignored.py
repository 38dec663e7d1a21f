"""Fields of a `config.json` that a model does not use: which are silent, and which are errors or logged by name."""

import functools
import logging
from collections.abc import Iterable, Mapping
from typing import Any

from mla_moe.config.errors import require, visible

logger = logging.getLogger(__name__)

_WITHOUT_EFFECT = {
    "_attn_implementation", "_name_or_path", "architectures", "auto_map", "aux_loss_alpha", "bos_token_id",
    "chunk_size_feed_forward", "dtype", "eos_token_id", "ep_size", "head_dim", "id2label", "label2id", "model_type",
    "moe_router_dtype", "num_labels", "output_attentions", "output_hidden_states", "output_router_logits",
    "pad_token_id", "pretraining_tp", "problem_type", "qk_head_dim", "quantization_config", "return_dict",
    "rope_parameters", "router_aux_loss_coef", "sep_token_id", "seq_aux", "task_specific_params", "tokenizer_class",
    "torch_dtype", "torchscript", "transformers_version", "unk_token_id", "use_cache",
}  # fmt: skip
"""Fields that describe files, tokens or training, or repeat others: what the model computes does not depend on them."""


def check_ignored(config: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raise `ConfigError` for a sliding window, and log a warning for each other field that is not `known` and would
    change the model. A field that is null, 0, false or empty is off."""
    window = config.get("sliding_window")
    off = not window or config.get("use_sliding_window") is False
    fix = "is not supported in a language model; remove it if the model has full attention"
    require(off, "sliding_window", window, fix)
    for name in sorted(config.keys() - set(known) - _WITHOUT_EFFECT - {"sliding_window", "use_sliding_window"}):
        if config[name]:
            log_ignored(name, repr(config[name])[:100])
    heads, kv_heads = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if kv_heads not in (None, heads):
        log_ignored("num_key_value_heads", repr(kv_heads))


@functools.cache
def log_ignored(name: str, value: str) -> None:
    """Once per field and value."""
    logger.warning("config.json: %s = %s is not supported and ignored", visible(name), value)
