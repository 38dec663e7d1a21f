import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mla_moe.nn.param import matrix
from mla_moe.nn.product import gathered_product, product
from mla_moe.recipe import Mesh
from mla_moe.sharding import BATCH, make_mesh, spec

PRODUCTS = {
    "BTD,DQ->BTQ": {"embed": 16, "q_latent": 12},
    "BTQ,QHA->BTHA": {"q_latent": 12, "heads": 8, "qk": 3},
    "BTHV,HVD->BTD": {"heads": 8, "v": 3, "embed": 16},
    "BTD,DgF->BTgF": {"embed": 16, "gate_up": 2, "hidden": 20},
    "BTF,FD->BTD": {"hidden": 20, "embed": 16},
    "BTd,dD->BTD": {"mtp_in": 32, "embed": 16},
    "BTE,ED->BTD": {"embed": 7, "heads": 5},  # nothing divides: whole on every device
}


@pytest.mark.parametrize("sizes", [Mesh(data=1, fsdp=2, expert=2, tensor=2), Mesh(data=1, fsdp=4, context=2)], ids=str)
@pytest.mark.parametrize(("equation", "axes"), PRODUCTS.items(), ids=PRODUCTS)
def test_is_einsum_wherever_the_weight_lies(equation, axes, sizes):
    weight = matrix(nnx.Rngs(0), axes, contracts=(), std=1.0, dtype=jnp.float32)
    letters = dict(zip(equation.split("->")[0].split(",")[1], axes.values(), strict=True))
    x = jax.random.normal(jax.random.key(1), [{"B": 8, "T": 6}.get(c) or letters[c] for c in equation.split(",")[0]])

    def value_and_grads(multiply):
        def loss(value, x):
            y = multiply(equation, x, weight.replace(value), jnp.float32)
            return jnp.sin(y).sum(), y

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)

    wanted = jax.jit(value_and_grads(product))(weight.get_value(), x)
    mesh = make_mesh(sizes)
    places = NamedSharding(mesh, spec(tuple(axes), weight.shape, mesh)), NamedSharding(mesh, BATCH)
    with jax.set_mesh(mesh):
        program = jax.jit(value_and_grads(gathered_product), in_shardings=places).lower(weight.get_value(), x).compile()
    got = program(*(jax.device_put(a, place) for a, place in zip((weight.get_value(), x), places, strict=True)))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    gradient = got[1][0]
    assert gradient.sharding.is_equivalent_to(places[0], gradient.ndim), "the gradient lies as the weight does"
    if set(jax.tree.leaves(tuple(places[0].spec))) & {"fsdp", "expert"}:
        assert "all-gather(" in program.as_text()
        assert "reduce-scatter(" in program.as_text()


def test_weights_and_gradients_travel_one_axis_at_a_time():
    """Over both axes at once XLA for TPU would send twice the bytes."""
    mesh = make_mesh(Mesh(data=1, fsdp=2, expert=4))
    assert spec(("embed", "q_latent"), (16, 12), mesh) == P(("fsdp", "expert"), None)
    weight = matrix(nnx.Rngs(0), {"embed": 16, "q_latent": 12}, contracts=(), std=1.0, dtype=jnp.float32)

    def loss(value, x):
        return gathered_product("BTD,DQ->BTQ", x, weight.replace(value), jnp.float32).sum()

    with jax.set_mesh(mesh):
        text = str(jax.make_jaxpr(jax.grad(loss))(weight.get_value(), jnp.ones((8, 2, 16))))
    assert text.count("all_gather[") == text.count("reduce_scatter[") == 2
    for collective in text.split("axis_name=")[1:]:
        assert "fsdp" not in collective.split("\n")[0] or "expert" not in collective.split("\n")[0]
