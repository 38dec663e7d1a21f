"""Convert a synthetic V3-shaped checkpoint in both directions, compared with a plain copy of the same files.

    python benchmarks/convert.py [--gigabytes 6] [--directory DIR]
    python benchmarks/convert.py --int4 6 12 [--directory DIR]

The checkpoint has many experts in FP8 blocks, and the rest in bfloat16. Each conversion, and each copy of its source,
runs in its own process; the conversion's peak resident memory is printed. `of copy` is the conversion's speed as a
fraction of the copy's. The clock stops when all bytes are on the disk.

With `--int4` it has the layout and the widths of Kimi-K2.6, experts in INT4 beside a vision tower, in each of these
sizes; each conversion starts from the result of the last one, and nothing is copied. Both directions need disk for four
times the largest size.
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

from mla_moe import ModelConfig, preset
from mla_moe.checkpoint.convert import convert
from mla_moe.checkpoint.hf_mapping import tensor_mappings
from mla_moe.checkpoint.quantization import E4M3, FP8_BLOCKS, INT4_GROUPS, Scheme, written_config
from mla_moe.checkpoint.safetensors_reader import BFLOAT16
from mla_moe.checkpoint.safetensors_writer import TensorEntry, write_checkpoint

TASKS: dict[str, Callable[[Path, Path], None]] = {
    "copy": lambda src, dst: _synced(shutil.copytree(src, dst)),
    "FP8 to bfloat16": lambda src, dst: convert(src, dst),
    "bfloat16 to FP8": lambda src, dst: convert(src, dst, quantize="fp8"),
    "FP8 to Orbax": lambda src, dst: convert(src, dst, to="orbax"),
    "Orbax to bfloat16": lambda src, dst: convert(src, dst),
    "INT4 to bfloat16": lambda src, dst: convert(src, dst),
    "bfloat16 to INT4": lambda src, dst: convert(src, dst, quantize="int4"),
    "INT4 to Orbax": lambda src, dst: convert(src, dst, to="orbax"),
    "Orbax to INT4": lambda src, dst: convert(src, dst, quantize="int4"),
}


def like_v3(gigabytes: float) -> ModelConfig:
    """V3 in small, with as many experts in FP8 as fit."""
    base = dataclasses.replace(
        preset("deepseek-v3"), num_hidden_layers=3, first_k_dense_replace=1, hidden_size=2048,
        moe_intermediate_size=1024, intermediate_size=8192, num_attention_heads=32,
    )  # fmt: skip
    expert = 3 * base.hidden_size * base.moe_intermediate_size
    rest = 4 * base.vocab_size * base.hidden_size * 2 / 1e9
    experts = max(int((gigabytes - rest) * 1e9 / expert / 3) // 8 * 8, 16)  # two layers and the MTP module
    return dataclasses.replace(base, n_routed_experts=experts)


def like_kimi(gigabytes: float) -> ModelConfig:
    """Kimi-K2.6 with three layers, a small vocabulary, and as many experts in INT4 as fit: 4.5 bits a weight."""
    base = dataclasses.replace(preset("kimi-k2.5"), num_hidden_layers=3, vocab_size=16384)
    expert = 3 * base.hidden_size * base.moe_intermediate_size * 4.5 / 8
    return dataclasses.replace(base, n_routed_experts=int((gigabytes - 2.1) * 1e9 / expert / 2) // 8 * 8)


def synthetic(path: Path, cfg: ModelConfig, scheme: Scheme) -> None:
    """Write a checkpoint whose matrices are random, those that `scheme` selects as random codes and scales."""
    noise = (0.02 * np.random.default_rng(0).standard_normal(1 << 22)).astype(np.float32)
    by_dtype = {np.dtype(d): noise.astype(d) for d in (np.float32, ml_dtypes.bfloat16)}
    by_dtype[E4M3] = (1000 * noise).astype(E4M3)
    by_dtype[np.dtype(np.int32)] = np.random.default_rng(0).integers(-(2**31), 2**31, 1 << 22, np.int32)
    entries = []

    def add(name: str, dtype: np.dtype, shape: tuple[int, ...]) -> None:
        size = int(np.prod(shape))
        starts = range(0, size, noise.size)
        entries.append(TensorEntry(name, dtype, shape, lambda: (by_dtype[dtype][: size - start] for start in starts)))

    for mapping in tensor_mappings(cfg):
        name, shape = mapping.name, mapping.shape
        if not scheme.selects(name):
            add(name, np.dtype(np.float32) if name.endswith("bias") else BFLOAT16, shape)
            continue
        add(scheme.code_name(name), scheme.code_dtype, scheme.code_shape(shape))
        add(scheme.scale_name(name), BFLOAT16 if scheme.packed else np.dtype(np.float32), scheme.scale_shape(shape))
        if scheme.packed:
            sizes = np.array(shape, np.int64)
            entries.append(TensorEntry(scheme.shape_name(name), sizes.dtype, (2,), lambda sizes=sizes: [sizes]))
    for module in cfg.architecture.unused_modules:
        add(f"{module}.proj.weight", BFLOAT16, (4608, 7168))
    config = cfg.to_hf() | {"torch_dtype": "bfloat16", "quantization_config": written_config(scheme, [], cfg)}
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
    synthetic(fp8, like_v3(gigabytes), FP8_BLOCKS)
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


def memory_table(sizes: list[float], directory: Path) -> None:
    """Peak memory of INT4 to bfloat16 and Orbax and back, by the size of the checkpoint."""
    print(f"{'task':18}{'source GB':>10}{'result GB':>10}{'seconds':>9}{'peak GB':>9}")
    for size in sizes:
        source, target = directory / "source", directory / "target"
        synthetic(source, like_kimi(size), INT4_GROUPS)
        for task in ("INT4 to bfloat16", "bfloat16 to INT4", "INT4 to Orbax", "Orbax to INT4"):
            seconds, peak = measured(task, source, target)
            row = f"{task:18}{_gigabytes(source):10.2f}{_gigabytes(target):10.2f}"
            print(f"{row}{seconds:9.1f}{peak:9.2f}", flush=True)
            shutil.rmtree(source)
            target.rename(source)
        shutil.rmtree(source)


def _gigabytes(directory: Path) -> float:
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file()) / 1e9


def _synced(path: Path) -> None:
    files = [str(file) for file in path.rglob("*") if file.is_file()]
    subprocess.run(["xargs", "sync"], input="\n".join(files), text=True, check=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=6)
    parser.add_argument("--directory", type=Path, help="temporary files go here: four times the size of the checkpoint")
    parser.add_argument("--int4", type=float, nargs="+", metavar="GIGABYTES", help="sizes of checkpoints with INT4")
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
            if args.int4:
                memory_table(args.int4, Path(directory))
            else:
                table(args.gigabytes, Path(directory))
