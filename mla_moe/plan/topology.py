"""Resolve a topology (`v5p:8x8x8`, `h100:16x8`, `cpu:8`) to devices, which need not be attached, and their peaks."""

import importlib.util
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from mla_moe.config import ConfigError, require
from mla_moe.parallel.accelerators import ACCELERATORS, GPUS, TPUS, Accelerator

CHOICES = "v5e:4x4, v5p:8x8x8, v6e:16x16, v7x:4x4x8, h100:HOSTSxGPUS (h200, b200, a100), cpu:DEVICES, for example"


class Topology(NamedTuple):
    """The devices that a recipe is planned for."""

    name: str
    platform: str
    """tpu, cuda or cpu."""
    devices: Sequence[jax.Device]
    accelerator: Accelerator | None
    """Peaks of a device; None for a CPU."""
    slices: int = 1

    def __reduce__(self):  # devices cannot be pickled
        return open_topology, (self.name, self.slices)


def open_topology(name: str, slices: int = 1) -> Topology:
    """The devices of `slices` slices of a topology. Raises `ConfigError` if it is unknown (with the choices) or if its
    compiler is not installed (with the command that installs it)."""
    kind, _, shape = name.partition(":")
    known = kind in TPUS or kind in GPUS or kind == "cpu"
    require(known, "topology", name, f"unknown kind of device; write {CHOICES}")
    if kind == "cpu":
        require(slices == 1, "slices", slices, "must be 1: a CPU has no slices")
        require(shape.isdecimal() or not shape, "topology", name, "write cpu or cpu:DEVICES")
        devices, count = jax.devices("cpu"), int(shape or 1)
        flag = f"XLA_FLAGS=--xla_force_host_platform_device_count={count}"
        fix = f"this process has {len(devices)} CPU device(s); set {flag}"
        require(1 <= count <= len(devices), "topology", name, fix)
        return Topology(name, "cpu", devices[:count], None)
    require(re.fullmatch(r"\d+(x\d+)*", shape) is not None, "topology", name, f"give the shape too: {CHOICES}")
    require(slices >= 1, "slices", slices, "must be at least 1")
    if kind in TPUS:
        installed = importlib.util.find_spec("libtpu") is not None
        require(installed, "topology", name, "needs the TPU compiler: pip install 'mla_moe[plan]'")
        platform, compiler, choices = "tpu", "TPU", f"; write {CHOICES}"
        target: dict[str, Any] = {"topology_name": f"{TPUS[kind]}:{shape}"}
        target |= {"num_slices": slices} if slices > 1 else {}
    else:
        installed = any(map(importlib.util.find_spec, ("jax_cuda13_plugin", "jax_cuda12_plugin")))
        require(installed, "topology", name, "needs the CUDA compiler: pip install 'mla_moe[cuda]'")
        require(shape.count("x") == 1, "topology", name, f"write HOSTSxGPUS, for example {kind}:16x8")
        platform, compiler, choices = "cuda", "GPU", ""
        target = {"topology_name": "", "target_config": GPUS[kind], "topology": f"{slices}x{shape}"}
    try:
        devices = topologies.get_topology_desc(platform=platform, **target).devices
    except RuntimeError as error:
        reported = str(error).splitlines()[0].removeprefix("INVALID_ARGUMENT: ").rstrip(".")
        raise ConfigError("topology", name, f"the {compiler} compiler reports: {reported}{choices}") from None
    return Topology(name, platform, devices, ACCELERATORS[kind], slices)


def quiet_compilers() -> None:
    """Stop the compilers of absent devices from probing for them. Call it before JAX initialises a backend."""
    quiet = {
        "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_ACCELERATOR_TYPE": "v5p-8", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0",
        "TPU_STDERR_LOG_LEVEL": "3", "TF_CPP_MIN_LOG_LEVEL": "3", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    }  # fmt: skip
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
    jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
