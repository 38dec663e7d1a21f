"""Published peaks of accelerators, one entry per JAX device: for MFU in training and for the estimates of a plan.

Sources: Google Cloud's pages "TPU v5e", "TPU v5p", "TPU v6e" and "TPU7x (Ironwood)" (FLOP/s, HBM, both networks of a
chip), NVIDIA's data sheets of A100, H100, H200 and B200. A TPU7x chip is two JAX devices, each with half of its
figures.
"""

import math
import time
from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Accelerator:
    """Peaks of one JAX device."""

    device_kinds: tuple[str, ...]
    """The values of `jax.Device.device_kind`."""
    flops: float
    """Dense bfloat16 FLOP/s."""
    hbm_bytes: float
    """Memory that XLA lets a program use, a little less than what is built in."""
    hbm_bandwidth: float
    """Bytes/s."""
    link: float
    """Bytes/s in one direction. TPU: the device's part of one ICI link, of which a chip has two per torus dimension.
    GPU: all NVLinks together."""
    network: float
    """Bytes/s in one direction per device between slices or hosts (DCN, InfiniBand)."""
    matmul_tile: int = 128
    """Width of a matrix unit, or of a GPU's tiles: smaller products leave a part of it unused."""


GIB = 2.0**30

ACCELERATORS = {
    # ICI 400 GB/s in both directions over 4 links; 2 × 100 Gbit/s of network per host of 8.
    "v5e": Accelerator(("TPU v5 lite",), 197e12, 15.75 * GIB, 819e9, 50e9, 3.1e9),
    # ICI 1,200 GB/s in both directions over 6 links; 50 Gbit/s of network.
    "v5p": Accelerator(("TPU v5", "TPU v5p"), 459e12, 95.74 * GIB, 2765e9, 100e9, 6.2e9),
    # ICI 800 GB/s in both directions over 4 links; 100 Gbit/s of network.
    "v6e": Accelerator(("TPU v6 lite",), 918e12, 31.25 * GIB, 1638e9, 100e9, 12.5e9, 256),
    # Per chip, which is two devices: ICI 1,200 GB/s in both directions over 6 links; 100 Gbit/s of network.
    "v7x": Accelerator(("TPU7x",), 2307e12 / 2, 94.75 * GIB, 7380e9 / 2, 100e9 / 2, 6.2e9, 256),
    # NVLink 4: 900 GB/s in both directions; one 400 Gbit/s adapter per GPU, as in a DGX.
    "h100": Accelerator(("NVIDIA H100 80GB HBM3",), 989e12, 79.1 * GIB * 0.97, 3350e9, 450e9, 50e9),
    "h200": Accelerator(("NVIDIA H200",), 989e12, 139.8 * GIB * 0.97, 4800e9, 450e9, 50e9),
    # NVLink 5: 1,800 GB/s in both directions.
    "b200": Accelerator(("NVIDIA B200",), 2250e12, 179.0 * GIB * 0.97, 8000e9, 900e9, 50e9),
    # NVLink 3: 600 GB/s in both directions; one 200 Gbit/s adapter per GPU, as in a DGX.
    "a100": Accelerator(("NVIDIA A100-SXM4-80GB",), 312e12, 79.3 * GIB * 0.97, 2039e9, 300e9, 25e9),
}

TPUS = {"v5e": "v5e", "v5p": "v5p", "v6e": "v6e", "v7x": "tpu7x"}
"""Name in `ACCELERATORS` -> the TPU compiler's name."""

_GPU = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: {shared}
  threads_per_core_limit: 2048 core_count: {cores} fpus_per_core: {units} block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: {bandwidth} l2_cache_size: {cache}
  clock_rate_ghz: {clock} device_memory_size: {memory} shared_memory_per_block_optin: {shared_optin}
  cuda_compute_capability {{ major: {major} }} registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} device_description_str: "{kind}"
"""
_HOPPER = {"major": 9, "cores": 132, "units": 128, "clock": 1.98, "cache": 52428800}
_HOPPER |= {"shared": 233472, "shared_optin": 232448}
_BLACKWELL = _HOPPER | {"major": 10, "cores": 148, "clock": 1.965, "cache": 132120576}
_AMPERE = {"major": 8, "cores": 108, "units": 64, "clock": 1.41, "cache": 41943040}
_AMPERE |= {"shared": 167936, "shared_optin": 166912}

GPUS = {
    # name in ACCELERATORS -> the GPU compiler's description of an absent device (a GpuTargetConfigProto)
    "h100": _GPU.format(**_HOPPER, bandwidth=3352320000000, memory=84978434048, kind="NVIDIA H100 80GB HBM3"),
    "h200": _GPU.format(**_HOPPER, bandwidth=4814592000000, memory=150120000000, kind="NVIDIA H200"),
    "b200": _GPU.format(**_BLACKWELL, bandwidth=8000000000000, memory=191510000000, kind="NVIDIA B200"),
    "a100": _GPU.format(**_AMPERE, bandwidth=2039000000000, memory=85100000000, kind="NVIDIA A100-SXM4-80GB"),
}


def peak_flops(device: jax.Device) -> float | None:
    """Peak FLOP/s of a device: from the table, None for an accelerator that the table lacks. For a CPU it is the
    fastest of a few float32 matrix products, which takes about 0.2 s."""
    if device.platform != "cpu":
        return next((a.flops for a in ACCELERATORS.values() if device.device_kind in a.device_kinds), None)
    size, best = 1536, math.inf
    a = jax.device_put(jnp.ones((size, size), jnp.float32), device)
    multiply = jax.jit(lambda a: a @ a)
    multiply(a).block_until_ready()
    for _ in range(4):
        start = time.perf_counter()
        multiply(a).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
