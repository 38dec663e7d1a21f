import dataclasses

import jax
import pytest
from jax.sharding import PartitionSpec as P

from mla_moe import ConfigError
from mla_moe.recipe import Mesh, Recipe, Training
from mla_moe.sharding import check_divisible, make_mesh, rules_of, spec


def test_the_rest_of_the_devices_goes_to_minus_one():
    assert dict(make_mesh(Mesh()).shape) == {"data": 8, "fsdp": 1, "expert": 1, "tensor": 1, "context": 1}
    assert make_mesh(Mesh(fsdp=2, expert=2)).shape["data"] == 2
    assert make_mesh(Mesh(), jax.devices()[:1]).size == 1


@pytest.mark.parametrize("sizes", [Mesh(fsdp=3), Mesh(data=4), Mesh(data=16), Mesh(data=1, tensor=-1, expert=5)])
def test_an_impossible_mesh_says_how_many_devices_there_are(sizes):
    with pytest.raises(ConfigError, match="8"):
        make_mesh(sizes)


def test_an_axis_is_split_once_and_only_where_it_divides():
    mesh = make_mesh(Mesh(data=1, fsdp=2, expert=2, tensor=2))
    assert spec(("experts", "embed", "gate_up", "expert_hidden"), (4, 6, 2, 8), mesh) == P(
        "expert", "fsdp", None, "tensor"
    )
    assert spec(("embed", "vocab"), (6, 7), mesh) == P("fsdp", None)
    assert spec(("hidden", "heads"), (8, 8), mesh) == P(("tensor", "expert"), None)
    assert spec(("expert_hidden", "heads"), (8, 8), mesh) == P(("tensor", "fsdp"), "expert")
    assert spec(("experts", "expert_hidden", "embed"), (4, 8, 6), mesh) == P("expert", ("tensor", "fsdp"), None)


@pytest.mark.parametrize(
    ("mesh", "training", "field"),
    [
        (Mesh(), Training(batch_size=12), "training.batch_size"),
        (Mesh(), Training(batch_size=16, accumulation=4), "training.batch_size"),
        (Mesh(context=8), Training(sequence_length=1001), "training.sequence_length"),
        (Mesh(tensor=8), Training(), "model.num_attention_heads"),
        (Mesh(expert=8), Training(), "model.n_routed_experts"),
    ],
)
def test_what_the_mesh_cannot_split_is_named(cfg, mesh, training, field):
    model = dataclasses.replace(cfg, max_position_embeddings=4096)
    if field == "model.n_routed_experts":
        model = dataclasses.replace(model, n_routed_experts=12)
    with pytest.raises(ConfigError) as error:
        check_divisible(Recipe(run_dir="x", model=model, mesh=mesh, training=training), make_mesh(mesh))
    assert error.value.field == field


@pytest.mark.parametrize(
    ("change", "fix"), [("embed", "axis=mesh_axis"), ("width=fsdp", "axes are embed"), ("embed=rows", "mesh axes are"),
                        ("experts=data", "experts lie over expert")],
)  # fmt: skip
def test_a_rule_that_cannot_be(change, fix):
    with pytest.raises(ConfigError, match=fix):
        rules_of([change])
