"""Logits, experts and gradients equal those of transformers 5.23.0 on the same files (`tests/golden/make.py`)."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mla_moe.checkpoint.hf_mapping import tensor_mappings
from mla_moe.checkpoint.pretrained import load_pretrained
from mla_moe.nn.abstract_model import AbstractModel, model_arrays
from mla_moe.nn.block import SequenceInfo

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = ["v2_greedy", "v2_group_limited", "v3", "k2", "moonlight"]
KINDS = ["plain", "long", "padded", "packed"]


@pytest.fixture(scope="module", params=CASES)
def case(request):
    """Expected arrays, and ours of all kinds of batches as one batch, with shorter sequences padded."""
    directory = GOLDEN / request.param
    expected = np.load(directory / "expected.npz")
    model = load_pretrained(directory, dtype=jnp.float32)
    length = max(expected[f"{kind}/tokens"].shape[1] for kind in KINDS)

    def padded(name):
        arrays = [expected[f"{kind}/{name}"] for kind in KINDS]
        return np.concatenate([np.pad(x, ((0, 0), (0, length - x.shape[1]))) for x in arrays])

    logits, experts = logits_and_experts(model, *map(padded, ("tokens", "segments", "positions")))
    return expected, np.asarray(logits), np.asarray(experts)


@jax.jit
def logits_and_experts(model, tokens, segments, positions):
    """The model's logits, and the sorted experts of each token in each MoE layer."""
    x, selected = model.embedding(tokens), []
    for layers in [getattr(model, name) for name in ("dense_layers", "moe_layers")]:
        graph, state = nnx.split(layers)
        for i in range(jax.tree.leaves(state)[0].shape[0]):
            block = nnx.merge(graph, jax.tree.map(lambda x, i=i: x[i], state))
            if block.experts:
                h = x + block.attention(block.attention_norm(x), segment_ids=segments, positions=positions)
                experts = block.moe.router(block.mlp_norm(h).reshape(-1, h.shape[-1])).experts_NK
                selected.append(jnp.sort(experts, axis=-1).reshape(*tokens.shape, -1))
            x, _, _ = block(x, SequenceInfo(segments, positions))
    return model(tokens, segments, positions), jnp.stack(selected)


@pytest.mark.smoke
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_experts_equal_transformers(case, kind):
    expected, logits, experts = case
    start = sum(len(expected[f"{k}/tokens"]) for k in KINDS[: KINDS.index(kind)])
    B, T = expected[f"{kind}/tokens"].shape
    not_padding = expected[f"{kind}/segments"] != 0
    logits, experts = logits[start : start + B, :T], experts[:, start : start + B, :T]
    np.testing.assert_allclose(logits[not_padding], expected[f"{kind}/logits"][not_padding], atol=2e-5, rtol=0)
    np.testing.assert_array_equal(experts[:, not_padding], expected[f"{kind}/experts"][:, not_padding])


def test_mtp_logits_equal_transformers():
    model, expected = load_pretrained(GOLDEN / "v3", dtype=jnp.float32), np.load(GOLDEN / "v3" / "expected.npz")

    @jax.jit
    def both(model, tokens):
        """Without segments and positions: one document, no padding."""
        h, _ = model.hidden(tokens)
        h2, _ = model.mtp_hidden(h[:, :-1], tokens[:, 1:])
        return model.logits(h), model.logits(h2)

    logits, mtp_logits = both(model, expected["plain/tokens"])
    np.testing.assert_allclose(logits, expected["plain/logits"], atol=2e-5, rtol=0)
    np.testing.assert_allclose(mtp_logits, expected["plain/mtp_logits"], atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", ["v3", pytest.param("tied", marks=pytest.mark.slow)])
def test_gradients_equal_pytorch(name):
    """Also where the head is the embedding: its gradient is the sum of both uses."""
    model, expected = load_pretrained(GOLDEN / name, dtype=jnp.float32), np.load(GOLDEN / name / "expected.npz")
    expected_grads = dict(np.load(GOLDEN / name / "gradients.npz"))
    tokens = jnp.asarray(expected["plain/tokens"])
    B, T = tokens.shape
    batch = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": jnp.ones((B, T - 1), jnp.int32),
        "positions": jnp.tile(jnp.arange(T - 1), (B, 1)),
    }
    abstract_model, mtp = AbstractModel(model.cfg), bool(model.cfg.num_nextn_predict_layers)

    def loss(arrays):
        model = abstract_model.merge(arrays)
        s = model.loss_sums(batch, chunk=5, mtp=mtp)
        return s.nats / (B * (T - 1)) + 0.3 * s.mtp_nats / (B * (T - 2)), model(tokens)

    (value, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(model_arrays(model))
    np.testing.assert_allclose(logits, expected["plain/logits"], atol=2e-5, rtol=0)
    assert float(value) == pytest.approx(float(expected_grads.pop("loss")), rel=1e-6)
    compared = set()
    for piece in tensor_mappings(model.cfg):
        if piece.name in expected_grads:
            compared.add(piece.name)
            grad = piece.to_hf_tensor(np.asarray(grads[piece.path][piece.index]))
            scale = np.abs(expected_grads[piece.name]).max()
            np.testing.assert_allclose(
                grad, expected_grads[piece.name], atol=1e-4 * scale, rtol=1e-3, err_msg=piece.name
            )
    assert compared == set(expected_grads)
