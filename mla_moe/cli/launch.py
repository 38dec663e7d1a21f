"""`mla-moe launch`."""

import dataclasses
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import tyro

from mla_moe.config import load_recipe, require, with_overrides
from mla_moe.config.errors import require_between


@dataclasses.dataclass(frozen=True)
class Launch:
    """Submit a recipe to a cluster, or only `--print` what would be submitted; local rehearses it with processes here.
    Fields of the recipe are flags, as for train. The job runs again until the run has ended."""

    target: tyro.conf.Positional[Literal["gke", "slurm", "tpu-vm", "local"]]
    """gke: a Kubernetes JobSet. slurm: a batch script. tpu-vm: lines for gcloud. local: processes on CPU devices."""
    recipe: tyro.conf.Positional[Path]
    """A recipe's .py or .json file, at the same path on the hosts."""
    topology: str | None = None
    """Devices, as for plan: v5p:4x4x8, v6e:16x16, or h100:HOSTSxGPUS. The recipe's mesh must fit on them."""
    slices: int = 1
    """gke: number of such TPU slices."""
    name: str | None = None
    """Name of the job; by default that of the run's directory."""
    image: str = ""
    """gke: container image with mla_moe."""
    zone: str = ""
    """tpu-vm: zone of the TPUs."""
    processes: int = 2
    """local: number of processes, which share the devices of the mesh."""
    print: bool = False
    """Print what would be submitted or run."""

    def __post_init__(self):
        require_between(self, "", "slices", 1, 1024)
        require_between(self, "", "processes", 1, 64)

    def run(self, flags: Sequence[str]) -> int:
        """`flags` set fields of the recipe. Returns the exit code."""
        from mla_moe.launch import gke, local, slurm, tpu_vm
        from mla_moe.launch.job import Job, find_hosts, job_name

        recipe = with_overrides(load_recipe(self.recipe), flags, f"mla-moe launch {self.target} {self.recipe}")
        job = Job(recipe, self.recipe, flags, job_name(self.name, recipe))
        if self.target == "local":
            if not self.print:
                return local.run(job, self.processes)
            print(local.printed(job, self.processes), end="")
            return 0
        hosts = find_hosts(self.topology, self.slices, recipe.mesh)
        if self.target == "gke":
            text, submit = gke.job_set(job, hosts, self.image), ("kubectl", "apply", "-f", "-")
        elif self.target == "slurm":
            text, submit = slurm.batch_script(job, hosts), ("sbatch",)
        else:
            text, submit = tpu_vm.script(job, hosts, self.zone), ("bash", "-s")
        if self.print:
            print(text, end="")
            return 0
        tool = "gcloud" if self.target == "tpu-vm" else submit[0]
        fix = f"{tool} is not installed here; add --print and submit the output where it is"
        require(shutil.which(tool) is not None, "target", self.target, fix)
        return subprocess.run(submit, input=text, text=True, check=False).returncode
