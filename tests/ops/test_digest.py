import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mla_moe.ops.digest import digest
from mla_moe.recipe import Mesh
from mla_moe.sharding import make_mesh

of = jax.jit(digest)


@given(st.integers(0, 63), st.integers(0, 31))
def test_every_changed_bit_shows(place, bit):
    x = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)
    y = x.copy()
    y.view(np.uint32).flat[place] ^= np.uint32(1 << bit)
    assert of(x) != of(y)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "int8", "bool"])
def test_elements_that_change_places_show(dtype):
    x = jnp.arange(24).reshape(4, 6).astype(dtype)
    assert of(x) == of(jnp.array(x))
    assert len({int(of(y)) for y in (x, x[::-1], x[:, ::-1])}) == 3


def test_a_mesh_changes_nothing():
    x = jax.random.normal(jax.random.key(0), (8, 4, 6))
    mesh = make_mesh(Mesh(data=1, fsdp=2, expert=4))
    assert of(jax.device_put(x, NamedSharding(mesh, P("expert", "fsdp")))) == of(x)


def test_single_numbers_and_nothing():
    assert of(jnp.int32(3)) != of(jnp.int32(4))
    assert of(jnp.zeros((0, 3))) == 0
