"""The sharded einsum equals the plain one, and all-gathers its weight one mesh axis at a time."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mla_moe.config import MeshConfig
from mla_moe.nn.param import matrix
from mla_moe.parallel.mesh import BATCH_SPEC, make_mesh
from mla_moe.parallel.sharded_einsum import Einsum, plain_einsum, sharded_einsum
from mla_moe.parallel.sharding import partition_spec

EINSUMS = {
    "BTD,DQ->BTQ": {"embed": 16, "q_latent": 12},
    "BTQ,QHA->BTHA": {"q_latent": 12, "heads": 8, "qk": 3},
    "BTHV,HVD->BTD": {"heads": 8, "v": 3, "embed": 16},
    "BTD,DgF->BTgF": {"embed": 16, "gate_up": 2, "hidden": 20},
    "BTF,FD->BTD": {"hidden": 20, "embed": 16},
    "BTd,dD->BTD": {"mtp_in": 32, "embed": 16},
    "BTE,ED->BTD": {"embed": 7, "heads": 5},  # nothing divides: replicated
}


@pytest.mark.parametrize(
    "sizes", [MeshConfig(data=1, fsdp=2, expert=2, tensor=2), MeshConfig(data=1, fsdp=4, context=2)], ids=str
)
@pytest.mark.parametrize(("equation", "axes"), EINSUMS.items(), ids=EINSUMS)
def test_equals_plain_einsum_for_any_sharding_of_the_weight(
    equation: str, axes: dict[str, int], sizes: MeshConfig
) -> None:
    weight = matrix(nnx.Rngs(0), axes, contracts=(), std=1.0, dtype=jnp.float32)
    letters = dict(zip(equation.split("->")[0].split(",")[1], axes.values(), strict=True))
    x = jax.random.normal(jax.random.key(1), [{"B": 8, "T": 6}.get(c) or letters[c] for c in equation.split(",")[0]])

    def value_and_grads(einsum: Einsum) -> Callable[..., Any]:
        def loss(value: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            y = einsum(equation, x, weight.replace(value), jnp.float32)
            return jnp.sin(y).sum(), y

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)

    expected = jax.jit(value_and_grads(plain_einsum))(weight.get_value(), x)
    mesh = make_mesh(sizes)
    shardings = NamedSharding(mesh, partition_spec(tuple(axes), weight.shape, mesh)), NamedSharding(mesh, BATCH_SPEC)
    args = tuple(map(jax.device_put, (weight.get_value(), x), shardings))
    with jax.set_mesh(mesh):
        program = jax.jit(value_and_grads(sharded_einsum), in_shardings=shardings).lower(*args).compile()
    actual = program(*args)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    gradient = actual[1][0]
    assert gradient.sharding.is_equivalent_to(shardings[0], gradient.ndim), "the gradient is sharded as the weight is"
    if set(jax.tree.leaves(tuple(shardings[0].spec))) & {"fsdp", "expert"}:
        assert "all-gather(" in program.as_text()
        assert "reduce-scatter(" in program.as_text()


def test_all_gather_and_reduce_scatter_take_one_mesh_axis_at_a_time() -> None:
    """Over both axes at once XLA:TPU would send twice the bytes."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=4))
    assert partition_spec(("embed", "q_latent"), (16, 12), mesh) == P(("fsdp", "expert"), None)
    weight = matrix(nnx.Rngs(0), {"embed": 16, "q_latent": 12}, contracts=(), std=1.0, dtype=jnp.float32)

    def loss(value: jax.Array, x: jax.Array) -> jax.Array:
        return sharded_einsum("BTD,DQ->BTQ", x, weight.replace(value), jnp.float32).sum()

    with jax.set_mesh(mesh):
        text = str(jax.make_jaxpr(jax.grad(loss))(weight.get_value(), jnp.ones((8, 2, 16))))
    assert text.count("all_gather[") == text.count("reduce_scatter[") == 2
    for collective in text.split("axis_name=")[1:]:
        assert "fsdp" not in collective.split("\n")[0] or "expert" not in collective.split("\n")[0]
