"""A training step of one's own with the public modules, compared with `transformers` in eager PyTorch.

    python benchmarks/importer.py --torch PYTHON [--isa avx2]

The 18.6 M model in float32 through `mla_moe.Transformer`, `optax.adamw` and a plain `jax.jit` with
`mla_moe.compiler_options()`, as docs/importing.md tells, at three shapes of 4,096 tokens. Both sides compute the
gradients of all parameters, clip their norm and update by AdamW, and have huge pages. They alternate; medians of 15.
`--isa avx2` holds both to AVX2 on a processor that has more. `--torch` is a Python with PyTorch and `transformers`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from model import CFG

import mla_moe
from train import PEER

SHAPES = ((16, 256), (8, 512), (2, 2048))
RUNS = 15
"""Of each; a step may take twice as long as the one before, so medians of five differ by a fifth."""
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
AVX2 = {
    "XLA_FLAGS": "--xla_cpu_max_isa=AVX2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}


def stepper(model: mla_moe.Transformer, batch: int, length: int) -> Callable[[], float]:
    """A function that runs one step and returns its seconds. It is already compiled."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    params = jax.tree.map(jnp.copy, params)  # the step donates them
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-4))
    moments = tx.init(params)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, CFG.vocab_size, (batch, length), dtype=np.int32))

    def step(params: Any, moments: Any, tokens: jax.Array) -> tuple[Any, Any, jax.Array]:
        def loss(params: Any) -> jax.Array:
            logits = nnx.merge(graph, params, rest)(tokens)
            return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()

        value, gradients = jax.value_and_grad(loss)(params)
        updates, moments = tx.update(gradients, moments, params)
        return optax.apply_updates(params, updates), moments, value

    compiled = jax.jit(step, donate_argnums=(0, 1), compiler_options=mla_moe.compiler_options())

    def run() -> float:
        nonlocal params, moments
        start = time.perf_counter()
        params, moments, value = compiled(params, moments, tokens)
        jax.block_until_ready((params, value))
        return time.perf_counter() - start

    run()
    return run


def compare(torch: str, model: mla_moe.Transformer, path: Path, batch: int, length: int) -> None:
    ours, mine, theirs = stepper(model, batch, length), [], []
    command = [torch, "-c", PEER, str(path), "float32", str(batch), str(length)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as peer:
        assert peer.stdin is not None
        assert peer.stdout is not None
        experts = peer.stdout.readline().strip()
        for _ in range(RUNS):
            mine.append(ours())
            print(file=peer.stdin, flush=True)
            theirs.append(json.loads(peer.stdout.readline()))
        peer.stdin.close()
    rates = [batch * length / median(seconds) for seconds in (mine, theirs)]
    print(
        f"{f'{batch} x {length:,}':12}{rates[0]:10,.0f}{rates[1]:14,.0f}{rates[0] / rates[1]:8.2f}  {experts}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", required=True, help="a Python with PyTorch and transformers")
    parser.add_argument("--isa", choices=("avx2",))
    args = parser.parse_args()
    wanted = HUGE_PAGES | (AVX2 if args.isa else {})
    if not wanted.items() <= os.environ.items():  # they are read when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | wanted)
    model = mla_moe.Transformer(CFG, rngs=nnx.Rngs(0), scan_layers=False)
    print(f"{'shape':12}{'tokens/s':>10}{'transformers':>14}{'times':>8}  its experts")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        mla_moe.save_pretrained(model, path)
        for batch, length in SHAPES:
            compare(args.torch, model, path, batch, length)


if __name__ == "__main__":
    main()
