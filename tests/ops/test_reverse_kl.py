"""Reverse KL of distillation against PyTorch (golden/make_distillation.py, checked there against TRL)."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mla_moe.ops.cross_entropy import reverse_kl, top_reverse_kl

GOLDEN = dict(np.load(Path(__file__).parents[1] / "golden" / "distillation.npz"))
INPUTS = [jnp.asarray(GOLDEN[name]) for name in ("student_h", "student_head", "teacher_h", "teacher_head")]
TEMPERATURE = float(GOLDEN["temperature"])


@pytest.mark.smoke
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_equals_pytorch_in_value_and_gradients(chunk):
    weight_BT = GOLDEN["mask"] / GOLDEN["mask"].sum()

    def loss(h, head):
        kl_BT = reverse_kl(h, head, *INPUTS[2:], chunk, TEMPERATURE)
        return jnp.sum(weight_BT * kl_BT), kl_BT

    (total, kl_BT), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(*INPUTS[:2])
    np.testing.assert_allclose(total, GOLDEN["loss"], rtol=1e-5)
    np.testing.assert_allclose(kl_BT, GOLDEN["kl"], rtol=1e-5, atol=1e-6)
    for got, name in zip(gradients, ("grad_h", "grad_head"), strict=True):
        np.testing.assert_allclose(got, GOLDEN[name], atol=1e-5 * np.abs(GOLDEN[name]).max())


def test_the_teacher_has_no_gradient():
    gradients = jax.grad(lambda *x: reverse_kl(*x, 4).sum(), argnums=(2, 3))(*INPUTS)
    assert all((g == 0).all() for g in gradients)


def test_bfloat16_activations_give_a_float32_kl():
    inputs = [jnp.asarray(x, jnp.bfloat16) for x in INPUTS]
    kl_BT, pullback = jax.vjp(lambda *x: reverse_kl(*x, *inputs[2:], 4), *inputs[:2])
    wanted_BT = reverse_kl(*(x.astype(jnp.float32) for x in inputs), 4)
    np.testing.assert_allclose(kl_BT, wanted_BT, rtol=1e-5, atol=1e-6)
    assert [g.dtype for g in pullback(kl_BT)] == [jnp.bfloat16, jnp.bfloat16]


def test_a_student_equal_to_its_teacher_has_no_kl_and_no_gradient():
    kl_BT, pullback = jax.vjp(lambda h: reverse_kl(h, INPUTS[1], *INPUTS[:2], 4), INPUTS[0])
    assert (kl_BT == 0).all()
    assert (pullback(jnp.ones_like(kl_BT))[0] == 0).all()


def most_likely(count):
    """Of a teacher whose least likely tokens are not below the rounding of the others' sum."""
    log_q = jax.nn.log_softmax(0.3 * jnp.einsum("BTE,EV->BTV", *INPUTS[2:]))
    return log_q, *jax.lax.top_k(log_q, count)[::-1]


@pytest.mark.parametrize("chunk", [4, 100])
def test_kl_to_the_most_likely_tokens_is_that_of_them_and_the_rest(chunk):
    """Of distributions over the tokens and their complement, with its gradients by differentiation."""
    _, ids, log_q = most_likely(3)

    def plain(h, head):
        p = jax.nn.softmax(h @ head)
        top, of_teacher = jnp.take_along_axis(p, ids, axis=-1), jnp.exp(log_q)
        buckets = (jnp.append(x, 1 - x.sum(axis=-1, keepdims=True), axis=-1) for x in (top, of_teacher))
        return jax.scipy.special.rel_entr(*buckets).sum(axis=-1)

    weight = jnp.asarray(np.random.default_rng(0).random(ids.shape[:2]), jnp.float32)
    found = []
    for kl in (plain, lambda h, head: top_reverse_kl(h, head, ids, log_q, chunk)):
        loss = lambda *x, kl=kl: (weight * kl(*x)).sum()  # noqa: E731
        found.append((kl(*INPUTS[:2]), *jax.grad(loss, argnums=(0, 1))(*INPUTS[:2])))
    for wanted, got in zip(*found, strict=True):
        np.testing.assert_allclose(got, wanted, atol=2e-5 * np.abs(wanted).max())


def test_kl_to_all_tokens_but_one_is_the_full_one():
    log_q, ids, top = most_likely(INPUTS[1].shape[1] - 1)
    log_p = jax.nn.log_softmax(INPUTS[0] @ INPUTS[1])
    wanted = (jnp.exp(log_p) * (log_p - log_q)).sum(axis=-1)
    np.testing.assert_allclose(top_reverse_kl(*INPUTS[:2], ids, top, 4), wanted, rtol=1e-3)
    part = most_likely(2)[1:]
    assert (top_reverse_kl(*INPUTS[:2], *part, 4) <= wanted + 1e-6).all()
