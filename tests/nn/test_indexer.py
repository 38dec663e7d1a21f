"""DeepSeek Sparse Attention: exact in training and over a cache, and never with an array of a number for each pair."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mla_moe import ConfigError, MLAttention, Transformer
from mla_moe.checkpoint.quantization import FP8_BLOCKS
from mla_moe.nn.abstract_model import AbstractModel

LENGTH = 21


def attention(topk, **fields):
    widths = {"hidden_size": 16, "num_heads": 2, "kv_lora_rank": 12, "q_lora_rank": 10, "qk_nope_head_dim": 6}
    widths |= {"qk_rope_head_dim": 4, "v_head_dim": 5, "index_n_heads": 3, "index_head_dim": 8}
    return MLAttention(**widths | fields, index_topk=topk, rngs=nnx.Rngs(0), initializer_range=0.3)


@pytest.mark.parametrize("topk", [LENGTH, 12])
def test_selecting_every_key_of_a_document_is_dense_attention(topk):
    """With as many keys as tokens, and with fewer in packed documents that are no longer."""
    x = jax.random.normal(jax.random.key(0), (2, LENGTH, 16))
    sequences = {"segment_ids": jnp.array([[1] * 12 + [2] * 9, [1] * 4 + [2] * 12 + [0] * 5])}
    sparse, dense = attention(topk), attention(None)
    nnx.update(dense, {name: value for name, value in nnx.state(sparse).items() if name != "indexer"})

    def run(model):
        def loss(state, x):
            y = nnx.merge(nnx.graphdef(model), state)(x, **sequences)
            return (y * y).sum(), y

        return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(nnx.state(model), x)

    ((grads, grad_x), y), ((dense_grads, dense_grad_x), dense_y) = run(sparse), run(dense)
    np.testing.assert_allclose(y, dense_y, atol=1e-5)
    np.testing.assert_allclose(grad_x, dense_grad_x, atol=1e-5)
    for name, expected in dense_grads.items():
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), grads[name], expected)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads["indexer"]))


@pytest.mark.parametrize("run", ["training", "prefill"])
def test_no_array_has_a_number_for_each_query_and_key(run):
    """The program of 16,384 tokens, forward and backward."""
    T, model = 16384, attention(64)
    state, graph = nnx.state(model), nnx.graphdef(model)

    def training(state, x):
        return jax.grad(lambda state: nnx.merge(graph, state)(x).sum())(state)

    def prefill(state, x):
        model = nnx.merge(graph, state)
        return model.prefill(x, model.init_cache(1, T))

    function = {"training": training, "prefill": prefill}[run]
    text = jax.jit(function).lower(state, jax.ShapeDtypeStruct((1, T, 16), jnp.float32)).compile().as_text()
    sizes = {math.prod(map(int, shape.split(","))) for shape in re.findall(r"\w\[([\d,]+)\]", text)}
    assert T * T / 32 in sizes, "the bits of selected keys are there"
    assert max(sizes) < T * T / 16


def test_prefill_and_decode_equal_a_forward_pass(dsa_cfg):
    """Ragged prompts in two chunks, then decode steps, of more tokens than are selected."""
    model = Transformer(dsa_cfg, rngs=nnx.Rngs(0))
    tokens = jax.random.randint(jax.random.key(1), (2, LENGTH), 0, dsa_cfg.vocab_size)
    expected = jax.jit(lambda m, t: m(t))(model, tokens)
    prefill, decode = jax.jit(lambda m, *args: m.prefill(*args)), jax.jit(lambda m, *args: m.decode_step(*args))
    cache = model.init_cache(2, 32)
    _, cache = prefill(model, tokens[:, :8], cache, jnp.array([8, 5]))
    logits, cache = prefill(model, jnp.stack([tokens[0, 8:16], tokens[1, 5:13]]), cache, jnp.array([8, 8]))
    np.testing.assert_allclose(logits, jnp.stack([expected[0, 15], expected[1, 12]]), atol=2e-5)
    for step in range(5):
        new = jnp.stack([tokens[0, 16 + step], tokens[1, 13 + step]])
        logits, cache = decode(model, new, cache)
        np.testing.assert_allclose(logits, jnp.stack([expected[0, 16 + step], expected[1, 13 + step]]), atol=2e-5)


def test_an_int8_cache_has_scales_of_the_keys():
    """With all keys selected the outputs are those of a dense int8 cache; with fewer they are near."""
    x = jax.random.normal(jax.random.key(0), (2, 40, 16))
    outputs = {}
    for topk, dtype in ((40, jnp.int8), (None, jnp.int8), (9, jnp.int8), (9, jnp.float32)):
        model = attention(topk)
        nnx.update(model, {n: v for n, v in nnx.state(attention(9)).items() if topk or n != "indexer"})
        outputs[topk, dtype] = jax.jit(lambda m, x, c: m.prefill(x, c)[0])(model, x, model.init_cache(2, 60, dtype))
    np.testing.assert_allclose(outputs[40, jnp.int8], outputs[None, jnp.int8], atol=1e-5)
    near = np.abs(outputs[9, jnp.int8] - outputs[9, jnp.float32]) < 0.05 * np.abs(outputs[9, jnp.float32]).max()
    assert near.mean() > 0.9
    assert model.init_cache(2, 60, jnp.int8).entries_LBSW.shape[-1] == 12 + 4 + 8 + 8 + 8


def test_indexers_of_layers_that_share_keys_take_no_parameters(dsa_cfg):
    shapes = {path: variable.get_value().shape for path, variable in AbstractModel(dsa_cfg).variables.items()}
    assert shapes["dense_layers/attention/indexer/k"] == (1, 32, 10)
    assert shapes["moe_layers/attention/indexer/k"] == (1, 32, 10), "one of three layers"
    shared = dataclasses.replace(dsa_cfg, indexer_types=("full", "shared", "shared", "shared"))
    assert not any("moe_layers" in path and "indexer" in path for path in AbstractModel(shared).variables)


@pytest.mark.parametrize(
    ("fields", "field"),
    [({"q_lora_rank": None}, "q_lora_rank"), ({"causal": False}, "causal"), ({"index_head_dim": 4}, "index_head_dim")],
)
def test_an_impossible_indexer_names_the_field(fields, field):
    with pytest.raises(ConfigError) as error:
        attention(3, **fields)
    assert error.value.field == field


def test_fp8_is_of_the_matrices_that_are_released_in_it():
    prefix = "model.layers.0.self_attn."
    names = ["indexer.wq_b.weight", "indexer.wk.weight", "q_b_proj.weight", "indexer.weights_proj.weight"]
    assert [FP8_BLOCKS.selects(prefix + name) for name in [*names, "indexer.k_norm.weight"]] == [
        True,
        True,
        True,
        False,
        False,
    ]
