"""Grouped matmul: each implementation compared with one dense batched product of the same FLOPs.

    python benchmarks/grouped_matmul.py

16,384 rows (4,096 tokens, top-4), 32 experts of 256 x 256, float32; balanced, and with half of the rows on
one expert. Medians of five, in milliseconds and as multiples of the dense product, which alternates with the others.
"""

import time
from collections.abc import Callable
from functools import partial
from statistics import median

import jax
import jax.numpy as jnp
import numpy as np

from mla_moe.config.parallelism import GroupedMatmulKernel
from mla_moe.ops.experts import block_size
from mla_moe.ops.grouped_matmul import grouped_matmul
from mla_moe.parallel.compiler_options import compiler_options

ROWS, EXPERTS, DEPTH, WIDTH, RUNS = 16384, 32, 256, 256, 5
LOADS = {
    "balanced": np.full(EXPERTS, ROWS // EXPERTS),
    "half on one": np.array([ROWS // 2] + [ROWS // 2 // (EXPERTS - 1)] * (EXPERTS - 1)),
}
IMPLEMENTATIONS: tuple[GroupedMatmulKernel, ...] = ("chunks", "blocks", "ragged")


def forward_and_backward(f: Callable) -> tuple[Callable, Callable]:
    jit = partial(jax.jit, compiler_options=compiler_options())
    return jit(f), jit(jax.grad(lambda x, w: jnp.sum(f(x, w) ** 2), (0, 1)))


def grouped(load: np.ndarray, implementation: GroupedMatmulKernel) -> tuple[Callable, int]:
    """The implementation for this load, and the number of rows of its buffer, as in `ops.permutation`."""
    block = block_size(ROWS, EXPERTS, implementation)
    sizes = jnp.asarray(-(-load // block) * block)

    def f(x_RD: jax.Array, w_EDF: jax.Array) -> jax.Array:
        return grouped_matmul(x_RD, w_EDF, sizes, block=block, implementation=implementation)

    return f, ROWS + EXPERTS * block


def dense(x_RD: jax.Array, w_EDF: jax.Array) -> jax.Array:
    return jnp.einsum("emD,eDF->emF", x_RD.reshape(EXPERTS, -1, DEPTH), w_EDF)


def main() -> None:
    key_x, key_w = jax.random.split(jax.random.key(0))
    x = jax.random.normal(key_x, (ROWS, DEPTH))
    w = jax.random.normal(key_w, (EXPERTS, DEPTH, WIDTH))
    print(f"{'':26}{'forward, ms':>12}{'/ dense':>9}{'with backward':>15}{'/ dense':>9}")
    cases = {"dense": (dense, ROWS)} | {
        f"{name}, {load}": grouped(LOADS[load], name) for load in LOADS for name in IMPLEMENTATIONS
    }
    for name, (f, rows) in cases.items():
        times, x_RD = [], jnp.pad(x, ((0, rows - ROWS), (0, 0)))
        for own, peer in zip(forward_and_backward(f), forward_and_backward(dense), strict=True):
            runs = ([], [])
            for function, rows_in, measured in ((own, x_RD, runs[0]), (peer, x, runs[1])) * (RUNS + 1):
                start = time.perf_counter()
                jax.block_until_ready(function(rows_in, w))
                measured.append(time.perf_counter() - start)
            times += [median(measured[1:]) * 1e3 for measured in runs]  # the first run compiles
        forward, dense_forward, both, dense_both = times
        row = f"{name:26}{forward:12.1f}{forward / dense_forward:9.2f}{both:15.1f}{both / dense_both:9.2f}"
        print(row, flush=True)


if __name__ == "__main__":
    main()
