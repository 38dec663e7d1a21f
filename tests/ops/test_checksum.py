import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mla_moe.config import MeshConfig
from mla_moe.ops.checksum import checksum, checksum_of_shard
from mla_moe.parallel.mesh import make_mesh

of = jax.jit(checksum)


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
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=4))
    assert of(jax.device_put(x, NamedSharding(mesh, P("expert", "fsdp")))) == of(x)


def test_single_numbers_and_nothing():
    assert of(jnp.int32(3)) != of(jnp.int32(4))
    assert of(jnp.zeros((0, 3))) == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_host_adds_up_parts(dtype):
    """Of any shape, with some of their axes taken away, and not all rows at a time."""
    x = np.random.default_rng(0).normal(size=(3, 10, 2, 7)).astype(jnp.dtype(dtype))
    indices = [(i, rows, g, slice(None)) for i in range(3) for rows in (slice(4), slice(4, 10)) for g in range(2)]
    assert sum(checksum_of_shard(x[index], index, x.shape) for index in indices) % 2**32 == of(x)
    long = np.asfortranarray(x.reshape(210, 2).repeat(400, 1))
    assert checksum_of_shard(long, (slice(None), slice(0, None)), long.shape) == of(long)
