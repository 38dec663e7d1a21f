"""DeepSeek Sparse Attention in the engine."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mla_moe import Transformer, generate
from mla_moe.inference.engine import Engine
from mla_moe.inference.request import Request


@pytest.mark.slow
def test_engine_shares_prefixes_and_drafts(dsa_cfg):
    """Greedy text is the same from a copied prefix, with a slot left from another request, and with the MTP module."""
    cfg = dataclasses.replace(dsa_cfg, num_nextn_predict_layers=1)
    model = Transformer(cfg, rngs=nnx.Rngs(0))
    random = np.random.default_rng(0)
    prefix = random.integers(0, cfg.vocab_size, 40).tolist()
    prompts = [[*prefix, *random.integers(0, cfg.vocab_size, n).tolist()] for n in (3, 9, 1)]
    forward = jax.jit(lambda model, tokens: model(tokens).argmax(-1))
    for speculative in (False, True):
        engine = Engine(model, max_num_seqs=2, max_model_len=64, speculative=speculative)
        completions = [engine.submit(Request(prompt, max_new_tokens=8)) for prompt in prompts]
        while engine.has_unfinished_requests:
            engine.step()
        for prompt, completion in zip(prompts, completions, strict=True):
            sequence = jnp.array([[*prompt, *completion.tokens]])
            padded = jnp.pad(sequence, ((0, 0), (0, 64 - sequence.shape[1])))
            after = forward(model, padded)[0, len(prompt) - 1 : len(prompt) + 7]
            assert after.tolist() == completion.tokens
    assert generate(model, prompts, max_new_tokens=8) == [completion.tokens for completion in completions]
