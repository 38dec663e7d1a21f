"""Building a mesh, and the sharding rules over it."""

import dataclasses

import jax
import pytest
from jax.sharding import PartitionSpec as P

from mla_moe import ConfigError, ModelConfig, preset
from mla_moe.config import MeshConfig, Recipe, TrainingConfig
from mla_moe.parallel.mesh import MESH_AXES, make_mesh, mesh_shape
from mla_moe.parallel.sharding import check_divisible, check_model_divisible, partition_spec, rules_with_overrides


def test_minus_one_takes_the_remaining_devices() -> None:
    shape = {"pipeline": 1, "data": 8, "fsdp": 1, "expert": 1, "tensor": 1, "context": 1}
    assert dict(make_mesh(MeshConfig()).shape) == shape
    assert make_mesh(MeshConfig(fsdp=2, expert=2)).shape["data"] == 2
    assert make_mesh(MeshConfig(), jax.devices()[:1]).size == 1


@pytest.mark.parametrize(
    "sizes", [MeshConfig(fsdp=3), MeshConfig(data=4), MeshConfig(data=16), MeshConfig(data=1, tensor=-1, expert=5)]
)
def test_a_mesh_of_another_size_is_an_error_with_the_number_of_devices(sizes: MeshConfig) -> None:
    with pytest.raises(ConfigError, match="8"):
        make_mesh(sizes)


@pytest.mark.parametrize(
    ("sizes", "devices", "fit"),
    [
        (MeshConfig(data=1, fsdp=-1, tensor=4), 6, "pipeline 1 x data 1 x fsdp 3 x expert 1 x tensor 2 x context 1"),
        (MeshConfig(data=2, expert=8, tensor=2), 8, "pipeline 1 x data 1 x fsdp 1 x expert 4 x tensor 2 x context 1"),
        (MeshConfig(data=4), 5, "pipeline 1 x data 1 x fsdp 5 x expert 1 x tensor 1 x context 1"),
    ],
)
def test_an_impossible_mesh_names_one_that_fits(sizes: MeshConfig, devices: int, fit: str) -> None:
    with pytest.raises(ConfigError, match=f"number of devices, {devices}; {fit} fits"):
        mesh_shape(sizes, devices)
    found = dict(zip(MESH_AXES, (int(size) for size in fit.split()[1::3]), strict=True))
    assert mesh_shape(MeshConfig(**found), devices) == list(found.values())


def test_what_the_mesh_does_not_divide_names_what_fits() -> None:
    mesh = make_mesh(MeshConfig(data=1, fsdp=4), jax.devices()[:4])
    training = TrainingConfig(steps=1, batch_size=18, gradient_accumulation_steps=3)
    with pytest.raises(ConfigError, match=r"training\.batch_size = 18: must be a multiple of 12: .*; 12 fits"):
        check_divisible(Recipe(run_dir="unused", training=training), mesh)
    mesh = make_mesh(MeshConfig(data=1, tensor=8))
    with pytest.raises(ConfigError, match=r"num_attention_heads = 4: .*; mesh\.tensor = 4 fits"):
        check_divisible(
            Recipe(run_dir="unused", model=dataclasses.replace(preset("tiny"), num_attention_heads=4)), mesh
        )


def test_a_mesh_axis_is_used_once_and_only_where_it_divides() -> None:
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2))
    assert partition_spec(("experts", "embed", "gate_up", "expert_hidden"), (4, 6, 2, 8), mesh) == P(
        "expert", "fsdp", None, "tensor"
    )
    assert partition_spec(("embed", "vocab"), (6, 7), mesh) == P("fsdp", None)
    assert partition_spec(("hidden", "heads"), (8, 8), mesh) == P(("tensor", "expert"), None)
    assert partition_spec(("expert_hidden", "heads"), (8, 8), mesh) == P(("tensor", "fsdp"), "expert")
    assert partition_spec(("experts", "expert_hidden", "embed"), (4, 8, 6), mesh) == P(
        "expert", ("tensor", "fsdp"), None
    )


def test_a_pipeline_shards_layers_or_the_matrices_of_layers_outside_of_it() -> None:
    mesh = make_mesh(MeshConfig(pipeline=2, data=1, fsdp=2, tensor=2))
    assert partition_spec(("layers", "embed", "hidden"), (4, 6, 8), mesh)[0] == "pipeline"
    assert partition_spec(("dense_layers", "embed", "hidden"), (4, 6, 8), mesh)[2] == ("tensor", "pipeline")
    one = make_mesh(MeshConfig(fsdp=2))
    assert partition_spec(("layers", "hidden"), (4, 8), one) == P(None, ("tensor", "expert"))


@pytest.mark.parametrize(
    ("mesh", "training", "field"),
    [
        (MeshConfig(), TrainingConfig(batch_size=12), "training.batch_size"),
        (MeshConfig(), TrainingConfig(batch_size=16, gradient_accumulation_steps=4), "training.batch_size"),
        (MeshConfig(context=8), TrainingConfig(sequence_length=1001), "training.sequence_length"),
        (MeshConfig(tensor=8), TrainingConfig(), "model.num_attention_heads"),
        (MeshConfig(expert=8), TrainingConfig(), "model.n_routed_experts"),
    ],
)
def test_a_size_that_the_mesh_does_not_divide_is_an_error(
    cfg: ModelConfig, mesh: MeshConfig, training: TrainingConfig, field: str
) -> None:
    model = dataclasses.replace(cfg, max_position_embeddings=4096)
    if field == "model.n_routed_experts":
        model = dataclasses.replace(model, n_routed_experts=12)
    with pytest.raises(ConfigError) as error:
        check_divisible(Recipe(run_dir="x", model=model, mesh=mesh, training=training), make_mesh(mesh))
    assert error.value.field == field


@pytest.mark.parametrize(
    ("override", "fix"),
    [("embed", "axis=mesh_axis"), ("width=fsdp", "axes are embed"), ("embed=rows", "mesh axes are"),
     ("layers=", "layers are always sharded over pipeline"),
     ("experts=data", "experts are always sharded over expert")],
)  # fmt: skip
def test_an_invalid_rule_is_an_error(override: str, fix: str) -> None:
    with pytest.raises(ConfigError, match=fix):
        rules_with_overrides([override])


def test_a_dense_model_has_no_experts_that_a_mesh_must_divide() -> None:
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2))
    check_model_divisible(preset("youtu-llm-2b"), mesh, "model")
    with pytest.raises(ConfigError, match=r"teacher\.n_routed_experts = 9: must be a multiple of 2"):
        check_model_divisible(dataclasses.replace(preset("kimi-k2"), n_routed_experts=9), mesh, "teacher")
