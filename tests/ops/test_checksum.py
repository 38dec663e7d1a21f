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

jit_checksum = jax.jit(checksum)


@given(st.integers(0, 63), st.integers(0, 31))
def test_any_changed_bit_changes_the_checksum(index, bit):
    x = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)
    y = x.copy()
    y.view(np.uint32).flat[index] ^= np.uint32(1 << bit)
    assert jit_checksum(x) != jit_checksum(y)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "int8", "bool"])
def test_reordered_elements_change_the_checksum(dtype):
    x = jnp.arange(24).reshape(4, 6).astype(dtype)
    assert jit_checksum(x) == jit_checksum(jnp.array(x))
    assert len({int(jit_checksum(y)) for y in (x, x[::-1], x[:, ::-1])}) == 3


def test_sharding_does_not_change_the_checksum():
    x = jax.random.normal(jax.random.key(0), (8, 4, 6))
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=4))
    assert jit_checksum(jax.device_put(x, NamedSharding(mesh, P("expert", "fsdp")))) == jit_checksum(x)


def test_scalars_and_empty_arrays():
    assert jit_checksum(jnp.int32(3)) != jit_checksum(jnp.int32(4))
    assert jit_checksum(jnp.zeros((0, 3))) == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_checksums_of_shards_add_up(dtype):
    """Shards of any shape, some with axes indexed away, and too large for one chunk."""
    x = np.random.default_rng(0).normal(size=(3, 10, 2, 7)).astype(jnp.dtype(dtype))
    indices = [(i, rows, g, slice(None)) for i in range(3) for rows in (slice(4), slice(4, 10)) for g in range(2)]
    assert sum(checksum_of_shard(x[index], index, x.shape) for index in indices) % 2**32 == jit_checksum(x)
    long = np.asfortranarray(x.reshape(210, 2).repeat(400, 1))
    assert checksum_of_shard(long, (slice(None), slice(0, None)), long.shape) == jit_checksum(long)
