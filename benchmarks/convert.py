"""Convert a synthetic V3-shaped checkpoint in both directions, compared with a plain copy of the same files.

    python benchmarks/convert.py [--gigabytes 6] [--directory DIR]

The checkpoint has many experts in FP8 blocks, and the rest in bfloat16. Each conversion, and each copy of its source,
runs in its own process; the conversion's peak resident memory is printed. `of copy` is the conversion's speed as a
fraction of the copy's. The clock stops when all bytes are on the disk.
"""

import argparse
import dataclasses
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np

from mla_moe import preset
from mla_moe.checkpoint import fp8 as fp8_blocks
from mla_moe.checkpoint.convert import convert
from mla_moe.checkpoint.hf_mapping import tensor_mappings
from mla_moe.checkpoint.safetensors_writer import TensorEntry, write_checkpoint

TASKS: dict[str, Callable[[Path, Path], None]] = {
    "copy": lambda src, dst: _synced(shutil.copytree(src, dst)),
    "FP8 to bfloat16": lambda src, dst: convert(src, dst),
    "bfloat16 to FP8": lambda src, dst: convert(src, dst, fp8=True),
    "FP8 to Orbax": lambda src, dst: convert(src, dst, to="orbax"),
    "Orbax to bfloat16": lambda src, dst: convert(src, dst),
}


def synthetic(path: Path, gigabytes: float) -> None:
    """Write a checkpoint like V3's with as many experts as fit in `gigabytes`: 2 bytes per bfloat16, 1 per FP8."""
    base = dataclasses.replace(
        preset("deepseek-v3"), num_hidden_layers=3, first_k_dense_replace=1, hidden_size=2048,
        moe_intermediate_size=1024, intermediate_size=8192, num_attention_heads=32,
    )  # fmt: skip
    expert = 3 * base.hidden_size * base.moe_intermediate_size
    rest = 4 * base.vocab_size * base.hidden_size * 2 / 1e9
    experts = max(int((gigabytes - rest) * 1e9 / expert / 3) // 8 * 8, 16)  # two layers and the MTP module
    cfg = dataclasses.replace(base, n_routed_experts=experts)
    noise = (0.02 * np.random.default_rng(0).standard_normal(1 << 22)).astype(np.float32)
    by_dtype = {np.dtype(d): noise.astype(d) for d in (np.float32, ml_dtypes.bfloat16)}
    by_dtype[np.dtype(fp8_blocks.E4M3)] = (1000 * noise).astype(fp8_blocks.E4M3)

    def entry(name: str, dtype: np.dtype, shape: tuple[int, ...]) -> TensorEntry:
        size = int(np.prod(shape))
        starts = range(0, size, noise.size)
        return TensorEntry(name, dtype, shape, lambda: (by_dtype[dtype][: size - start] for start in starts))

    entries = []
    for mapping in tensor_mappings(cfg):
        quantized = fp8_blocks.is_quantized(mapping.name)
        bias = mapping.name.endswith("bias")
        dtype = np.dtype(fp8_blocks.E4M3 if quantized else np.float32 if bias else ml_dtypes.bfloat16)
        entries.append(entry(mapping.name, dtype, mapping.shape))
        if quantized:
            entries.append(
                entry(fp8_blocks.scale_name(mapping.name), np.dtype(np.float32), fp8_blocks.scale_shape(mapping.shape))
            )
    config = cfg.to_hf() | {"torch_dtype": "bfloat16", "quantization_config": dict(fp8_blocks.QUANTIZATION_CONFIG)}
    write_checkpoint(path, config, entries, 1 << 30, {})


def measured(task: str, src: Path, dst: Path) -> tuple[float, float]:
    """Run a task in a new process: seconds, and peak resident memory in GB."""
    shutil.rmtree(dst, ignore_errors=True)
    os.sync()  # so that earlier writes are not part of the measured time
    command = [sys.executable, __file__, "--task", task, "--source", str(src), "--target", str(dst)]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    result = json.loads(out.splitlines()[-1])
    return result["seconds"], result["peak_gb"]


def table(gigabytes: float, directory: Path) -> None:
    """Copies and conversions alternate, because the speed of memory and disk varies; medians of three."""
    fp8, bfloat16, orbax, out = (directory / name for name in ("fp8", "bfloat16", "orbax", "out"))
    synthetic(fp8, gigabytes)
    print(f"{'task':18}{'source GB':>10}{'result GB':>10}{'seconds':>9}{'copying':>9}{'of copy':>9}{'peak GB':>9}")
    for task, source, target in (
        ("FP8 to bfloat16", fp8, bfloat16), ("bfloat16 to FP8", bfloat16, out),
        ("FP8 to Orbax", fp8, orbax), ("Orbax to bfloat16", orbax, out),
    ):  # fmt: skip
        runs = [(measured("copy", source, out)[0], *measured(task, source, target)) for _ in range(3)]
        copying, seconds, _ = (statistics.median(column) for column in zip(*runs, strict=True))
        peak = max(peak for *_, peak in runs)
        row = f"{task:18}{_gigabytes(source):10.2f}{_gigabytes(target):10.2f}{seconds:9.1f}{copying:9.1f}"
        print(f"{row}{copying / seconds:9.2f}{peak:9.2f}", flush=True)


def _gigabytes(directory: Path) -> float:
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file()) / 1e9


def _synced(path: Path) -> None:
    files = [str(file) for file in path.rglob("*") if file.is_file()]
    subprocess.run(["xargs", "sync"], input="\n".join(files), text=True, check=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=6)
    parser.add_argument("--directory", type=Path, help="temporary files go here: four times the size of the checkpoint")
    for name in ("task", "source", "target"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.task:
        start = time.perf_counter()
        TASKS[args.task](Path(args.source), Path(args.target))
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        print(json.dumps({"seconds": seconds, "peak_gb": peak}))
    else:
        with tempfile.TemporaryDirectory(dir=args.directory) as directory:
            table(args.gigabytes, Path(directory))
