"""DeepSeek Sparse Attention in the engine."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mla_moe import MeshConfig, Transformer, generate
from mla_moe.inference.engine import Engine
from mla_moe.inference.request import Request
from mla_moe.nn.abstract_model import AbstractModel, model_arrays
from mla_moe.parallel.mesh import make_mesh


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


@pytest.mark.slow
def test_a_mesh_generates_the_tokens_of_one_device(dsa_cfg):
    """There layers are stacked, and those that share keys are told apart by the program."""
    model, mesh = Transformer(dsa_cfg, rngs=nnx.Rngs(0)), make_mesh(MeshConfig(data=2, expert=2, tensor=2))
    abstract_model = AbstractModel(dsa_cfg)
    shardings = abstract_model.shardings(mesh)
    arrays = {path: jax.device_put(array, shardings[path]) for path, array in model_arrays(model).items()}
    prompts = [np.random.default_rng(n).integers(0, dsa_cfg.vocab_size, n).tolist() for n in (3, 12, 30, 1)]
    one, many = (generate(m, prompts, max_new_tokens=9) for m in (model, abstract_model.merge(arrays)))
    assert one == many
