"""What a launcher starts: the training command of a recipe, and the hosts that its mesh needs."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from mla_moe.config import MeshConfig, Recipe, require
from mla_moe.parallel.mesh import mesh_shape


class TPU:
    """Cloud TPUs, as Google Cloud names them."""

    def __init__(self, gke: str, vm: str | None, runtime: str | None, devices_per_chip: int = 1):
        self.gke, self.vm, self.runtime, self.devices_per_chip = gke, vm, runtime, devices_per_chip


TPUS: Mapping[str, TPU] = {
    # `gke`: label cloud.google.com/gke-tpu-accelerator; `vm`, `runtime`: gcloud's --type and --runtime-version
    "v5e": TPU("tpu-v5-lite-podslice", "v5litepod", "v2-alpha-tpuv5-lite"),
    "v5p": TPU("tpu-v5p-slice", "v5p", "v2-alpha-tpuv5"),
    "v6e": TPU("tpu-v6e-slice", "v6e", "v2-alpha-tpuv6e"),
    "v7x": TPU("tpu7x", None, None, devices_per_chip=2),
}
GPUS: Mapping[str, str] = {"h100": "nvidia-h100-80gb", "h200": "nvidia-h200-141gb", "b200": "nvidia-b200"}
"""Label cloud.google.com/gke-accelerator."""
CHIPS_PER_HOST = 4
"""Chips of a host in TPU slices of several hosts, and in single hosts with as many."""


@dataclasses.dataclass(frozen=True)
class Hosts:
    """The hosts of a topology, such as v5p:4x4x8 or h100:16x8."""

    kind: str
    """A name in `TPUS` or `GPUS`."""
    shape: str
    """TPU: the chips of a slice along each dimension. GPU: hosts x GPUs."""
    slices: int
    per_slice: int
    """Hosts of each slice."""
    chips_per_host: int

    @property
    def count(self) -> int:
        return self.slices * self.per_slice

    @property
    def devices(self) -> int:
        """JAX devices of all hosts."""
        return self.count * self.chips_per_host * (TPUS[self.kind].devices_per_chip if self.kind in TPUS else 1)


def find_hosts(topology: str | None, slices: int, mesh: MeshConfig) -> Hosts:
    """The hosts of `slices` slices of a topology. Raises `ConfigError` for an unknown one, and for one on which the
    mesh does not fit."""
    kind, _, shape = (topology or "").partition(":")
    known = (kind in TPUS or kind in GPUS) and re.fullmatch(r"[1-9]\d{0,3}(x[1-9]\d{0,3}){1,2}", shape)
    choices = ", ".join([f"{name}:4x4" for name in TPUS] + [f"{name}:HOSTSxGPUS" for name in GPUS])
    require(bool(known), "topology", topology, f"name the devices, such as {choices}")
    sizes = list(map(int, shape.split("x")))
    if kind in GPUS:
        require(len(sizes) == 2, "topology", topology, f"write {kind}:HOSTSxGPUS")
        require(slices == 1, "slices", slices, "must be 1: only TPUs have slices")
        hosts = Hosts(kind, shape, 1, *sizes)
    else:
        chips = math.prod(sizes)
        ok = chips % CHIPS_PER_HOST == 0 or chips < CHIPS_PER_HOST
        require(ok, "topology", topology, f"a slice has one host, or hosts of {CHIPS_PER_HOST} chips each")
        hosts = Hosts(kind, shape, slices, max(chips // CHIPS_PER_HOST, 1), min(chips, CHIPS_PER_HOST))
    mesh_shape(mesh, hosts.devices)
    return hosts


@dataclasses.dataclass(frozen=True)
class Job:
    """A recipe to launch."""

    recipe: Recipe
    """The recipe with the flags applied."""
    path: Path
    """The recipe's file, at this path on the hosts too."""
    flags: Sequence[str]
    """Flags for fields of the recipe."""
    name: str
    """Name of the job in the cluster: letters, digits and dashes."""

    @property
    def train(self) -> list[str]:
        """Arguments of `mla-moe`. The same in all processes, and again in a restart."""
        return ["train", str(self.path), *self.flags]


def job_name(name: str | None, recipe: Recipe) -> str:
    """The name of a job: `name` if given, else derived from the last part of the run's directory. Raises `ConfigError`
    for a name that Kubernetes does not accept for a host."""
    if name is None:
        name = re.sub("[^a-z0-9]+", "-", Path(recipe.run_dir).name.lower()).strip("-")[:40].strip("-")
        name = name if re.match("[a-z]", name) else f"run-{name}".strip("-")
    ok = re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", name) is not None
    require(ok, "name", name, "must have at most 40 lower-case letters, digits and dashes, a letter first")
    return name


COORDINATOR_PORT = 8476
"""On the host of process 0, where JAX's processes find each other."""
RESTARTS = 100
"""Most restarts of a job that ends with another status than 0 and 2."""


def restart_loop(command: str) -> str:
    """A shell loop that starts `command` again after an error or a preemption, from where it stopped; not after
    invalid input (status 2)."""
    return (
        f"for attempt in $(seq {RESTARTS}); do\n"
        f"  {command}\n"
        "  status=$?\n"
        "  case $status in 0 | 2) exit $status ;; esac\n"
        '  echo "attempt $attempt ended with status $status; resuming" >&2\n'
        "  sleep 10\n"
        "done\n"
        "exit $status\n"
    )
