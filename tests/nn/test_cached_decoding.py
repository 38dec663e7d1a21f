"""The public methods of cached decoding against a forward pass over whole sequences."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mla_moe import ConfigError, KVCache, MLAttention, Transformer
from mla_moe.config import MeshConfig
from mla_moe.parallel.mesh import make_mesh

T = 12
"""Tokens of each sequence: a prompt, of which each sequence has another part, and the tokens decoded after it."""
LENGTHS = jnp.array([5, 1, 7, 4])
prefill = jax.jit(lambda model, *args: model.prefill(*args), donate_argnums=2)


@pytest.fixture(scope="module")
def model(cfg):
    return Transformer(dataclasses.replace(cfg, num_nextn_predict_layers=0), rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def tokens(cfg):
    return jax.random.randint(jax.random.key(1), (len(LENGTHS), T), 0, cfg.vocab_size)


@pytest.fixture(scope="module")
def expected(model, tokens):
    return np.asarray(jax.jit(lambda m, t: m(t))(model, tokens))


@pytest.fixture(scope="module")
def attention(cfg):
    return MLAttention(cfg, rngs=nnx.Rngs(0))


def new_token(x_BT, length_B):
    """The token of each sequence after its first `length`."""
    return jnp.take_along_axis(x_BT, length_B.reshape(-1, *[1] * (x_BT.ndim - 1)), axis=1)


def run(model, tokens, cache):
    """Ragged prompts in two padded chunks, of which some sequences need only the first, then decode steps under a scan.
    Logits after every prompt and step, and the last cache."""
    first = jnp.minimum(LENGTHS, 4)
    _, cache = prefill(model, tokens[:, :4], cache, first)
    logits, cache = prefill(model, tokens[:, 4:8], cache, LENGTHS - first)
    after_prompt = jnp.where((LENGTHS > 4)[:, None], logits, 0)

    def step(cache, _):
        logits, cache = model.decode_step(new_token(tokens, cache.length_B)[:, 0], cache)
        return cache, logits

    cache, logits = jax.jit(lambda cache: jax.lax.scan(step, cache, length=T - 7), donate_argnums=0)(cache)
    return after_prompt, logits, cache


def worst_error(expected, after_prompt, logits):
    """Against a forward pass over the whole sequences."""
    wanted = [expected[b, n - 1] if n > 4 else 0 * expected[b, 0] for b, n in enumerate(LENGTHS)]
    errors = [np.abs(after_prompt - np.stack(wanted)).max()]
    for i, step in enumerate(np.asarray(logits)):
        errors += [np.abs(step[b] - expected[b, int(n) + i]).max() for b, n in enumerate(LENGTHS)]
    return max(errors)


def test_ragged_prompts_and_decode_steps_equal_one_forward_pass(model, tokens, expected):
    after_prompt, logits, cache = run(model, tokens, model.init_cache(4, T))
    assert cache.max_length == 16
    assert cache.length_B.tolist() == (LENGTHS + T - 7).tolist()
    assert worst_error(expected, after_prompt, logits) < 1e-6 * np.abs(expected).max()


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.bfloat16, 0.02), (jnp.int8, 0.03)])
@pytest.mark.slow
def test_a_smaller_dtype_is_nearly_as_accurate(dtype, tolerance, model, tokens, expected):
    after_prompt, logits, _ = run(model, tokens, model.init_cache(4, T, dtype))
    assert 1e-5 < worst_error(expected, after_prompt, logits) / np.abs(expected).max() < tolerance


@pytest.mark.slow
def test_a_mesh_has_the_logits_of_one_device(model, tokens, expected):
    with jax.set_mesh(make_mesh(MeshConfig(data=2, expert=2, tensor=2))):
        after_prompt, logits, cache = run(model, tokens, model.init_cache(4, T))
        assert worst_error(expected, np.asarray(after_prompt), logits) < 1e-6 * np.abs(expected).max()
        assert cache.entries_LBSW.sharding.shard_shape(cache.entries_LBSW.shape)[1] == 1
        step = jax.jit(lambda m, *args: m.decode_step(*args), donate_argnums=2)
        memory = step.lower(model, tokens[:, 0], cache).compile().memory_analysis()
        assert memory.alias_size_in_bytes >= cache.entries_LBSW.nbytes // 4  # of one device: updated in place


def test_attention_alone_equals_its_forward_pass(attention):
    """Under `jax.jit` and `jax.lax.scan`."""
    x = jax.random.normal(jax.random.key(2), (4, T, attention.cfg.hidden_size))
    expected = jax.jit(lambda m, x: m(x))(attention, x)
    y, cache = jax.jit(lambda m, *args: m.prefill(*args))(attention, x[:, :7], attention.init_cache(4, T), LENGTHS)
    for b, n in enumerate(LENGTHS.tolist()):
        np.testing.assert_allclose(y[b, :n], expected[b, :n], rtol=0, atol=1e-6)

    def step(cache, _):
        y, cache = attention.decode(new_token(x, cache.length_B), cache)
        return cache, y[:, 0]

    _, y = jax.jit(lambda cache: jax.lax.scan(step, cache, length=T - 7))(cache)
    for b, n in enumerate(LENGTHS.tolist()):
        np.testing.assert_allclose(y[:, b], expected[b, n : n + T - 7], rtol=0, atol=1e-6)


@pytest.mark.slow
def test_models_under_vmap_equal_each_alone(cfg, tokens):
    """Two models, each with its cache."""
    cfg = dataclasses.replace(cfg, num_nextn_predict_layers=0, num_hidden_layers=2)
    models = [Transformer(cfg, rngs=nnx.Rngs(seed)) for seed in (0, 1)]
    expected = [jax.jit(lambda m, t: m(t))(m, tokens[:, :8]) for m in models]
    graph, *states = nnx.split(models[0])[0], *(nnx.state(m) for m in models)

    def both(state):
        model = nnx.merge(graph, state)
        first, cache = model.prefill(tokens[:, :7], model.init_cache(4, T), LENGTHS)
        second, cache = model.decode_step(new_token(tokens, cache.length_B)[:, 0], cache)
        return first, second, cache

    first, second, cache = jax.jit(jax.vmap(both))(jax.tree.map(lambda *x: jnp.stack(x), *states))
    assert cache.length_B.tolist() == [(LENGTHS + 1).tolist()] * 2
    for m in range(2):
        for b, n in enumerate(LENGTHS.tolist()):
            np.testing.assert_allclose(first[m, b], expected[m][b, n - 1], rtol=0, atol=2e-6)
            np.testing.assert_allclose(second[m, b], expected[m][b, n], rtol=0, atol=2e-6)


def test_slots_and_active_choose_sequences(model, tokens, expected):
    """Prompts are added to some sequences while others decode; a shortened sequence decodes again."""
    cache, slots = model.init_cache(4, T), jnp.array([3, 0])
    at = jax.jit(lambda m, t, c, n, slots: m.prefill(t, c, n, slots=slots))
    logits, cache = at(model, tokens[:2, :6], cache, jnp.array([6, 2]), slots)
    assert cache.length_B.tolist() == [2, 0, 0, 6]
    np.testing.assert_allclose(logits, expected[[0, 1], [5, 1]], rtol=0, atol=1e-6 * np.abs(expected).max())
    step, active, again = jax.jit(lambda m, *args: m.decode_step(*args)), jnp.array([True, False, False, False]), []
    for _ in range(2):
        before = np.asarray(cache.entries_LBSW)
        logits, cache = step(model, jnp.broadcast_to(tokens[1, 2], 4), cache, active)
        assert cache.length_B.tolist() == [3, 0, 0, 6]
        np.testing.assert_array_equal(np.asarray(cache.entries_LBSW)[:, 1:], before[:, 1:])
        np.testing.assert_allclose(logits[0], expected[1, 2], rtol=0, atol=1e-6 * np.abs(expected).max())
        again.append(np.asarray(logits[0]))
        cache = cache._replace(length_B=cache.length_B.at[0].add(-1))
    np.testing.assert_array_equal(*again)


@pytest.fixture
def cache(model):
    """Of arbitrary entries and no tokens."""
    cache = model.init_cache(4, T)
    return cache._replace(entries_LBSW=jax.random.normal(jax.random.key(3), cache.entries_LBSW.shape))


def test_padding_may_reach_beyond_the_end_of_the_cache(model, tokens, cache):
    """Only tokens have to fit. What earlier tokens have written stays."""
    before = np.asarray(cache.entries_LBSW)
    cache = cache._replace(length_B=jnp.array([14, 13, 6, 14], jnp.int32))
    _, cache = prefill(model, tokens[:, :4], cache, jnp.array([2, 0, 1, 1]))
    assert cache.length_B.tolist() == [16, 13, 7, 15]
    after, changed = np.asarray(cache.entries_LBSW), np.zeros((4, 16), bool)
    changed[0, 14:] = changed[2, 6] = changed[3, 14] = True
    np.testing.assert_array_equal((before != after).any(axis=(0, 3)), changed)


def test_a_full_cache_is_an_error_or_nan(model, tokens, cache):
    before = np.asarray(cache.entries_LBSW)
    cache = cache._replace(length_B=jnp.array([16, 15, 13, 12], jnp.int32))
    with pytest.raises(ConfigError, match=r"cache.length_B = \[16, 15, 13, 12\]: with 1 new tokens more than the 16 p"):
        model.decode_step(tokens[:, 0], cache)
    logits, cache = prefill(model, tokens[:, :4], cache, jnp.array([1, 1, 4, 4]))
    assert jnp.isnan(logits).all(axis=1).tolist() == jnp.isnan(logits).any(axis=1).tolist() == [True, False] * 2
    assert cache.length_B.tolist() == [16, 16, 13, 16]
    np.testing.assert_array_equal(np.asarray(cache.entries_LBSW)[:, ::2], before[:, ::2])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, c: m.init_cache(0, 4), "batch = 0: must be at least 1"),
        (lambda m, c: m.init_cache(1, 0), "max_length = 0: must be at least 1"),
        (lambda m, c: m.init_cache(1, 4, jnp.int32), "dtype = 'int32': a cache is of a floating-point type, or int8"),
        (lambda m, c: m.init_cache(1, 4, mtp=True), "mtp = True: needs a model with an MTP module"),
        (lambda m, c: m.decode_step(jnp.zeros(3, int), c), "batch = 3: the cache has 2 sequences; name those"),
        (lambda m, c: m.prefill(jnp.zeros((2, 9), int), c), "new tokens = 9: must be 1 to 8, the positions of the"),
        (lambda m, c: m.prefill(jnp.zeros((2, 0), int), c), "new tokens = 0: must be 1 to 8"),
        (lambda m, c: m.prefill(jnp.zeros((2, 4), int), c, jnp.array([4, 5])), "lengths = .*: must be at most the 4"),
        (lambda m, c: m.prefill(jnp.zeros((1, 4), int), c, slots=jnp.array([-1])), r"slots = \[-1\]: must be d"),
        (lambda m, c: m.prefill(jnp.zeros((2, 4), int), c, slots=jnp.array([1, 1])), "slots = .*: must be different"),
    ],
)
def test_what_does_not_fit_is_refused(call, message, model):
    with pytest.raises(ConfigError, match=message):
        call(model, model.init_cache(2, 8))


def test_a_cache_of_another_model_is_refused(model, attention):
    x = jnp.ones((2, 1, attention.cfg.hidden_size))
    with pytest.raises(ConfigError, match=r"x = 'float32\[2, 1, 31\]': the shape must be \[b, T, 32\]"):
        attention.decode(x[..., 1:], attention.init_cache(2, 8))
    with pytest.raises(ConfigError, match=r"cache.entries_LBSW = 'float32\[3, 2, 8, 20\]': .* \[1, 2, 8, 20\]"):
        attention.decode(x, model.init_cache(2, 8))
    with pytest.raises(ConfigError, match=r"cache.entries_LBSW = 'int8\[1, 2, 8, 28\]': .* \[3, 2, 8, 28\]"):
        model.decode_step(jnp.zeros(2, jnp.int32), attention.init_cache(2, 8, jnp.int8))


@pytest.mark.parametrize("method", ["decode_step", pytest.param("prefill", marks=pytest.mark.slow)])
def test_a_donated_cache_is_updated_in_place(method, model):
    """The compiled program has the cache once: its output is its input's memory, and no temporary is as large."""
    cache = model.init_cache(4, 2048)
    new = jnp.zeros((4, 8) if method == "prefill" else 4, jnp.int32)
    rest = (jnp.full(4, 8),) if method == "prefill" else ()
    run = jax.jit(lambda m, *args: getattr(m, method)(*args), donate_argnums=2)
    memory = run.lower(model, new, cache, *rest).compile().memory_analysis()
    assert memory.alias_size_in_bytes == cache.entries_LBSW.nbytes + cache.length_B.nbytes
    assert memory.temp_size_in_bytes < cache.entries_LBSW.nbytes / 2


def test_a_step_keeps_the_types_of_a_cache(model):
    """As a scan needs it."""
    cache = model.init_cache(2, 300, jnp.int8)
    assert isinstance(jax.tree.map(lambda x: x, cache), KVCache)
    assert (cache.max_length, cache.entries_LBSW.shape) == (512, (3, 2, 512, 16 + 4 + 8))
    after = jax.eval_shape(lambda m, c: m.decode_step(jnp.zeros(2, jnp.int32), c)[1], model, cache)
    types = [jax.tree.map(lambda x: (x.shape, x.dtype.name), tree) for tree in (cache, after)]
    assert types[0] == types[1]
