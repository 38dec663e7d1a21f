"""Published peaks of the devices that a recipe can be planned for, one entry per JAX device.

Sources: Google Cloud's pages "TPU v5e", "TPU v5p", "TPU v6e" and "TPU7x (Ironwood)" (FLOP/s, HBM, both networks of a
chip), NVIDIA's data sheets of H100 and H200. A TPU7x chip is two JAX devices, each of which has half of it here.
`hbm_bytes` is what XLA lets a program use, a little less than what is built in.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Chip:
    """Peaks of one device."""

    kind: str
    """As `jax.Device.device_kind` names it."""
    flops: float
    """Dense bfloat16 FLOP/s."""
    hbm_bytes: float
    """Memory that a program may use."""
    hbm_bandwidth: float
    """Bytes/s."""
    link: float
    """Bytes/s in one direction: a device's part of one link of a TPU's torus, of which a chip has two for each
    dimension; of all NVLink of a GPU."""
    network: float
    """Bytes/s in one direction and device between slices or hosts."""


GIB = 2.0**30

CHIPS = {
    # 400 GB/s both ways together over 4 links; 2 × 100 Gbit/s of network for each host of 8.
    "v5e": Chip("TPU v5 lite", 197e12, 15.75 * GIB, 819e9, 50e9, 3.1e9),
    # 1,200 GB/s both ways together over 6 links; 50 Gbit/s of network.
    "v5p": Chip("TPU v5", 459e12, 95.74 * GIB, 2765e9, 100e9, 6.2e9),
    # 800 GB/s both ways together over 4 links; 100 Gbit/s of network.
    "v6e": Chip("TPU v6 lite", 918e12, 31.25 * GIB, 1638e9, 100e9, 12.5e9),
    # 1,200 GB/s both ways together over 6 links, and 100 Gbit/s of network, for a chip of two devices.
    "v7x": Chip("TPU7x", 2307e12 / 2, 94.75 * GIB, 7380e9 / 2, 100e9 / 2, 6.2e9),
    # NVLink 4: 900 GB/s both ways together; one 400 Gbit/s adapter a GPU, as in a DGX.
    "h100": Chip("NVIDIA H100 80GB HBM3", 989e12, 79.1 * GIB * 0.97, 3350e9, 450e9, 50e9),
    "h200": Chip("NVIDIA H200", 989e12, 139.8 * GIB * 0.97, 4800e9, 450e9, 50e9),
}

TPUS = {"v5e": "v5e", "v5p": "v5p", "v6e": "v6e", "v7x": "tpu7x"}
"""Our name of a generation -> the TPU compiler's."""

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
    # name -> what the GPU compiler wants to know of a device that is not there (a GpuTargetConfigProto)
    "h100": _HOPPER.format(bandwidth=3352320000000, memory=84978434048, kind="NVIDIA H100 80GB HBM3"),
    "h200": _HOPPER.format(bandwidth=4814592000000, memory=150120000000, kind="NVIDIA H200"),
}


# Dense bfloat16 FLOP/s of one chip, from the makers' data sheets, by `jax.Device.device_kind`.
PEAK_FLOPS = {
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU7x": 2307e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}


def peak_flops(device: jax.Device) -> float | None:
    """FLOP/s of a device: from the table, or measured for a CPU; None for an accelerator that the table lacks."""
    return _measured_peak(device) if device.platform == "cpu" else PEAK_FLOPS.get(device.device_kind)


def _measured_peak(device: jax.Device, size: int = 1536) -> float:
    """The best of a few float32 matrix products, about 0.2 s."""
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
