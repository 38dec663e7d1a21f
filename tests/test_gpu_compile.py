"""Compiled ahead of time for NVIDIA GPUs, where the CUDA compiler and tokamax are installed (extra `cuda`)."""

import dataclasses
import os
import re

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding

from mla_moe import ModelConfig
from mla_moe.config import KernelConfig, MeshConfig, OptimizerConfig, Recipe, TrainingConfig, preset
from mla_moe.nn.abstract_model import AbstractModel
from mla_moe.nn.param import Precision, resolve_kernels
from mla_moe.parallel.accelerators import GPUS
from mla_moe.parallel.mesh import BATCH_SPEC, make_mesh
from mla_moe.plan.compiler import compile_to_end, without_compilation_cache
from mla_moe.plan.hlo import HloModule
from mla_moe.plan.stages import DecodeOptions, StageProgram, lower, trace_stage
from mla_moe.plan.topology import open_topology
from mla_moe.training.optimizer import make_optimizer
from mla_moe.training.step import abstract_state, make_train_step

pytest.importorskip("jax_cuda13_plugin")
pytest.importorskip("tokamax")

pytestmark = pytest.mark.filterwarnings(
    "ignore:The Pallas Triton backend:DeprecationWarning"
)  # of ops.latent_attention

BATCH, LENGTH, D, F, EXPERTS = 16, 512, 256, 128, 8


def devices(kind: str, count: int) -> list[jax.Device]:
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    return list(topologies.get_topology_desc("", "cuda", target_config=GPUS[kind], topology=f"1x1x{count}").devices)


def kernels(program: str) -> list[str]:
    """A program's kernels, of Mosaic and Triton, each with the function of `ops.tokamax_kernels` that calls it."""
    calls = re.findall(r'custom_call_target="(mosaic|triton|__gpu\$xla.gpu.triton)[^"]*".*?op_name="([^"]*)"', program)
    assert len(calls) == program.count(" custom-call(")
    return sorted(f"{'mosaic' if 'mosaic' in kind else 'triton'}{_function(scope)}" for kind, scope in calls)


def _function(scope: str) -> str:
    return re.findall(r"jit\((_flash_attention\w*|_ragged_dot\w*|_latent_attention)\)", scope)[-1]


@pytest.fixture(scope="module")
def program(cfg: ModelConfig) -> str:
    """The compiled text of a training step of one MoE layer on 16 H100, with sequences sharded over two of them."""
    cfg = dataclasses.replace(
        cfg, vocab_size=512, hidden_size=D, num_hidden_layers=1, first_k_dense_replace=0, num_attention_heads=2,
        moe_intermediate_size=F, n_routed_experts=4 * EXPERTS, n_group=4, topk_group=2, num_experts_per_tok=4,
        kv_lora_rank=128, q_lora_rank=None, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
        max_position_embeddings=LENGTH, num_nextn_predict_layers=0,
    )  # fmt: skip
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=4, context=2), devices("h100", 16))
    with jax.default_device(mesh.devices.flat[0]), without_compilation_cache():
        chosen = resolve_kernels(KernelConfig())
        assert dataclasses.astuple(chosen)[:3] == ("tokamax", "tokamax", "ragged")
        abstract_model = AbstractModel(cfg, precision=Precision(compute=jnp.bfloat16), kernels=chosen)
        tx = make_optimizer(OptimizerConfig(), 10, abstract_model)
        batch = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32, sharding=NamedSharding(mesh, BATCH_SPEC))
        batch = dict.fromkeys(("tokens", "targets", "segment_ids", "positions"), batch)
        training = TrainingConfig(steps=10, batch_size=BATCH, sequence_length=LENGTH)
        step = make_train_step(abstract_model, tx, training, mesh)
        return step.lower(abstract_state(abstract_model, tx, mesh), batch).compile().as_text()


def test_the_step_has_the_kernels_and_none_of_the_fallbacks(program: str) -> None:
    assert "ragged-all-to-all" in program
    assert "ragged-dot" not in program  # XLA expands it to a dense product of all experts
    # Experts: gate and up, and down, forward; backward, gate and up again and two products for the gradients of rows.
    assert kernels(program) == sorted(
        ["mosaic_flash_attention"] * 1 + ["mosaic_flash_attention_gradient"] * 2
        + ["mosaic_ragged_dot"] * 5 + ["triton_ragged_dot_gradient"] * 2
    )  # fmt: skip


def test_with_context_parallelism_a_device_attends_for_its_part_of_the_queries(program: str) -> None:
    """To all keys, by the kernel: a call has both. Half of the queries come from another device."""
    lines = program.splitlines()
    calls = [line for line in lines if " custom-call(" in line and "jit(_flash_attention" in line]
    assert len(calls) == 3
    assert not [line for line in lines if " while(" in line and "attend" in line], "blockwise"
    assert [line for line in lines if "collective-permute" in line and "bf16[2,128,256]" in line]


def test_no_expert_is_copied_for_a_block_of_rows(program: str) -> None:
    """As the fallbacks do: an array of matrices has at most one for each of a device's experts."""
    matrices = re.findall(rf"\w+\[(\d+),(?:{D},{2 * F}|{F},{D})\]", program)
    assert matrices
    assert max(map(int, matrices)) <= EXPERTS


def test_each_exchange_comes_when_its_chunk_needs_it(program: str) -> None:
    """It blocks, so a software pipeline would only handle one chunk more: forward and backward, there and back."""
    assert len(re.findall(r" ragged-all-to-all(?:-start)?\(", program)) == 4


@pytest.fixture(scope="module")
def decode_stage() -> tuple[StageProgram, str]:
    """A decode step of four layers with DeepSeek-V3's widths on 32 H100, and its compiled text."""
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    model = dataclasses.replace(preset("deepseek-v3"), num_hidden_layers=4)
    recipe = Recipe(run_dir="unused", model=model, mesh=MeshConfig(data=1, fsdp=1, expert=32))
    topology = open_topology("h100:4x8")
    stage = trace_stage(recipe, topology, "decode", DecodeOptions(256, 4096))
    return stage, compile_to_end(lower(stage, topology)).text


def test_a_decode_step_gathers_no_weights_of_attention(decode_stage: tuple[StageProgram, str]) -> None:
    """Its sequences are on other devices than the heads that they need."""
    gathered = [line for line in decode_stage[1].splitlines() if re.search(r" all-gather(-start)?\(", line)]
    assert gathered
    assert not [line for line in gathered if re.search(r"bf16\[128,(512,128|128,512|128,7168)\]", line)]


def test_a_decode_step_reads_the_cache_once(decode_stage: tuple[StageProgram, str]) -> None:
    """By the kernel of the dense layers and that of the MoE layers, and not in copies of blocks."""
    stage, text = decode_stage
    assert kernels(text).count("triton_latent_attention") == 2
    hlo = HloModule(text, stage.expected.loop_trips, stage.expected.active_experts)
    layers, slots, entries = 4, 8, 4096
    read = {}
    for computation, runs, fused in hlo.executions():
        for instruction in computation.instructions.values() if not fused else ():
            operands = [computation.instructions[name].type for name in instruction.operands]
            if any(f"[{layers},{slots},{entries},576]" in operand for operand in operands):
                read[instruction.opcode] = read.get(instruction.opcode, 0.0) + runs * hlo.traffic(
                    computation, instruction
                )
    needed = layers * slots * entries * 576 * 2
    assert needed <= read["custom-call"] <= 1.5 * needed  # with its results, of which it has eight parts
    assert sum(read.values()) - read["custom-call"] < 0.01 * needed  # the new entries that are written
