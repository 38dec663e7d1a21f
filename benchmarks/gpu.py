"""One NVIDIA GPU in under eight minutes: are the kernels correct, and how near to the peaks do they run?

    JAX_PLATFORMS=cuda python benchmarks/gpu.py [--output gpu.json]
    python benchmarks/gpu.py --tiny

Compares the kernels with the references (values, gradients, cached decoding), then measures grouped products beside a
dense product of the same FLOPs, attention, a training step and decoding with DeepSeek-V2-Lite's widths in four layers,
and the quickstart from start to end. Every time is the median of five runs; what can be compared alternates. Prints
tables and writes them as JSON. A part that fails is reported and the others continue; the exit status is then 1.

`--tiny` has small sizes and writes nothing: to try the program itself, on a CPU too.
"""

import argparse
import dataclasses
import json
import math
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from model import stepper

from mla_moe import Precision, Transformer, preset
from mla_moe.nn.model_costs import kv_cache_bytes_per_token, train_flops_per_token
from mla_moe.ops.attention import attention
from mla_moe.ops.experts import block_size
from mla_moe.ops.grouped_matmul import grouped_matmul
from mla_moe.ops.kernel_choice import supported_grouped_matmul_kernel
from mla_moe.parallel.accelerators import ACCELERATORS
from mla_moe.parallel.compiler_options import compiler_options
from mla_moe.training.metrics import read_rows

RUNS = 5
TOLERANCE = 2e-2
"""Of the largest value: products of both are in bfloat16."""
Row = dict[str, Any]

jit = partial(jax.jit, compiler_options=compiler_options())


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def seconds(*calls: Callable[[], Any]) -> list[float]:
    """The median of each; they alternate. The first run, which compiles, does not count."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(RUNS + 1):
        for call, measured in zip(calls, times, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(call())
            measured.append(time.perf_counter() - start)
    return [median(measured[1:]) for measured in times]


def error(got: Any, wanted: Any) -> float:
    """The largest difference of any array, relative to the largest value of the wanted one."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True)
    arrays = [[np.asarray(x, np.float32) for x in pair] for pair in pairs]
    return max(float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-6)) for a, b in arrays)


def checked(name: str, difference: float, tolerance: float = TOLERANCE) -> Row:
    if not difference <= tolerance:
        raise AssertionError(f"{name}: differs by {difference:.2e} of the largest value, more than {tolerance:.0e}")
    return {"check": name, "difference": difference}


class Gpu:
    """The parts of the benchmark, each of which yields rows of one table."""

    def __init__(self, *, tiny: bool):
        self.tiny, self.device = tiny, jax.devices()[0]
        known = (a for a in ACCELERATORS.values() if self.device.device_kind in a.device_kinds)
        self.peaks = next(known, None)
        lite = preset("deepseek-v2-lite")
        self.length, self.batch = (128, 1) if tiny else (4096, 4)
        small = {"hidden_size": 128, "moe_intermediate_size": 64, "intermediate_size": 128, "vocab_size": 512}
        small |= {"n_routed_experts": 8, "num_attention_heads": 2, "kv_lora_rank": 64}
        self.cfg = dataclasses.replace(lite, num_hidden_layers=4, **(small if tiny else {}))

    def of_peak(self, flops_per_second: float) -> float | None:
        return self.peaks and flops_per_second / self.peaks.flops

    def numerics(self) -> Iterator[Row]:
        """Kernels against the references: values and gradients, packed sequences, uneven and empty groups."""
        for A, V in (192, 128), (256, 256):
            q, k, v, weight = (normal(i, 2, 300, 3, width) for i, width in enumerate((A, A, V, V)))
            segments = jnp.sort(jax.random.randint(jax.random.key(4), (2, 300), 0, 4), axis=1)

            def of(implementation: Any, q: Any = q, k: Any = k, v: Any = v, w: Any = weight, s: Any = segments) -> Any:
                def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
                    y = attention(q, k, v, s, scale=q.shape[-1] ** -0.5, implementation=implementation)
                    return (y * w).astype(jnp.float32).sum(), y

                (_, y), gradients = jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
                return y, gradients

            yield checked(f"attention, widths {A} and {V}, packed", error(of(None), of("reference")))
        kernel = supported_grouped_matmul_kernel(None, jnp.bfloat16)
        block = block_size(1024, 4, kernel)
        sizes = jnp.array([0, 3 * block, 0, 1024 // block * block - 3 * block])
        x, w, weight = normal(0, 1024, 256), normal(1, 4, 256, 192), normal(2, 1024, 192)
        inside = (jnp.arange(1024) < sizes.sum())[:, None]

        def grouped(implementation: Any) -> Any:
            def loss(x: jax.Array, w: jax.Array) -> Any:
                y = grouped_matmul(x, w, sizes, block=block, implementation=implementation)
                y = jnp.where(inside, y, 0)
                return (y * weight).astype(jnp.float32).sum(), y

            (_, y), (g_x, g_w) = jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(x, w)
            return y, jnp.where(inside, g_x, 0), g_w

        yield checked("grouped products, two groups empty", error(grouped(kernel), grouped("reference")))
        model = self.model()
        tokens = jax.random.randint(jax.random.key(5), (2, 65), 0, self.cfg.vocab_size)
        empty = model.init_cache(2, 128)
        whole, _ = jit(Transformer.prefill)(model, tokens, empty)
        _, cache = jit(Transformer.prefill)(model, tokens[:, :-1], empty)
        step, _ = jit(Transformer.decode_step)(model, tokens[:, -1], cache)
        yield checked("logits of a decode step, and of a prefill", error(step, whole), 5e-2)

    def model(self) -> Transformer:
        bf16 = Precision(param=jnp.bfloat16, compute=jnp.bfloat16)
        return nnx.jit(lambda: Transformer(self.cfg, rngs=nnx.Rngs(0), precision=bf16))()

    def grouped_products(self) -> Iterator[Row]:
        """Rows by the matrices of their experts, balanced, beside a dense batched product of the same FLOPs."""
        kernel = supported_grouped_matmul_kernel(None, jnp.bfloat16)
        shapes = {
            "V2-Lite, gate and up": (65536, 64, 2048, 2816),
            "V2-Lite, down": (65536, 64, 1408, 2048),
            "V3 of 32 devices, gate and up": (49152, 8, 7168, 4096),
            "V3 of 32 devices, down": (49152, 8, 2048, 7168),
        }
        for name, (R, E, D, F) in shapes.items():
            if self.tiny:
                R, E, D, F = 256, 4, 32, 64
            x, w, g, sizes = normal(0, R, D), normal(1, E, D, F), normal(2, R, F), jnp.full(E, R // E)
            block = math.gcd(block_size(R, E, kernel), R // E)

            def ours(x: jax.Array, w: jax.Array, sizes: Any = sizes, block: int = block) -> jax.Array:
                return grouped_matmul(x, w, sizes, block=block, implementation=kernel)

            def dense(x: jax.Array, w: jax.Array, E: int = E) -> jax.Array:
                return jnp.einsum("emD,eDF->emF", x.reshape(E, -1, x.shape[1]), w).reshape(-1, w.shape[2])

            forward = [partial(jit(f), x, w) for f in (ours, dense)]
            backward = [partial(jit(lambda x, w, g, f=f: jax.vjp(f, x, w)[1](g)), x, w, g) for f in (ours, dense)]
            for direction, times, products in ("forward", seconds(*forward), 1), ("gradients", seconds(*backward), 2):
                rate, dense_rate = (products * 2 * R * D * F / t for t in times)
                yield {
                    "product": name, "direction": direction, "TFLOP/s": rate / 1e12, "dense": dense_rate / 1e12,
                    "of dense": rate / dense_rate, "of peak": self.of_peak(rate),
                }  # fmt: skip

    def attention(self) -> Iterator[Row]:
        """Causal, 2 × 4,096 tokens, 16 heads; the backward pass is counted as twice the FLOPs of the forward pass."""
        B, T, H = (1, 128, 2) if self.tiny else (2, 4096, 16)
        for A, V in (192, 128), (256, 256):
            q, k, v = (normal(i, B, T, H, width) for i, width in enumerate((A, A, V)))
            f = partial(attention, segment_ids_BS=None, scale=A**-0.5)
            forward = partial(jit(f), q, k, v)
            gradient = jit(jax.grad(lambda *qkv, f=f: f(*qkv).astype(jnp.float32).sum(), (0, 1, 2)))
            times = seconds(forward, partial(gradient, q, k, v))
            for direction, t, passes in ("forward", times[0], 1), ("forward and backward", times[1], 3):
                rate = passes * B * H * T * T * (A + V) / t
                yield {
                    "widths": f"{A}, {V}", "direction": direction, "ms": t * 1e3, "TFLOP/s": rate / 1e12,
                    "of peak": self.of_peak(rate),
                }  # fmt: skip

    def training_step(self) -> Iterator[Row]:
        """AdamW in float32, bfloat16 products, V2-Lite's widths in four layers, one of them dense."""
        tokens, flops = self.batch * self.length, train_flops_per_token(self.cfg, self.length)
        for remat in ("dots", "full"):
            step = stepper(self.cfg, "bfloat16", self.batch, self.length, remat)
            t = median(step() for _ in range(RUNS))
            yield {
                "remat": remat, "ms": t * 1e3, "tokens/s": tokens / t, "TFLOP/s": tokens * flops / t / 1e12,
                "MFU": self.of_peak(tokens * flops / t),
            }  # fmt: skip

    def decoding(self) -> Iterator[Row]:
        """One token for each sequence; the floor reads all parameters and the cache once."""
        model = self.model()
        parameters = sum(x.nbytes for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
        prefill, decode = jit(Transformer.prefill), jit(Transformer.decode_step)
        for batch in (2,) if self.tiny else (1, 32, 128):
            context = self.length - 64
            tokens = jax.random.randint(jax.random.key(0), (batch, context), 0, self.cfg.vocab_size)
            cache = model.init_cache(batch, self.length)
            for first in range(0, batch, 8):  # not all at once: prefill needs memory for their activations
                slots = jnp.arange(first, min(first + 8, batch))
                _, cache = prefill(model, tokens[slots], cache, slots=slots)
            (t,) = seconds(lambda cache=cache, last=tokens[:, 0]: decode(model, last, cache))
            read = parameters + batch * context * kv_cache_bytes_per_token(self.cfg)
            floor = self.peaks and read / self.peaks.hbm_bandwidth
            yield {
                "sequences": batch, "cached tokens": context, "ms": t * 1e3, "tokens/s": batch / t,
                "GB to read": read / 1e9, "times floor": floor and t / floor,
            }  # fmt: skip

    def quickstart(self) -> Iterator[Row]:
        """`train.py configs/quickstart.py`, with compilation: pretraining, then RL."""
        root = Path(__file__).parents[1]
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, root / "train.py", root / "configs" / "quickstart.py", "--run-dir", folder]
            command += ["--training.steps", "2", "--rl.steps", "0"] if self.tiny else []
            start = time.perf_counter()
            subprocess.run(list(map(str, command)), cwd=root, check=True, capture_output=True, timeout=300)
            metrics = Path(folder) / "metrics.jsonl"
            rows = [row for row in read_rows(metrics, "rl") if "eval/accuracy" in row]
            accuracy = rows[-1]["eval/accuracy"] if rows else None
        yield {"seconds": time.perf_counter() - start, "correct answers": accuracy}


def table(rows: list[Row]) -> str:
    """In Markdown."""

    def cell(x: Any) -> str:
        return "" if x is None else f"{x:.3g}" if isinstance(x, float) and abs(x) < 1000 else f"{x:,.0f}" \
            if isinstance(x, float) else str(x)  # fmt: skip

    head = list(rows[0])
    lines = [head, ["---"] * len(head), *([cell(row[name]) for name in head] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--tiny", action="store_true", help="small sizes; writes no file")
    arguments = parser.parse_args()
    gpu, start = Gpu(tiny=arguments.tiny), time.perf_counter()
    if gpu.device.platform != "gpu" and not arguments.tiny:
        sys.exit(f"device = {gpu.device.device_kind}: not a GPU; set JAX_PLATFORMS=cuda, or use --tiny")
    result: dict[str, Any] = {"device": gpu.device.device_kind, "jax": jax.__version__, "failed": {}}
    parts = gpu.numerics, gpu.grouped_products, gpu.attention, gpu.training_step, gpu.decoding, gpu.quickstart
    for part in parts:
        name, rows = part.__name__.replace("_", " "), []
        print(f"\n### {name}, after {time.perf_counter() - start:.0f} s\n", flush=True)
        try:
            rows.extend(part())
        except Exception as problem:
            result["failed"][name] = str(problem)
            traceback.print_exc()
        result[name] = rows
        if rows:
            print(table(rows), flush=True)
        if not arguments.tiny:
            arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n{time.perf_counter() - start:.0f} s in all; failed: {', '.join(result['failed']) or 'none'}")
    sys.exit(bool(result["failed"]))


if __name__ == "__main__":
    main()
