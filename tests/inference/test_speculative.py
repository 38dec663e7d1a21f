import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mla_moe import ConfigError, Transformer
from mla_moe.inference.engine import Engine
from mla_moe.inference.request import Request
from mla_moe.nn.abstract_model import AbstractModel, model_arrays

MAX_MODEL_LEN = 60


def agreeing_model(cfg):
    """Model and MTP module often agree: the layers add little to a large embedding."""
    model = Transformer(dataclasses.replace(cfg, rope_scaling=None), rngs=nnx.Rngs(0))
    arrays = dict(model_arrays(model))
    arrays = {p: x * 0.3 if p.endswith(("/o", "/down")) else x for p, x in arrays.items()}
    half = jnp.eye(cfg.hidden_size)
    arrays["mtp/project"] = jnp.concatenate([half, 0 * half])
    arrays["embed"] = arrays["embed"] * 10
    return AbstractModel(model.cfg).merge(arrays)


@pytest.fixture(scope="module")
def engines(cfg):
    model = agreeing_model(cfg)
    options = {"max_num_seqs": 4, "max_model_len": MAX_MODEL_LEN, "record_experts": True}
    return Engine(model, **options), Engine(model, speculative=True, **options)


def run(engine, requests):
    completions = [engine.submit(r) for r in requests]
    while engine.has_unfinished_requests:
        engine.step()
    return completions


@pytest.mark.slow
def test_generates_the_tokens_of_plain_decoding_in_fewer_steps(engines):
    rng = np.random.default_rng(0)
    requests = [
        Request(rng.integers(0, 64, n).tolist(), 24, temperature=t, top_p=0.9, sample_index=n, stop_ids=(7,))
        for n in (1, 5, 33, 36)
        for t in (0.0, 0.5, 2.0)
    ]
    plain, speculative = (run(engine, requests) for engine in engines)
    assert [c.tokens for c in plain] == [c.tokens for c in speculative]
    assert [c.finish_reason for c in plain] == [c.finish_reason for c in speculative]
    assert {c.finish_reason for c in plain} == {"stop", "length"}
    for a, b in zip(plain, speculative, strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)
        np.testing.assert_array_equal(np.sort(a.experts_TlK), np.sort(b.experts_TlK))
    proposed, accepted = engines[1].draft_stats
    assert 0.2 * proposed < accepted < proposed


@pytest.mark.slow
def test_samples_follow_the_models_distribution(engines):
    """The third token after one prompt, often a draft token or after one, against its exact distribution."""
    engine, samples = engines[1], 2000
    requests = [Request([5, 9], 3, temperature=1.0, sample_index=n) for n in range(samples)]
    counts = np.bincount([c.tokens[2] for c in run(engine, requests)], minlength=64)
    model = engines[0].graph.merge(engines[0].weights)
    cache = model.init_cache(64 * 64, 4)
    pairs = jnp.stack(jnp.meshgrid(jnp.arange(64), jnp.arange(64), indexing="ij"), axis=-1).reshape(-1, 2)
    sequences = jnp.concatenate([jnp.tile(jnp.array([5, 9]), (len(pairs), 1)), pairs], axis=1)
    h, _, _ = jax.jit(lambda m, t, c: m.extend(t, c, form="expanded"))(model, sequences, cache)
    p = np.asarray(jax.nn.softmax(model.logits(h[:, 1:])), np.float64)  # after 9, after x, after x y
    first, second, third = p[0, 0], p[::64, 1], p[:, 2].reshape(64, 64, 64)
    expected = np.einsum("x,xy,xyz->z", first, second, third)
    z = (counts - samples * expected) / np.sqrt(samples * expected * (1 - expected))
    assert (z**2).sum() < 64 + 5 * np.sqrt(2 * 64)  # chi-squared, 63 degrees of freedom


def test_needs_an_mtp_module(cfg):
    model = Transformer(dataclasses.replace(cfg, num_nextn_predict_layers=0), rngs=nnx.Rngs(0))
    with pytest.raises(ConfigError, match="num_nextn_predict_layers"):
        Engine(model, max_num_seqs=1, max_model_len=8, speculative=True)
