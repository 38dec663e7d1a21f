"""Multiplying rows by their experts' matrices: each implementation beside one dense batched product of as many FLOPs.

    python benchmarks/grouped_matmul.py

16,384 rows (4,096 tokens, top-4), 32 experts of 256 x 256, float32; balanced, and with one expert holding half of the
rows. Medians of five, in milliseconds and as multiples of the dense product, which takes turns with the others.
"""

import time
from collections.abc import Callable
from functools import partial
from statistics import median

import jax
import jax.numpy as jnp
import numpy as np

from mla_moe.config import MeshConfig
from mla_moe.ops.experts import block_size
from mla_moe.ops.grouped_matmul import Implementation, grouped_matmul
from mla_moe.parallel.mesh import make_mesh
from mla_moe.training.step import compiler_options

ROWS, EXPERTS, DEPTH, WIDTH, TURNS = 16384, 32, 256, 256, 5
LOADS = {
    "balanced": np.full(EXPERTS, ROWS // EXPERTS),
    "half on one": np.array([ROWS // 2] + [ROWS // 2 // (EXPERTS - 1)] * (EXPERTS - 1)),
}
IMPLEMENTATIONS: tuple[Implementation, ...] = ("chunks", "blocks", "ragged")


def forward_and_backward(f: Callable) -> tuple[Callable, Callable]:
    compiled = partial(jax.jit, compiler_options=compiler_options(make_mesh(MeshConfig(), jax.devices()[:1])))
    return compiled(f), compiled(jax.grad(lambda x, w: jnp.sum(f(x, w) ** 2), (0, 1)))


def multiply(load: np.ndarray, implementation: Implementation) -> tuple[Callable, int]:
    """And the rows of the buffer that it works on, as `ops.dispatch` makes it."""
    block = block_size(ROWS, EXPERTS, implementation)
    sizes = jnp.asarray(-(-load // block) * block)

    def f(x_RD, w_EDF):
        return grouped_matmul(x_RD, w_EDF, sizes, block=block, implementation=implementation)

    return f, ROWS + EXPERTS * block


def dense(x_RD, w_EDF):
    return jnp.einsum("emD,eDF->emF", x_RD.reshape(EXPERTS, -1, DEPTH), w_EDF)


def main() -> None:
    key_x, key_w = jax.random.split(jax.random.key(0))
    x = jax.random.normal(key_x, (ROWS, DEPTH))
    w = jax.random.normal(key_w, (EXPERTS, DEPTH, WIDTH))
    print(f"{'':26}{'forward, ms':>12}{'/ dense':>9}{'with backward':>15}{'/ dense':>9}")
    cases = {"dense": (dense, ROWS)} | {
        f"{name}, {load}": multiply(LOADS[load], name) for load in LOADS for name in IMPLEMENTATIONS
    }
    for name, (f, rows) in cases.items():
        times, x_RD = [], jnp.pad(x, ((0, rows - ROWS), (0, 0)))
        for mine, floor in zip(forward_and_backward(f), forward_and_backward(dense), strict=True):
            turns = ([], [])
            for function, rows_in, kept in ((mine, x_RD, turns[0]), (floor, x, turns[1])) * (TURNS + 1):
                start = time.perf_counter()
                jax.block_until_ready(function(rows_in, w))
                kept.append(time.perf_counter() - start)
            times += [median(kept[1:]) * 1e3 for kept in turns]
        own, floor, own_both, floor_both = times
        print(f"{name:26}{own:12.1f}{own / floor:9.2f}{own_both:15.1f}{own_both / floor_both:9.2f}", flush=True)


if __name__ == "__main__":
    main()
