"""Published peaks of accelerators, one entry per JAX device: for MFU in training and for the estimates of a plan.

Sources: Google Cloud's pages "TPU v5e", "TPU v5p", "TPU v6e" and "TPU7x (Ironwood)" (FLOP/s, HBM, both networks of a
chip), NVIDIA's data sheets of H100, H200 and B200. A TPU7x chip is two JAX devices, each with half of its figures.
"""

import math
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


GIB = 2.0**30

ACCELERATORS = {
    # ICI 400 GB/s in both directions over 4 links; 2 × 100 Gbit/s of network per host of 8.
    "v5e": Accelerator(("TPU v5 lite",), 197e12, 15.75 * GIB, 819e9, 50e9, 3.1e9),
    # ICI 1,200 GB/s in both directions over 6 links; 50 Gbit/s of network.
    "v5p": Accelerator(("TPU v5", "TPU v5p"), 459e12, 95.74 * GIB, 2765e9, 100e9, 6.2e9),
    # ICI 800 GB/s in both directions over 4 links; 100 Gbit/s of network.
    "v6e": Accelerator(("TPU v6 lite",), 918e12, 31.25 * GIB, 1638e9, 100e9, 12.5e9),
    # Per chip, which is two devices: ICI 1,200 GB/s in both directions over 6 links; 100 Gbit/s of network.
    "v7x": Accelerator(("TPU7x",), 2307e12 / 2, 94.75 * GIB, 7380e9 / 2, 100e9 / 2, 6.2e9),
    # NVLink 4: 900 GB/s in both directions; one 400 Gbit/s adapter per GPU, as in a DGX.
    "h100": Accelerator(("NVIDIA H100 80GB HBM3",), 989e12, 79.1 * GIB * 0.97, 3350e9, 450e9, 50e9),
    "h200": Accelerator(("NVIDIA H200",), 989e12, 139.8 * GIB * 0.97, 4800e9, 450e9, 50e9),
    # NVLink 5: 1,800 GB/s in both directions. No compiler target here: for MFU in training only.
    "b200": Accelerator(("NVIDIA B200",), 2250e12, 179.0 * GIB * 0.97, 8000e9, 900e9, 50e9),
}

TPUS = {"v5e": "v5e", "v5p": "v5p", "v6e": "v6e", "v7x": "tpu7x"}
"""Name in `ACCELERATORS` -> the TPU compiler's name."""

_HOPPER = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: {bandwidth} l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: {memory} shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: 9 }} registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} device_description_str: "{kind}"
"""

GPUS = {
    # name in ACCELERATORS -> the GPU compiler's description of an absent device (a GpuTargetConfigProto)
    "h100": _HOPPER.format(bandwidth=3352320000000, memory=84978434048, kind="NVIDIA H100 80GB HBM3"),
    "h200": _HOPPER.format(bandwidth=4814592000000, memory=150120000000, kind="NVIDIA H200"),
}


def peak_flops(device: jax.Device) -> float | None:
    """Peak FLOP/s of a device: from the table, measured for a CPU, None for an accelerator that the table lacks."""
    if device.platform == "cpu":
        return _measured_peak(device)
    return next((a.flops for a in ACCELERATORS.values() if device.device_kind in a.device_kinds), None)


def _measured_peak(device: jax.Device, size: int = 1536) -> float:
    """The fastest of a few float32 matrix products; takes about 0.2 s."""
    import time

    a = jax.device_put(jnp.ones((size, size), jnp.float32), device)
    multiply = jax.jit(lambda a: a @ a)
    multiply(a).block_until_ready()
    best = math.inf
    for _ in range(4):
        start = time.perf_counter()
        multiply(a).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
