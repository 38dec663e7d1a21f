"""Resolve a topology (`v5p:8x8x8`, `h100:16x8`, `cpu:8`) to devices, which need not be attached, and their peaks."""

import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import NamedTuple

import jax

from mla_moe.config import ConfigError, require
from mla_moe.parallel.accelerators import ACCELERATORS, GPUS, TPUS, Accelerator

CHOICES = "v5e:4x4, v5p:8x8x8, v6e:16x16, v7x:4x4x8, h100:HOSTSxGPUS, h200:HOSTSxGPUS, cpu:DEVICES, for example"


class Topology(NamedTuple):
    """The devices that a recipe is planned for."""

    name: str
    platform: str
    """tpu, cuda or cpu."""
    devices: Sequence[jax.Device]
    accelerator: Accelerator | None
    """Peaks of a device; None for a CPU."""


def open_topology(name: str, slices: int = 1) -> Topology:
    """The devices of `slices` slices of a topology. Raises `ConfigError` if it is unknown (with the choices) or if its
    compiler is not installed (with the command that installs it)."""
    kind, _, shape = name.partition(":")
    known = kind in TPUS or kind in GPUS or kind == "cpu"
    require(known, "topology", name, f"unknown kind of device; write {CHOICES}")
    if kind == "cpu":
        return _cpu(name, shape, slices)
    require(re.fullmatch(r"\d+(x\d+)*", shape) is not None, "topology", name, f"give the shape too: {CHOICES}")
    require(slices >= 1, "slices", slices, "must be at least 1")
    return _tpu(name, kind, shape, slices) if kind in TPUS else _gpu(name, kind, shape, slices)


def quiet_compilers() -> None:
    """Stop the compilers of absent devices from probing for them. Call it before JAX initialises a backend."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_WORKER_ID", "0")
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])


def _cpu(name: str, shape: str, slices: int) -> Topology:
    require(slices == 1, "slices", slices, "must be 1: a CPU has no slices")
    require(shape.isdigit() or not shape, "topology", name, "write cpu or cpu:DEVICES")
    devices = jax.devices("cpu")
    count = int(shape or 1)
    if not 1 <= count <= len(devices):
        flag = f"XLA_FLAGS=--xla_force_host_platform_device_count={count}"
        raise ConfigError("topology", name, f"this process has {len(devices)} CPU device(s); set {flag}")
    return Topology(name, "cpu", devices[:count], None)


def _tpu(name: str, kind: str, shape: str, slices: int) -> Topology:
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError("topology", name, "needs the TPU compiler: pip install 'mla_moe[plan]'")
    from jax.experimental import topologies

    options = {"num_slices": slices} if slices > 1 else {}
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=f"{TPUS[kind]}:{shape}", **options)
    except jax.errors.JaxRuntimeError as error:
        raise ConfigError("topology", name, f"the TPU compiler says: {_first_line(error)}; write {CHOICES}") from None
    return Topology(name, "tpu", found.devices, ACCELERATORS[kind])


def _gpu(name: str, kind: str, shape: str, slices: int) -> Topology:
    if not any(map(importlib.util.find_spec, ("jax_cuda13_plugin", "jax_cuda12_plugin"))):
        raise ConfigError("topology", name, "needs the CUDA compiler: pip install 'mla_moe[cuda]'")
    from jax.experimental import topologies

    sizes = [int(size) for size in shape.split("x")]
    require(len(sizes) == 2, "topology", name, f"write HOSTSxGPUS, for example {kind}:16x8")
    full_shape = "x".join(map(str, (slices, *sizes)))
    try:
        found = topologies.get_topology_desc("", "cuda", target_config=GPUS[kind], topology=full_shape)
    except (jax.errors.JaxRuntimeError, RuntimeError) as error:
        raise ConfigError("topology", name, f"the GPU compiler says: {_first_line(error)}") from None
    assert len(found.devices) == slices * math.prod(sizes)
    return Topology(name, "cuda", found.devices, ACCELERATORS[kind])


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0].removeprefix("INVALID_ARGUMENT: ").rstrip(".")
