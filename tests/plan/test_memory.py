"""Figures that need no compiler: peaks of devices, and the bytes of a KV cache."""

import dataclasses
from unittest.mock import Mock

import jax
import pytest

from mla_moe import preset
from mla_moe.config import LoRAConfig, MeshConfig, Recipe, SFTConfig
from mla_moe.parallel.accelerators import ACCELERATORS, peak_flops
from mla_moe.plan import stages
from mla_moe.plan.stages import DecodeOptions
from mla_moe.plan.topology import open_topology


def test_training_and_plan_read_one_table_of_peaks() -> None:
    """A TPU7x chip of 2,307 TFLOP/s is two JAX devices."""
    kinds = [kind for accelerator in ACCELERATORS.values() for kind in accelerator.device_kinds]
    assert len(kinds) == len(set(kinds)) == 9
    device = Mock(spec=jax.Device, platform="tpu", device_kind="TPU7x")
    assert peak_flops(device) == ACCELERATORS["v7x"].flops == 2307e12 / 2


def test_a_kv_cache_has_a_latent_and_a_key_per_token_and_layer() -> None:
    topology = open_topology("cpu:8")._replace(accelerator=ACCELERATORS["v5p"])
    model = preset("tiny")
    recipe = Recipe(run_dir="x", model=model, mesh=MeshConfig(data=1, fsdp=2, expert=4))
    layers, latent, rotated = 3, 32, 16
    assert (model.num_hidden_layers, model.kv_lora_rank, model.qk_rope_head_dim) == (layers, latent, rotated)
    program = stages.decode(recipe, topology, DecodeOptions(16, 512))
    assert program.memory["KV cache"] == layers * (16 // 8) * 512 * (latent + rotated) * 4
    program = stages.decode(recipe, topology, DecodeOptions(16, 512, int8_kv_cache=True))
    assert program.memory["KV cache"] == layers * (16 // 8) * 512 * (latent + rotated + 8)


def test_a_plan_of_adapters_has_their_gradients_and_moments_alone() -> None:
    sft = SFTConfig(steps=1, data=("chats.jsonl",), batch_size=8, sequence_length=32)
    recipe = Recipe(run_dir="x", mesh=MeshConfig(data=1, fsdp=2, expert=2, tensor=2), sft=sft)
    topology = open_topology("cpu:8")
    full = stages.sft(recipe, topology)
    lora = stages.sft(dataclasses.replace(recipe, lora=LoRAConfig(rank=8)), topology)
    adapters = lora.memory["gradients"]
    assert 0 < adapters < full.memory["gradients"] / 4
    assert lora.memory["parameters"] == pytest.approx(full.memory["parameters"] + adapters)
    assert lora.memory["optimizer"] == pytest.approx(2 * adapters, rel=0.01)  # and counters
    assert full.useful_flops / 2 < lora.useful_flops < full.useful_flops
