"""Cached decoding, the MTP module and log-probabilities under Explicit mesh axes, against Auto axes and one device."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import mla_moe
from mla_moe import ConfigError, KVCache, MLAttention, Transformer

B, T, PROMPT = 8, 12, 7
AXES = AxisType.Explicit, AxisType.Auto
LENGTHS = np.array([5, 1, 7, 4, 2, 7, 3, 6], np.int32)


def on_mesh(model: Any, kind: AxisType, axes: dict[str, str], inputs: tuple[Any, ...], run: Any) -> Any:
    """`run` of a copy of the model and of the inputs, both sharded over 2 x 4 devices."""
    mesh = jax.make_mesh((2, 4), tuple(axes), axis_types=(kind, kind))
    with jax.set_mesh(mesh), mla_moe.use_mesh_axes(axes):
        copy = nnx.clone(model)
        nnx.update(copy, jax.device_put(nnx.state(copy), mla_moe.named_shardings(copy, mesh)))
        spec = P(tuple(name for name, ours in axes.items() if ours in ("data", "fsdp", "expert")))
        return run(copy, *(jax.device_put(x, NamedSharding(mesh, spec)) for x in inputs))


def spec(x: jax.Array) -> P:
    return jax.typeof(x).sharding.spec


def test_attention_decodes_under_explicit_axes():
    """As under Auto axes, with the shardings of the inputs in the types of the outputs; the cache in place."""
    attention = MLAttention(hidden_size=32, num_heads=4, kv_lora_rank=16, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(B, 4, 32)).astype(np.float32)

    def run(attention: MLAttention, x: jax.Array) -> tuple[jax.Array, jax.Array, KVCache]:
        y, cache = jax.jit(lambda m, *args: m.prefill(*args))(attention, x, attention.init_cache(B, 4), LENGTHS % 4)
        step = jax.jit(lambda m, *args: m.decode(*args), donate_argnums=2)
        step = step.lower(attention, x[:, :1], cache).compile()
        assert step.memory_analysis().alias_size_in_bytes >= cache.entries_LBSW.nbytes // 2  # of one device
        decoded, cache = step(attention, x[:, :1], cache)
        if jax.sharding.get_abstract_mesh().explicit_axes:
            assert spec(y) == spec(decoded) == P("dp", None, None)
            assert spec(cache.entries_LBSW) == P(None, "dp", None, None)
            assert spec(cache.length_B) == P(None)
            assert spec(attention.init_cache(3, 4).entries_LBSW) == P(None, None, None, None)  # 2 does not divide 3
            with pytest.raises(ConfigError, match="4 new tokens more than the 4 positions of the cache"):
                attention.prefill(x, cache)
        return y, decoded, cache

    axes = {"dp": "expert", "tp": "tensor"}
    explicit, auto = (jax.tree.map(np.asarray, on_mesh(attention, kind, axes, (x,), run)) for kind in AXES)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), explicit, auto)
    assert explicit[2].length_B.tolist() == (LENGTHS % 4 + 1).tolist()


def generate(model: Transformer, tokens: jax.Array, lengths: jax.Array) -> Any:
    """Ragged prompts, greedy tokens in a scan, and draft tokens of the MTP module."""

    def step(carry: tuple[jax.Array, KVCache], _: None) -> tuple[tuple[jax.Array, KVCache], Any]:
        token = carry[0].argmax(axis=-1)
        return model.decode_step(token, carry[1]), (token, carry[0])

    prompt = tokens[:, :PROMPT]
    first = model.prefill(prompt, model.init_cache(B, T), lengths)
    (logits, cache), steps = jax.lax.scan(step, first, length=4)
    empty = model.init_cache(B, T, mtp=True)
    h, longer, experts = model.extend(prompt, empty)
    drafted, longer = model.mtp_extend(h, tokens[:, 1 : PROMPT + 1], longer._replace(length_B=empty.length_B))
    return first[0], steps, logits, cache.length_B, experts, model.logits(drafted, model.mtp_head_DV), longer.length_B


def score(model: Transformer, tokens: jax.Array, lengths: jax.Array) -> Any:
    """Of a forward pass: the hidden states of the MTP module, and the targets' log-probabilities."""
    targets = jnp.roll(tokens, -1, axis=1)
    h = model.hidden(tokens)[0]
    drafted, stats = model.mtp_hidden(h, targets)
    logprobs = model.token_logprobs(h, targets, chunk=4, temperature=0.7)
    assert spec(logprobs[0]) == spec(targets) or not jax.sharding.get_abstract_mesh().explicit_axes
    return drafted, stats.load_E, *logprobs, model.logits(model.embedding(tokens))


@pytest.mark.slow
@pytest.mark.parametrize("run", [generate, score])
@pytest.mark.parametrize("axes", [{"dp": "expert", "tp": "tensor"}, {"dp": "fsdp", "ep": "expert"}], ids="-".join)
def test_the_language_model_under_explicit_axes_equals_auto_axes(cfg, axes, run):
    model = Transformer(cfg, rngs=nnx.Rngs(0))
    inputs = np.random.default_rng(0).integers(0, cfg.vocab_size, (B, T)), LENGTHS
    explicit, auto = (jax.tree.map(np.asarray, on_mesh(model, kind, axes, inputs, jax.jit(run))) for kind in AXES)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), explicit, auto)
    one_device = jax.jit(run)(model, *inputs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), explicit, one_device)
