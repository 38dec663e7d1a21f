"""Memory per device of a training step, on meshes of 1 to 8 devices.

    python benchmarks/memory.py

From the compiled program: nothing runs. Batch and model are the same for every mesh, so the memory per device should
fall as 1 / devices. Arguments are parameters, optimizer state and batch; temporaries are gradients and activations.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from mla_moe import ModelConfig
from mla_moe.config import MeshConfig, OptimizerConfig, TrainingConfig
from mla_moe.nn.abstract_model import AbstractModel
from mla_moe.parallel.mesh import BATCH_SPEC, make_mesh
from mla_moe.training.optimizer import make_optimizer
from mla_moe.training.step import abstract_state, make_train_step

CFG = ModelConfig(
    vocab_size=8192, hidden_size=512, num_hidden_layers=4, num_attention_heads=8, intermediate_size=1024,
    moe_intermediate_size=256, n_routed_experts=32, num_experts_per_tok=4, kv_lora_rank=128, q_lora_rank=128,
    qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64, max_position_embeddings=1024,
)  # fmt: skip
TRAINING = TrainingConfig(batch_size=16, sequence_length=1024, remat="full")

MESHES = {
    1: [MeshConfig()],
    2: [MeshConfig(data=1, fsdp=2), MeshConfig(data=1, expert=2)],
    4: [MeshConfig(data=1, fsdp=4), MeshConfig(data=1, expert=4), MeshConfig(data=1, fsdp=2, expert=2)],
    8: [MeshConfig(data=1, fsdp=8), MeshConfig(data=1, expert=8), MeshConfig(data=1, fsdp=2, expert=4),
        MeshConfig(data=1, fsdp=2, expert=2, tensor=2), MeshConfig(data=1, fsdp=1, expert=2, context=4)],
}  # fmt: skip


def step_memory(mesh: jax.sharding.Mesh) -> tuple[int, int]:
    """Bytes per device of arguments and of temporaries."""
    abstract_model = AbstractModel(CFG, remat=TRAINING.remat)
    tx = make_optimizer(OptimizerConfig(), TRAINING.steps, abstract_model)
    shape = TRAINING.batch_size, TRAINING.sequence_length
    array = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(mesh, BATCH_SPEC))
    batch = dict.fromkeys(("tokens", "targets", "segment_ids", "positions"), array)
    step = (
        make_train_step(abstract_model, tx, TRAINING, mesh)
        .lower(abstract_state(abstract_model, tx, mesh), batch)
        .compile()
    )
    memory = step.memory_analysis()
    assert memory is not None
    return memory.argument_size_in_bytes, memory.temp_size_in_bytes


def main() -> None:
    jax.config.update("jax_num_cpu_devices", 8)
    one_device = None
    print(f"{'devices':>7}  {'mesh':28}{'arguments':>11}{'temporaries':>13}{'sum':>8}{'times devices / one':>21}")
    for devices, meshes in MESHES.items():
        for sizes in meshes:
            arguments, temporaries = step_memory(make_mesh(sizes, jax.devices()[:devices]))
            total = arguments + temporaries
            one_device = one_device or total
            axes = {axis: n for axis, n in dataclasses.asdict(sizes).items() if axis != "rules" and n not in (1, -1)}
            name = " x ".join(f"{axis} {n}" for axis, n in axes.items()) or "one device"
            row = f"{devices:7}  {name:28}{arguments / 2**20:7.0f} MiB{temporaries / 2**20:9.0f} MiB"
            print(f"{row}{total / 2**20:8.0f}{total * devices / one_device:21.2f}", flush=True)


if __name__ == "__main__":
    main()
