"""Variants of a recipe: which are planned, their ranking, and the cache of plans."""

import dataclasses
from pathlib import Path

import pytest

from mla_moe import ConfigError
from mla_moe.config import Recipe, load_recipe
from mla_moe.plan.plan import Plan
from mla_moe.plan.search import flags_of, search, variants
from mla_moe.plan.topology import Topology, open_topology

FIELDS = {field.name: None for field in dataclasses.fields(Plan)}
FIELDS |= {"collectives": [], "stalls": [], "resident": {}, "sampling_bytes": 0.0}


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Recipe]:
    """The variants that are planned. Plans are fake: more expert parallelism is faster, `remat = dots` does not fit."""
    seen: list[Recipe] = []

    def make_plan(variant: Recipe, topology: Topology, stage: str, options: None) -> Plan:
        seen.append(variant)
        expert, dots = variant.mesh.expert, variant.training.remat == "dots"
        if expert == 2:
            raise ConfigError("mesh.expert", expert, "not two")
        sizes = {"argument_bytes": 1.0, "temp_bytes": 100.0 / expert, "simulated_step_seconds": 1.0 / expert}
        return Plan(**FIELDS | sizes | {"refusal": "too large" if dots else None})

    monkeypatch.setattr("mla_moe.plan.search.make_plan", make_plan)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return seen


def test_variants() -> None:
    tried = list(variants(load_recipe("configs/quickstart.py"), 8, pipelines=False))
    assert {v.mesh.expert * v.mesh.fsdp for v in tried} == {8}
    assert {v.mesh.expert for v in tried} == {1, 2, 4, 8}
    assert {v.training.remat for v in tried} == {"full", "dots"}
    # A batch of 16 sequences in microbatches of 2 or 1 per device.
    assert {v.training.gradient_accumulation_steps for v in tried} == {1, 2}


def test_variants_with_a_pipeline() -> None:
    """Of as many stages as divide the devices and the microbatches, and at most as many as MoE layers."""
    quickstart = load_recipe("configs/quickstart.py")
    model = dataclasses.replace(quickstart.model, num_hidden_layers=1 + 7)
    tried = [v for v in variants(dataclasses.replace(quickstart, model=model), 8) if v.mesh.pipeline > 1]
    assert {v.mesh.pipeline for v in tried} == {2, 4}
    assert {v.mesh.pipeline * v.mesh.expert * v.mesh.fsdp for v in tried} == {8}
    assert {v.training.remat for v in tried} == {"full", "stage"}
    steps = {n: {v.training.gradient_accumulation_steps for v in tried if v.mesh.pipeline == n} for n in (2, 4)}
    assert steps == {2: {2, 4}, 4: {4, 8}}


def test_within_a_slice_of_tpus_a_pipeline_is_planned_if_the_recipe_has_one(planned: list[Recipe]) -> None:
    """Over slices always."""
    quickstart = load_recipe("configs/quickstart.py")
    model = dataclasses.replace(quickstart.model, num_hidden_layers=1 + 4)
    cpus = open_topology("cpu:8")
    for pipeline, topology, stages in (
        (1, cpus._replace(platform="tpu"), {1}),
        (2, cpus._replace(platform="tpu"), {1, 2, 4}),
        (1, cpus._replace(platform="tpu", slices=2), {1, 2, 4}),
    ):
        planned.clear()
        mesh = dataclasses.replace(quickstart.mesh, pipeline=pipeline)
        search(dataclasses.replace(quickstart, model=model, mesh=mesh), topology, lambda _: None)
        assert {variant.mesh.pipeline for variant in planned} == stages


def test_plans_that_fit_are_ranked_by_time_and_others_by_memory(planned: list[Recipe]) -> None:
    lines = []
    quickstart, topology = load_recipe("configs/quickstart.py"), open_topology("cpu:8")._replace(platform="tpu")
    ranked = search(quickstart, topology, lines.append)
    assert [(p.fits, v.mesh.expert) for v, p in ranked[::2]] == [
        (True, 8), (True, 4), (True, 1), (False, 8), (False, 4), (False, 1),
    ]  # fmt: skip
    assert "--mesh.pipeline 1 --mesh.fsdp 4 --mesh.expert 2" in lines[4]
    assert "not two" in lines[4]
    mesh = "--mesh.pipeline 1 --mesh.fsdp 1 --mesh.expert 8"
    assert flags_of(ranked[0][0]) == f"{mesh} --training.remat full --training.gradient_accumulation_steps 2"

    count = len(planned)
    again = search(quickstart, topology, lines.append)
    assert again == ranked
    assert len(planned) == count + 4, "only those that raised an error are planned again"
