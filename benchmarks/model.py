"""The V3-shaped model of 18.6 M parameters that the benchmarks share, and its training step."""

import time
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from mla_moe import ModelConfig, Precision
from mla_moe.config import MeshConfig, OptimizerConfig, TrainingConfig
from mla_moe.nn.abstract_model import AbstractModel
from mla_moe.nn.transformer import Remat
from mla_moe.parallel.mesh import make_mesh
from mla_moe.training.optimizer import make_optimizer
from mla_moe.training.step import init_state, make_train_step

CFG = ModelConfig(
    vocab_size=2048, hidden_size=256, intermediate_size=512, moe_intermediate_size=128, num_hidden_layers=6,
    num_attention_heads=8, kv_lora_rank=32, q_lora_rank=96, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32,
    n_routed_experts=32, num_experts_per_tok=4, routed_scaling_factor=2.5, initializer_range=0.05,
    max_position_embeddings=4096,
)  # fmt: skip


def stepper(
    cfg: ModelConfig, dtype: Literal["float32", "bfloat16"], batch: int, length: int, remat: Remat = "none"
) -> Callable[[], float]:
    """A function that runs one training step and returns its seconds. It is already compiled."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    precision = Precision(compute=jnp.dtype(dtype))
    training = TrainingConfig(batch_size=batch, sequence_length=length, compute_dtype=dtype, remat=remat)
    abstract_model = AbstractModel(cfg, precision=precision, remat=training.remat)
    tx = make_optimizer(OptimizerConfig(), training.steps, abstract_model)
    state = init_state(abstract_model, tx, 0, mesh)
    step = make_train_step(abstract_model, tx, training, mesh)
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (batch, length), dtype=np.int32)
    ones, positions = np.ones_like(tokens), np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
    data = jax.device_put({"tokens": tokens, "targets": tokens, "segment_ids": ones, "positions": positions})

    def run() -> float:
        nonlocal state
        start = time.perf_counter()
        state, metrics = step(state, data)
        jax.block_until_ready(metrics)
        return time.perf_counter() - start

    run()
    return run
