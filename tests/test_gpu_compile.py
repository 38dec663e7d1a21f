"""The training step compiled ahead of time for H100, where the CUDA plugin is installed (extra `cuda`)."""

import dataclasses
import os

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding

from mla_moe import ModelConfig
from mla_moe.config import KernelConfig, MeshConfig, OptimizerConfig, TrainingConfig
from mla_moe.nn.abstract_model import AbstractModel
from mla_moe.nn.param import Precision, resolve_kernels
from mla_moe.parallel.accelerators import GPUS
from mla_moe.parallel.mesh import BATCH_SPEC, make_mesh
from mla_moe.training.optimizer import make_optimizer
from mla_moe.training.step import abstract_state, make_train_step

pytest.importorskip("jax_cuda13_plugin")

BATCH, LENGTH = 16, 256


def test_the_step_compiles_for_h100(cfg: ModelConfig) -> None:
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    cfg = dataclasses.replace(
        cfg, vocab_size=512, hidden_size=256, num_hidden_layers=1, first_k_dense_replace=0, moe_intermediate_size=128,
        n_routed_experts=32, n_group=4, topk_group=2, num_experts_per_tok=4, num_nextn_predict_layers=0,
        max_position_embeddings=LENGTH,
    )  # fmt: skip
    devices = topologies.get_topology_desc("", "cuda", target_config=GPUS["h100"], topology="1x1x8").devices
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=4), devices)
    kernels = resolve_kernels(KernelConfig(attention="blockwise"), mesh.devices.flat[0].platform)
    abstract_model = AbstractModel(cfg, precision=Precision(compute=jnp.bfloat16), kernels=kernels)
    tx = make_optimizer(OptimizerConfig(), 10, abstract_model)
    batch = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32, sharding=NamedSharding(mesh, BATCH_SPEC))
    batch = dict.fromkeys(("tokens", "targets", "segment_ids", "positions"), batch)
    step = make_train_step(abstract_model, tx, TrainingConfig(steps=10, batch_size=BATCH, sequence_length=LENGTH), mesh)
    program = step.lower(abstract_state(abstract_model, tx, mesh), batch).compile().as_text()
    assert "ragged-all-to-all" in program
    assert "ragged-dot" not in program  # XLA expands it to a dense product of all experts
