"""Search over meshes, rematerialisation and gradient accumulation for one topology. Plans are cached on disk."""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import mla_moe
from mla_moe.config import ConfigError, MeshConfig, Recipe
from mla_moe.plan.costs import CollectiveTraffic
from mla_moe.plan.plan import Plan, make_plan
from mla_moe.plan.schedule import Stall
from mla_moe.plan.stages import DecodeOptions
from mla_moe.plan.topology import Topology
from mla_moe.training.metrics import write_atomically

MICROBATCH_SIZES = (1, 2, 4, 8)
"""Sequences of a device in one microbatch that are tried; gradient accumulation keeps the batch size."""


MAX_STAGES = 16
"""The largest pipeline that is tried."""


def variants(recipe: Recipe, devices: int, pipelines: bool = True) -> Iterator[Recipe]:
    """The recipe with other meshes, rematerialisation and numbers of gradient accumulation steps. `pipeline` takes the
    numbers up to `MAX_STAGES` that divide the devices, if there are as many MoE layers, or 1 without `pipelines`,
    `expert` powers of two, `fsdp` the remaining devices; `data`, `tensor` and `context` stay as in the recipe."""
    fixed = {axis: max(getattr(recipe.mesh, axis), 1) for axis in ("data", "tensor", "context")}
    layers = 1 if any(recipe.model.shared_indexers) else recipe.model.num_moe_layers
    all_free = devices // (fixed["data"] * fixed["tensor"] * fixed["context"])
    for pipeline in range(1, 1 + (min(MAX_STAGES, max(layers, 1)) if pipelines else 1)):
        if all_free % pipeline:
            continue
        free, rematerializations = all_free // pipeline, ("full", "dots") if pipeline == 1 else ("full", "stage")
        experts = [1 << power for power in range(10) if free % (1 << power) == 0]
        shards, batch, training = fixed["data"] * free, recipe.training.batch_size, recipe.training
        steps = [batch // (shards * n) for n in MICROBATCH_SIZES if batch % (shards * n) == 0]
        steps = [n for n in steps if n % pipeline == 0]
        if pipeline == 1:
            steps = steps or [training.gradient_accumulation_steps]
        for expert, remat, accumulation_steps in itertools.product(experts, rematerializations, steps):
            if recipe.model.n_routed_experts % expert:
                continue
            axes = fixed | {"pipeline": pipeline, "fsdp": free // expert, "expert": expert}
            changed = dataclasses.replace(training, remat=remat, gradient_accumulation_steps=accumulation_steps)
            yield dataclasses.replace(recipe, mesh=MeshConfig(**axes, rules=recipe.mesh.rules), training=changed)


def search(recipe: Recipe, topology: Topology, log: Callable[[str], None]) -> list[tuple[Recipe, Plan]]:
    """Plan all variants: first those that fit, by simulated step time, then the others by the memory they need. Within
    a slice of TPUs, whose network reaches all devices, a pipeline is tried only if the recipe has one."""
    found = []
    pipelines = topology.platform != "tpu" or topology.slices > 1 or recipe.mesh.pipeline > 1
    for variant in variants(recipe, len(topology.devices), pipelines):
        try:
            plan = cached_plan(variant, topology, "train")
        except ConfigError as error:
            log(f"{flags_of(variant)}: {error}")
            continue
        log(f"{flags_of(variant)}: {'fits' if plan.fits else 'does not fit'}")
        found.append((variant, plan))
    fitting = [pair for pair in found if pair[1].fits]
    others = [pair for pair in found if not pair[1].fits]
    return sorted(fitting, key=lambda pair: pair[1].simulated_step_seconds or 0.0) + sorted(
        others, key=lambda pair: pair[1].bytes
    )


def flags_of(recipe: Recipe) -> str:
    """The flags of `train.py` that select this variant."""
    mesh = " ".join(f"--mesh.{axis} {getattr(recipe.mesh, axis)}" for axis in ("pipeline", "fsdp", "expert"))
    steps = recipe.training.gradient_accumulation_steps
    return f"{mesh} --training.remat {recipe.training.remat} --training.gradient_accumulation_steps {steps}"


def cached_plan(recipe: Recipe, topology: Topology, stage: str, options: DecodeOptions | None = None) -> Plan:
    """`make_plan`, cached in `~/.cache/mla_moe` by recipe, topology, stage, the versions of JAX
    and of the compilers, and this package's source."""
    sources = sorted(Path(mla_moe.__file__).parent.rglob("*.py"))
    checksum = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()
    key = [recipe.to_json(), topology.name, str(len(topology.devices)), stage]
    key += [json.dumps(options if stage == "decode" else None), checksum]
    for package in ("jax", "jaxlib", "flax", "libtpu", "jax-cuda13-plugin", "tokamax"):
        with contextlib.suppress(PackageNotFoundError):
            key.append(f"{package} {version(package)}")
    name = hashlib.sha256("\n".join(key).encode()).hexdigest()[:32]
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    file = home / "mla_moe" / "plans" / f"{name}.json"
    with contextlib.suppress(FileNotFoundError, ValueError, TypeError, KeyError):  # or it is compiled again
        values = json.loads(file.read_text())
        collectives = [CollectiveTraffic(**t) for t in values["collectives"]]
        return Plan(**values | {"collectives": collectives, "stalls": [Stall(*stall) for stall in values["stalls"]]})
    plan = make_plan(recipe, topology, stage, options)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps(dataclasses.asdict(plan)))
    return plan
