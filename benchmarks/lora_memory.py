"""Memory of a LoRA step: planned, and measured in a process that runs it, on one CPU.

    python benchmarks/lora_memory.py [--only int4 …]

Planned is what `mla-moe plan --stage sft --topology cpu:1` says of the same recipe. Measured are the live arrays before
the step, and how far the resident memory of the process rises above what it is then while the step runs.
"""

import argparse
import ctypes
import gc
import multiprocessing
import re
from pathlib import Path

import jax
import numpy as np

from mla_moe.config import LoRAConfig, ModelConfig, OptimizerConfig, Recipe, SFTConfig, TrainingConfig
from mla_moe.parallel.mesh import make_mesh
from mla_moe.plan.plan import make_plan
from mla_moe.plan.topology import open_topology
from mla_moe.training.optimizer import make_optimizer
from mla_moe.training.run_context import make_abstract_model, put_batch
from mla_moe.training.step import abstract_state, init_state, make_train_step

MODEL = ModelConfig(
    vocab_size=8192, hidden_size=512, num_hidden_layers=9, num_attention_heads=8, intermediate_size=1024,
    moe_intermediate_size=256, n_routed_experts=64, num_experts_per_tok=4, kv_lora_rank=128, q_lora_rank=128,
    qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64, max_position_embeddings=1024,
)  # fmt: skip
ROWS = {
    "float32 base": ("float32", ()),
    "bfloat16 base": ("bfloat16", ()),
    "fp8 base": ("bfloat16", ("fp8",)),
    "int4 base": ("bfloat16", ("int4",)),
}
"""Compute dtype, and `lora.quantize_base`."""


def recipe(dtype: str, formats: tuple[str, ...]) -> Recipe:
    return Recipe(
        run_dir="",
        model=MODEL,
        training=TrainingConfig(steps=0, remat="full", compute_dtype=dtype),
        lora=LoRAConfig(rank=16, targets=("attention", "dense", "shared", "experts=4"), quantize_base=formats),
        sft=SFTConfig(
            steps=1, data=("none",), batch_size=4, sequence_length=1024, optimizer=OptimizerConfig(weight_decay=0.0)
        ),
    )


def resident(field: str) -> float:
    """Bytes of this process that are in memory: `VmRSS` now, `VmHWM` at most since the last reset."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024.0 * int(found[1])


def measure(name: str) -> tuple[float, float, float, float]:
    """Bytes: arguments and temporaries as planned, live arrays, and the rise while the step runs."""
    settings = recipe(*ROWS[name])
    plan = make_plan(settings, open_topology("cpu:1"), "sft")
    mesh = make_mesh(settings.mesh, jax.devices()[:1])
    training = settings.sft.training(settings.training, 1)
    model = make_abstract_model(settings, mesh, settings.lora)
    tx = make_optimizer(settings.sft.optimizer, 1, model)
    shape = training.batch_size, training.sequence_length
    ones = np.ones(shape, np.int32)
    batch = {"tokens": ones, "targets": ones, "segment_ids": ones, "positions": ones * np.arange(shape[1])}
    arrays = put_batch({key: np.asarray(x, np.int32) for key, x in batch.items()}, shape[0], mesh)
    step = make_train_step(model, tx, training, mesh).lower(abstract_state(model, tx, mesh), arrays).compile()
    random = np.random.default_rng(0)

    def draw(array: jax.ShapeDtypeStruct) -> jax.Array:
        values = random.integers(0, 100, array.shape, np.uint8)
        values = values if np.issubdtype(array.dtype, np.integer) else values * np.float32(1e-4)
        return jax.device_put(values.astype(array.dtype), array.sharding)

    state = init_state(model, tx, 0, mesh, {path: draw(array) for path, array in model.abstract(mesh).items()})
    jax.block_until_ready(state)
    live = float(sum(x.nbytes for x in jax.live_arrays()))
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what the compiler has freed would hold temporaries
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = resident("VmRSS")
    jax.block_until_ready(step(state, arrays))
    return plan.argument_bytes, plan.temp_bytes, live, resident("VmHWM") - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], help="parts of the names of rows")
    only = parser.parse_args().only
    print("MB, planned: arguments + temporaries; measured: live arrays + rise")
    for name in ROWS:
        if only and not any(part in name for part in only):
            continue
        with multiprocessing.get_context("spawn").Pool(1) as pool:  # a process for each, whose memory is its own
            arguments, temporaries, live, rise = (size / 1e6 for size in pool.apply(measure, (name,)))
        planned, measured = arguments + temporaries, live + rise
        row = f"{name:15}{arguments:7.0f} + {temporaries:5.0f} = {planned:6.0f}"
        print(f"{row}  {live:7.0f} + {rise:5.0f} = {measured:6.0f}  {measured / planned - 1:+.1%}", flush=True)


if __name__ == "__main__":
    main()
