"""Sampler and trainer: the engine and the model compute the same log-probabilities and choose the same experts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mla_moe import Transformer
from mla_moe.inference.engine import Engine
from mla_moe.inference.request import Request
from mla_moe.rl.packing import pack_completions


@pytest.fixture(scope="module", params=[1.0, 0.7])
def rollout(request, cfg):
    """Completions of different lengths in groups of three, at two temperatures, and their packed sequences."""
    temperature = request.param
    model = Transformer(dataclasses.replace(cfg, num_nextn_predict_layers=0), rngs=nnx.Rngs(0))
    engine = Engine(model, max_num_seqs=4, max_model_len=40, record_experts=True, temperature_scaled_logprobs=True)
    prompts = [[1], [5, 9, 2, 7, 7], list(range(20)), [3, 4]]
    stop = tuple(range(8))
    done = [
        engine.submit(Request(prompt, 12, temperature, seed=3, sample_index=n, stop_ids=stop))
        for n, prompt in enumerate(prompt for prompt in prompts for _ in range(3))
    ]
    while engine.has_unfinished_requests:
        engine.step()
    assert len({len(completion.tokens) for completion in done}) > 2
    return model, done, pack_completions(done, 40, 1), temperature


def hidden(model, packed, replay):
    return jax.jit(lambda *args: model.hidden(*args))(
        packed["tokens"], packed["segment_ids"], packed["positions"], replay.astype(jnp.int32)
    )


def test_trainer_logprobs_are_the_samplers(rollout):
    model, _, packed, temperature = rollout
    h_BTD, _ = hidden(model, packed, packed["replay"])
    targets_BT = jnp.asarray(packed["targets"])
    logprob_BT, entropy_BT = model.token_logprobs(h_BTD, targets_BT, chunk=16, temperature=temperature)
    real_BT = packed["completion_BT"] >= 0
    np.testing.assert_allclose(logprob_BT[real_BT], packed["sampler_logprob_BT"][real_BT], atol=1e-4)
    assert (entropy_BT[real_BT] > 0).all()


def test_routing_replay_uses_the_samplers_experts(rollout):
    model, sampled, packed, _ = rollout
    _, stats = hidden(model, packed, packed["replay"])
    E = model.cfg.n_routed_experts
    for layer in range(model.cfg.num_moe_layers):
        chosen = np.concatenate([completion.experts_TlK[:, layer].ravel() for completion in sampled])
        np.testing.assert_array_equal(stats.load_E[layer], np.bincount(chosen, minlength=E))
    # In float32 the trainer's router agrees without replay; replay of other experts changes the routing.
    _, free = hidden(model, packed, jnp.full_like(packed["replay"], -1))
    assert np.abs(free.load_E - stats.load_E).sum() <= 0.01 * stats.load_E.sum()
    _, other = hidden(model, packed, jnp.where(packed["replay"] >= 0, (packed["replay"] + 1) % E, -1))
    np.testing.assert_array_equal(other.load_E, np.roll(stats.load_E, 1, axis=1))
