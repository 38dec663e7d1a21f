"""The engine that samples and the model that learns compute one network: probabilities and experts agree."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mla_moe import Transformer
from mla_moe.inference.engine import Engine
from mla_moe.inference.request import Request
from mla_moe.rl.packing import SampledCompletion, pack_completions
from mla_moe.training.loss import token_logprobs


@pytest.fixture(scope="module", params=[1.0, 0.7])
def rollout(request, cfg):
    """Answers of different lengths in groups of three, at two temperatures, and the rows that the trainer reads."""
    temperature = request.param
    model = Transformer(dataclasses.replace(cfg, num_nextn_predict_layers=0), rngs=nnx.Rngs(0))
    engine = Engine(model, slots=4, capacity=40, record_experts=True, tempered=True)
    prompts = [[1], [5, 9, 2, 7, 7], list(range(20)), [3, 4]]
    stop = tuple(range(8))
    done = [
        engine.submit(Request(prompt, 12, temperature, seed=3, number=n, stop_ids=stop))
        for n, prompt in enumerate(prompt for prompt in prompts for _ in range(3))
    ]
    while engine.busy:
        engine.step()
    sampled = [SampledCompletion(c.request.prompt, c.tokens, c.logprobs, c.experts_TlK) for c in done]
    assert len({len(answer.tokens) for answer in sampled}) > 2
    return model, sampled, pack_completions(sampled, 40, 1), temperature


def hidden(model, rows, replay):
    return jax.jit(lambda *args: model.hidden(*args))(
        rows["tokens"], rows["segment_ids"], rows["positions"], replay.astype(jnp.int32)
    )


def test_log_probabilities_are_the_engines(rollout):
    model, _, rows, temperature = rollout
    h_BTD, _ = hidden(model, rows, rows["replay"])
    logprob_BT, entropy_BT = token_logprobs(
        model, h_BTD, jnp.asarray(rows["targets"]), chunk=16, temperature=temperature
    )
    of_answers = rows["answer_BT"] >= 0
    np.testing.assert_allclose(logprob_BT[of_answers], rows["sampler_logprob_BT"][of_answers], atol=1e-4)
    assert (entropy_BT[of_answers] > 0).all()


def test_every_expert_that_sampled_learns(rollout):
    model, sampled, rows, _ = rollout
    _, stats = hidden(model, rows, rows["replay"])
    E = model.cfg.n_routed_experts
    for layer in range(model.cfg.num_moe_layers):
        chosen = np.concatenate([answer.experts_TlK[:, layer].ravel() for answer in sampled])
        np.testing.assert_array_equal(stats.load_E[layer], np.bincount(chosen, minlength=E))
    # In float32 the router agrees of itself, so that replay has nothing to mend; told otherwise, it follows.
    _, free = hidden(model, rows, jnp.full_like(rows["replay"], -1))
    assert np.abs(free.load_E - stats.load_E).sum() <= 0.01 * stats.load_E.sum()
    _, other = hidden(model, rows, jnp.where(rows["replay"] >= 0, (rows["replay"] + 1) % E, -1))
    np.testing.assert_array_equal(other.load_E, np.roll(stats.load_E, 1, axis=1))
