"""Variants of a recipe for one topology, planned one after the other, best first. What is planned once is kept."""

import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mla_moe
from mla_moe.config import ConfigError, MeshConfig, Recipe
from mla_moe.plan.costs import Traffic
from mla_moe.plan.plan import Plan, make_plan
from mla_moe.plan.topology import Topology

SEQUENCES = (1, 2, 4, 8)
"""Sequences of a device that are worth a try; the batch is reached by accumulation."""


def variants(recipe: Recipe, devices: int) -> Iterator[Recipe]:
    """The recipe over other meshes, with other rematerialisation, and with its batch in other parts.

    Powers of two along `expert`, the rest along `fsdp` next to the recipe's own `data`, `tensor` and `context`.
    """
    fixed = {axis: max(getattr(recipe.mesh, axis), 1) for axis in ("data", "tensor", "context")}
    split = devices // (fixed["data"] * fixed["tensor"] * fixed["context"])
    experts = [1 << power for power in range(10) if split % (1 << power) == 0]
    rows = fixed["data"] * split
    batch = recipe.training.batch_size
    parts = [batch // (rows * n) for n in SEQUENCES if batch % (rows * n) == 0] or [
        recipe.training.gradient_accumulation_steps
    ]
    for expert, remat, gradient_accumulation_steps in itertools.product(experts, ("full", "dots"), parts):
        if recipe.model.n_routed_experts % expert:
            continue
        mesh = MeshConfig(**fixed, fsdp=split // expert, expert=expert, rules=recipe.mesh.rules)
        training = dataclasses.replace(
            recipe.training, remat=remat, gradient_accumulation_steps=gradient_accumulation_steps
        )
        yield dataclasses.replace(recipe, mesh=mesh, training=training)


def search(recipe: Recipe, topology: Topology, tell: Callable[[str], None]) -> list[tuple[Recipe, Plan]]:
    """Plans of all variants: those that fit, in the order of their predicted step, then the others by their need."""
    found = []
    for variant in variants(recipe, len(topology.devices)):
        try:
            plan = cached_plan(variant, topology, "train")
        except ConfigError as error:
            tell(f"{describe(variant)}: {error}")
            continue
        tell(f"{describe(variant)}: {'fits' if plan.fits else 'does not fit'}")
        found.append((variant, plan))
    return sorted(found, key=lambda pair: _order(pair[1]))


def _order(plan: Plan) -> tuple[bool, float]:
    return not plan.fits, (plan.step_seconds or 0.0) if plan.fits else plan.bytes


def describe(recipe: Recipe) -> str:
    """As flags of `train.py`."""
    mesh = " ".join(f"--mesh.{axis} {getattr(recipe.mesh, axis)}" for axis in ("fsdp", "expert"))
    return f"{mesh} --training.remat {recipe.training.remat} --training.gradient_accumulation_steps {recipe.training.gradient_accumulation_steps}"


def cached_plan(recipe: Recipe, topology: Topology, stage: str, **how: Any) -> Plan:
    """`make_plan`, or what it gave before for this recipe, topology, JAX and source of this package."""
    parts = recipe.to_json(), topology.name, str(len(topology.devices)), stage, json.dumps(how), _sources()
    parts += tuple(f"{package} {version(package)}" for package in ("jax", "jaxlib", "flax"))
    name = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    file = home / "mla_moe" / "plans" / f"{name}.json"
    if file.exists():
        values = json.loads(file.read_text())
        return Plan(**values | {"collectives": [Traffic(**t) for t in values["collectives"]]})
    plan = make_plan(recipe, topology, stage, **how)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(dataclasses.asdict(plan)))
    return plan


def _sources() -> str:
    files = sorted(Path(mla_moe.__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
