import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mla_moe.config import MeshConfig
from mla_moe.nn.loss import reverse_kl, token_logprobs
from mla_moe.ops import cross_entropy as ops
from mla_moe.ops.cross_entropy import reference
from mla_moe.parallel.mesh import BATCH_SPEC, make_mesh


@pytest.mark.parametrize("vocab", [20, 19], ids=["divides", "does not divide"])
@pytest.mark.parametrize(
    "sizes", [MeshConfig(data=1, fsdp=2, tensor=4), MeshConfig(data=2, tensor=2, context=2)], ids=str
)
def test_token_logprobs_and_gradients_on_a_mesh_equal_one_device(sizes, vocab):
    keys = jax.random.split(jax.random.key(0), 4)
    h, head = jax.random.normal(keys[0], (4, 10, 6)), jax.random.normal(keys[1], (6, vocab))
    targets, weights = jax.random.randint(keys[2], (4, 10), 0, vocab), jax.random.normal(keys[3], (4, 10))

    def sharded(h, head):
        return token_logprobs(h, head, targets, chunk=3, temperature=0.9)

    def gradients(f, *args):
        def loss(h, head):
            logprob, entropy = f(h, head)
            return jnp.sum(weights * logprob) + entropy.sum(), (logprob, entropy)

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(*args)

    mesh = make_mesh(sizes)
    with jax.set_mesh(mesh):
        sharded_h = jax.device_put(h, NamedSharding(mesh, BATCH_SPEC))
        sharded_head = jax.device_put(head, NamedSharding(mesh, P("fsdp", None)))
        found = gradients(sharded, sharded_h, sharded_head)
    expected = gradients(lambda h, head: reference(h, head, targets, 0.9), h, head)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("vocab", [20, 19], ids=["divides", "does not divide"])
def test_reverse_kl_and_gradients_on_a_mesh_equal_one_device(vocab):
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = (4, 10, 6), (6, vocab), (4, 10, 8), (8, vocab)
    h, head, teacher_h, teacher_head = (jax.random.normal(key, s) for key, s in zip(keys, shapes, strict=False))
    weights = jax.random.normal(keys[4], (4, 10))

    def gradients(f, h, head, *teacher):
        def loss(h, head):
            kl = f(h, head, *teacher)
            return jnp.sum(weights * kl), kl

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(h, head)

    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2, context=2))
    with jax.set_mesh(mesh):
        tokens, of_head = NamedSharding(mesh, BATCH_SPEC), NamedSharding(mesh, P("fsdp", None))
        sharded = jax.device_put((h, head, teacher_h, teacher_head), (tokens, of_head, tokens, of_head))
        found = gradients(lambda *x: reverse_kl(*x, chunk=3, temperature=0.9), *sharded)
    expected = gradients(lambda *x: ops.reverse_kl(*x, 3, 0.9), h, head, teacher_h, teacher_head)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
