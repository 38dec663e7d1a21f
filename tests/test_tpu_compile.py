"""The training step compiled ahead of time for TPU: it has the native kernels, and no dense expansion."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding

from mla_moe import ConfigError, ModelConfig
from mla_moe.config import KernelConfig, MeshConfig, OptimizerConfig, TrainingConfig
from mla_moe.nn.abstract_model import AbstractModel
from mla_moe.nn.param import Precision, resolve_kernels
from mla_moe.parallel.mesh import BATCH_SPEC, make_mesh
from mla_moe.plan.compiler import without_compilation_cache
from mla_moe.training.optimizer import make_optimizer
from mla_moe.training.step import abstract_state, make_train_step

pytest.importorskip("libtpu")

BATCH, LENGTH = 16, 512


@pytest.fixture(scope="module")
def program(cfg: ModelConfig) -> str:
    """The compiled text of a training step on `v5p:2x2x4`, with sequences sharded over two devices."""
    cfg = dataclasses.replace(
        cfg, vocab_size=512, hidden_size=256, num_hidden_layers=1, first_k_dense_replace=0, num_attention_heads=2,
        moe_intermediate_size=128, n_routed_experts=64, n_group=4, topk_group=2, num_experts_per_tok=4,
        kv_lora_rank=128, q_lora_rank=None, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
        max_position_embeddings=LENGTH, num_nextn_predict_layers=0,
    )  # fmt: skip
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x4")
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=4, context=2), topology.devices)
    kernels = resolve_kernels(KernelConfig(), mesh.devices.flat[0].platform)
    assert dataclasses.astuple(kernels)[:3] == ("splash", "megablox", "ragged")
    abstract_model = AbstractModel(cfg, precision=Precision(compute=jnp.bfloat16), kernels=kernels)
    training = TrainingConfig(steps=10, batch_size=BATCH, sequence_length=LENGTH)
    tx = make_optimizer(OptimizerConfig(), training.steps, abstract_model)
    batch = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32, sharding=NamedSharding(mesh, BATCH_SPEC))
    batch = dict.fromkeys(("tokens", "targets", "segment_ids", "positions"), batch)
    lowered = make_train_step(abstract_model, tx, training, mesh).lower(abstract_state(abstract_model, tx, mesh), batch)
    with without_compilation_cache():
        return lowered.compile().as_text()


def test_slices_are_laid_out_along_data() -> None:
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1", num_slices=2).devices
    mesh = make_mesh(MeshConfig(data=4, expert=2), devices)
    assert [{device.slice_index for device in row.flat} for row in mesh.devices.reshape(4, 2)] == [{0}, {0}, {1}, {1}]
    with pytest.raises(ConfigError, match="multiple of the 2 slices"):
        make_mesh(MeshConfig(data=1, fsdp=8), devices)


def test_the_step_has_the_native_kernels(program: str) -> None:
    assert re.search(r"%ragged-all-to-all-start[.\d]* = ", program)  # asynchronous, beside the experts
    calls = [line for line in program.splitlines() if " custom-call(" in line and "splash_mha" in line]
    assert {name for line in calls for name in re.findall(r"splash_mha_(fwd|dkv|dq)", line)} == {"fwd", "dkv"}


def test_with_context_parallelism_a_device_attends_for_its_part_of_the_queries(program: str) -> None:
    """To all keys, by the kernel. Half of the queries come from another device, and the results return."""
    calls = [line for line in program.splitlines() if " custom-call(" in line and "splash_mha" in line]
    assert all("[2,2,256,192]" in line and "[2,2,512,192]" in line for line in calls), calls
    assert not [line for line in program.splitlines() if " while(" in line and "attend" in line], "blockwise"
    swapped = [line for line in program.splitlines() if "collective-permute" in line and "bf16[2,128,256]" in line]
    assert swapped


def test_no_expert_runs_on_tokens_of_another_expert(program: str) -> None:
    """A dense expansion has an axis of a device's 16 experts and one of many tokens; weights have widths only."""
    widths = {64, 128, 256}  # 64 of the 128 rows of the second matrix, which is sharded over `fsdp`
    arrays = re.findall(r"(?:bf16|f32|pred)\[(\d+),(\d+),(\d+)\]", program)
    expanded = {dims for dims in arrays if dims[0] == "16" and int(dims[1]) not in widths and int(dims[2]) in widths}
    assert not expanded
    assert "gmm" in program
    assert "tgmm" in program


def test_with_many_experts_their_weights_are_gathered_before_the_routes(program: str) -> None:
    """So that it runs beside attention (`DispatchPlan.weights_before_routes`)."""
    ends = re.compile(r"all-gather.*-done = bf16\[(1,16,128,256|16,256,256)\]")
    starts = re.compile(r"all-gather.*-start = .*s32\[2048,4\]")
    order = [line for line in program.splitlines() if ends.search(line) or starts.search(line)]
    assert [bool(starts.search(line)) for line in order] == [False, False, True]
