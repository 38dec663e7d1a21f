"""Variants of a recipe: which are tried, in what order they come, and that none is planned twice."""

import dataclasses

import pytest

from mla_moe import ConfigError
from mla_moe.config import load_recipe
from mla_moe.plan.plan import Plan
from mla_moe.plan.search import describe, search, variants
from mla_moe.plan.topology import open_topology

FIELDS = {field.name: None for field in dataclasses.fields(Plan)}
FIELDS |= {"collectives": [], "held": {}, "sampling_bytes": 0.0}


@pytest.fixture
def planned(monkeypatch, tmp_path):
    """A compiler to which a mesh of many experts is fast, and `remat = dots` too large; with the variants it saw."""
    seen = []

    def make_plan(variant, topology, stage):
        seen.append(variant)
        expert, dots = variant.mesh.expert, variant.training.remat == "dots"
        if expert == 2:
            raise ConfigError("mesh.expert", expert, "not two")
        sizes = {"argument_bytes": 1.0, "temp_bytes": 100.0 / expert, "step_seconds": 1.0 / expert, "mfu": 0.1 * expert}
        return Plan(**FIELDS | sizes | {"refusal": "too large" if dots else None})

    monkeypatch.setattr("mla_moe.plan.search.make_plan", make_plan)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return seen


def test_what_is_tried():
    tried = list(variants(load_recipe("configs/quickstart.py"), 8))
    assert {v.mesh.expert * v.mesh.fsdp for v in tried} == {8}
    assert {v.mesh.expert for v in tried} == {1, 2, 4, 8}
    assert {v.training.remat for v in tried} == {"full", "dots"}
    assert {v.training.gradient_accumulation_steps for v in tried} == {
        1,
        2,
    }  # of 16 sequences 2 or 1 a device at a time


def test_what_fits_comes_first_by_time_and_the_rest_by_need(planned):
    lines = []
    quickstart, topology = load_recipe("configs/quickstart.py"), open_topology("cpu:8")
    ranked = search(quickstart, topology, lines.append)
    assert [(p.fits, v.mesh.expert) for v, p in ranked[::2]] == [
        (True, 8), (True, 4), (True, 1), (False, 8), (False, 4), (False, 1),
    ]  # fmt: skip
    assert "--mesh.fsdp 4 --mesh.expert 2" in lines[4]
    assert "not two" in lines[4]
    assert (
        describe(ranked[0][0])
        == "--mesh.fsdp 1 --mesh.expert 8 --training.remat full --training.gradient_accumulation_steps 2"
    )

    count = len(planned)
    again = search(quickstart, topology, lines.append)
    assert again == ranked
    assert len(planned) == count + 4, "only those that failed are tried again"
