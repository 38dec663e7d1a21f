"""Causal attention with memory linear in the sequence length; and a training step on 32,768 tokens.

    python benchmarks/attention.py

Forward and backward of `ops.attention` from 1 K to 16 K tokens, compared with its plain reference up to 4 K: 8 heads,
keys of 48 and values of 32, float32. Then training steps of a 4-layer model, hidden 256, full rematerialisation, on
one sequence of 4 K and of 32 K tokens, each in its own process to measure its peak memory. Medians of three, one step.
"""

import dataclasses
import multiprocessing
import resource
import time
from statistics import median

import jax
import jax.numpy as jnp
from model import CFG, stepper

from mla_moe.config.parallelism import AttentionKernel
from mla_moe.nn.model_costs import train_flops_per_token
from mla_moe.ops.attention import attention
from mla_moe.parallel.compiler_options import compiler_options

HEADS, KEY, VALUE = 8, 48, 32


def seconds(length: int, implementation: AttentionKernel) -> float:
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (1, length, HEADS, w)) for key, w in zip(keys, (KEY, KEY, VALUE), strict=True))

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.sum(attention(q, k, v, None, scale=KEY**-0.5, implementation=implementation) ** 2)

    f = jax.jit(jax.grad(loss, (0, 1, 2)), compiler_options=compiler_options())
    jax.block_until_ready(f(q, k, v))
    times = []
    for _ in range(3):
        start = time.perf_counter()
        jax.block_until_ready(f(q, k, v))
        times.append(time.perf_counter() - start)
    return median(times)


def step(length: int) -> tuple[float, float, float]:
    """Seconds and FLOPs of a training step, and the peak memory of the process in GB."""
    cfg = dataclasses.replace(CFG, num_hidden_layers=4, max_position_embeddings=32768)
    seconds = stepper(cfg, "float32", 1, length, remat="full")()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return seconds, train_flops_per_token(cfg, length) * length, peak


def main() -> None:
    print(f"{'tokens':>8}{'GFLOP':>10}{'blockwise, s':>14}{'GFLOP/s':>10}{'reference, s':>14}")
    for length in (1024, 2048, 4096, 8192, 16384):
        flops = (
            3 * HEADS * (KEY + VALUE) * length**2
        )  # causal: half of the scores; the backward pass costs twice the forward pass
        blockwise = seconds(length, "blockwise")
        row = f"{length:8,}{flops / 1e9:10.1f}{blockwise:14.2f}{flops / blockwise / 1e9:10.0f}"
        print(row + (f"{seconds(length, 'reference'):14.2f}" if length <= 4096 else ""), flush=True)

    print(f"\n{'step of one sequence':>22}{'s':>8}{'GFLOP/s':>10}{'peak memory, GB':>18}")
    for length in (4096, 32768):
        with multiprocessing.get_context("spawn").Pool(1) as process:
            step_seconds, flops, peak = process.apply(step, (length,))
        print(f"{length:22,}{step_seconds:8.2f}{flops / step_seconds / 1e9:10.0f}{peak:18.2f}", flush=True)


if __name__ == "__main__":
    main()
