"""What a plan says of memory, against what a run takes and what is known by hand."""

import ctypes
import gc
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from mla_moe import preset, recipe
from mla_moe.plan import open_topology, stages
from mla_moe.plan.chips import CHIPS
from mla_moe.plan.plan import bytes_needed
from mla_moe.recipe import Mesh, Recipe
from mla_moe.training.optimizer import make_optimizer
from mla_moe.training.step import init_state


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process's memory can be reset on Linux alone")
def test_the_quickstart_takes_as_much_as_planned():
    """The state and a step's temporaries, within a tenth of how much the process grows."""
    quickstart = recipe.load("configs/quickstart.py")
    program = stages.train(quickstart, open_topology("cpu:1"))
    compiled = program.traced.lower().compile()
    shape = quickstart.training.batch_size, quickstart.training.sequence_length
    batch = dict.fromkeys(("tokens", "targets", "segment_ids", "positions"), jnp.ones(shape, jnp.int32))
    skeleton = stages.make_skeleton(quickstart, program.mesh)
    tx = make_optimizer(quickstart.optimizer, quickstart.training.steps, skeleton)
    state = jax.block_until_ready(init_state(skeleton, tx, 0, program.mesh))
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is the present from here on
    before = memory_of_process("VmRSS")
    jax.block_until_ready(compiled(state, batch))
    arguments, temporaries = bytes_needed(compiled)
    grown = memory_of_process("VmHWM") - before
    assert grown + arguments == pytest.approx(arguments + temporaries, rel=0.1)


def memory_of_process(what: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) * 1024


def test_a_cache_holds_a_latent_and_a_key_of_every_token_and_layer():
    topology = open_topology("cpu:8")._replace(chip=CHIPS["v5p"])
    model = preset("tiny")
    program = stages.decode(
        Recipe(run_dir="x", model=model, mesh=Mesh(fsdp=2, expert=4)), topology, batch=16, context=512
    )
    layers, latent, rotated = 3, 32, 16
    assert (model.num_hidden_layers, model.kv_lora_rank, model.qk_rope_head_dim) == (layers, latent, rotated)
    assert program.kinds["cache"] == layers * (16 // 8) * 512 * (latent + rotated) * 4
