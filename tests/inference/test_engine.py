import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mla_moe import ConfigError, Transformer
from mla_moe.config import MeshConfig
from mla_moe.inference import engine as module
from mla_moe.inference.engine import Engine
from mla_moe.inference.request import Request
from mla_moe.nn.abstract_model import AbstractModel, model_arrays
from mla_moe.parallel.mesh import make_mesh

CAPACITY = 48


@pytest.fixture(scope="module")
def model(cfg):
    return Transformer(dataclasses.replace(cfg, num_nextn_predict_layers=0), rngs=nnx.Rngs(0))


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Prompts take several pieces, and beginnings of a few tokens are worth copying."""
    monkeypatch.setattr(module, "PIECES", (8,))
    monkeypatch.setattr(module, "ROWS", 2)
    monkeypatch.setattr(module, "WORTH_COPYING", 4)


@pytest.fixture(scope="module")
def requests():
    rng = np.random.default_rng(0)
    lengths = [1, 30, 9, 2, 17, 33, 8, 5]
    return [
        Request(rng.integers(0, 64, n).tolist(), 3 + 2 * i % 7, temperature=i % 2 * 1.5, top_k=i % 3 * 20, number=i)
        for i, n in enumerate(lengths)
    ]


def engine_of(model, **options):
    """All alike, so that they compile once."""
    return Engine(model, slots=4, capacity=CAPACITY, record_experts=True, **options)


def finish(engine):
    while engine.busy:
        engine.step()


def tokens_of(engine, requests):
    completions = [engine.submit(r) for r in requests]
    finish(engine)
    return [c.tokens for c in completions]


@pytest.fixture(scope="module")
def alone(model, requests):
    """Each request's tokens in a fresh engine with nobody else."""
    return [tokens_of(engine_of(model), [r])[0] for r in requests]


def test_company_and_slot_do_not_matter(model, requests, alone):
    engine = engine_of(model)
    order = [5, 3, 0, 7, 2, 6, 1, 4]
    together = tokens_of(engine, [requests[i] for i in order])
    assert together == [alone[i] for i in order]
    assert engine.load.used > 0.6 * engine.load.offered
    assert tokens_of(engine, requests) == alone  # slots that have been used, and hold some of the prompts


def test_nor_does_company_with_a_cache_in_eight_bits(model, requests):
    together = tokens_of(engine_of(model, int8_kv_cache=True), requests)
    for number in (1, 5):  # a long one and one that is drawn
        assert tokens_of(engine_of(model, int8_kv_cache=True), requests[number : number + 1]) == [together[number]]


def test_tokens_and_probabilities_are_the_models(model, requests):
    engine = engine_of(model)
    request = dataclasses.replace(requests[4], temperature=0.0, max_new_tokens=10)
    completion = engine.submit(request)
    finish(engine)
    text = jnp.array([[*request.prompt, *completion.tokens]])
    logits = jax.jit(lambda m, t: m(t))(model, text)[0, len(request.prompt) - 1 : -1]
    assert completion.tokens == logits.argmax(-1).tolist()
    wanted = jnp.take_along_axis(jax.nn.log_softmax(logits), text[0, len(request.prompt) :, None], axis=1)[:, 0]
    np.testing.assert_allclose(completion.logprobs, wanted, atol=1e-5)
    assert completion.finish == "length"


def test_experts_are_those_of_one_forward_pass(model, requests):
    engine = engine_of(model)
    one, two = (engine.submit(dataclasses.replace(requests[1], temperature=1.0, number=n)) for n in (0, 1))
    finish(engine)
    for completion in (one, two):
        read = jnp.array([[*completion.request.prompt, *completion.tokens[:-1]]])
        cache = jnp.zeros((3, 1, CAPACITY, 20))
        start = jnp.zeros(1, jnp.int32)
        _, _, experts = jax.jit(lambda m, t, c, s: m.extend(t, c, s, form="expanded"))(model, read, cache, start)
        np.testing.assert_array_equal(np.sort(completion.experts_TlK), np.sort(np.moveaxis(experts[:, 0], 0, 1)))


def test_completions_of_one_prompt_share_its_prefill(model, requests, monkeypatch):
    engine, pieces = engine_of(model), []
    read = engine._read
    monkeypatch.setattr(engine, "_read", lambda: pieces.append(1) or read())
    group = [dataclasses.replace(requests[1], temperature=1.0, number=n) for n in range(4)]
    answers = tokens_of(engine, group)
    assert len(pieces) == 4  # 29 tokens by eights, once
    assert len({tuple(a) for a in answers}) == 4
    longer = dataclasses.replace(requests[1], prompt=[*requests[1].prompt, 1, 2, 3])
    assert tokens_of(engine, [longer]) == tokens_of(engine_of(model), [longer])
    assert len(pieces) == 5  # the beginning was there


def test_a_copied_beginning_is_all_that_a_slot_holds(model, monkeypatch):
    """The second of two requests that come together begins like all of what the first took only a block of."""
    monkeypatch.setattr(module, "PIECES", (64,))
    model = Transformer(dataclasses.replace(model.cfg, max_position_embeddings=512), rngs=nnx.Rngs(0))
    read, other = np.random.default_rng(0).integers(0, 64, (2, 300)).tolist()
    longer = Request([*read, 7], 8)

    def engine():
        return Engine(model, slots=3, capacity=512)

    busy = engine()
    first, _, last = (busy.submit(Request(prompt, 100)) for prompt in ([1], read, [2]))
    busy.step()
    busy.cancel(first)
    busy.cancel(last)
    _, answer = tokens_of(busy, [Request([*read[:10], *other], 8), longer])
    assert answer == tokens_of(engine(), [longer])[0]


def test_stop_tokens_and_stop_strings(model, requests):
    request = dataclasses.replace(requests[2], temperature=0.0, max_new_tokens=12)
    engine = engine_of(model, decode=lambda ids: "".join(f"<{i}>" for i in ids))
    free, third = engine.submit(request), None
    finish(engine)
    third = free.tokens[2]
    cut = free.tokens.index(third) + 1
    by_id = engine.submit(dataclasses.replace(request, stop_ids=(third,)))
    by_string = engine.submit(dataclasses.replace(request, stop=(f"><{third}",)))
    finish(engine)
    assert by_id.tokens == free.tokens[:cut]
    assert by_string.tokens == free.tokens[:cut]
    assert by_id.finish == by_string.finish == "stop"
    before = "".join(f"<{i}>" for i in free.tokens[: cut - 1])
    assert by_id.text.text == before
    assert by_string.text.text == before[:-1]


def test_cancelled_requests_free_their_slot(model, requests, alone):
    engine = engine_of(model)
    long = dataclasses.replace(requests[0], max_new_tokens=40)
    running = [engine.submit(dataclasses.replace(long, number=n)) for n in range(4)]
    waiting, last = engine.submit(requests[1]), engine.submit(requests[2])
    engine.step()
    assert all(len(c.tokens) == 16 for c in running)
    engine.cancel(running[1])
    engine.cancel(waiting)
    engine.step()
    assert last.tokens == alone[2]
    finish(engine)
    assert [c.finish for c in (*running, waiting)] == ["length", "cancelled", "length", "length", "cancelled"]
    assert waiting.tokens == []


def test_new_weights_forget_what_old_ones_read(model, requests):
    engine = engine_of(model)
    before = tokens_of(engine, requests[1:2])
    other = Transformer(model.cfg, rngs=nnx.Rngs(1))
    engine.load_weights(other)
    after = tokens_of(engine, requests[1:2])
    assert before != after == tokens_of(engine_of(other), requests[1:2])


def test_on_a_mesh_as_on_one_device(model, requests, alone):
    mesh = make_mesh(MeshConfig(data=2, expert=2, tensor=2))
    abstract_model = AbstractModel(model.cfg)
    places = abstract_model.shardings(mesh)
    arrays = {path: jax.device_put(array, places[path]) for path, array in model_arrays(model).items()}
    engine = Engine(abstract_model.merge(arrays), slots=4, capacity=CAPACITY)
    assert tokens_of(engine, requests) == alone
    assert engine._cache.sharding.shard_shape(engine._cache.shape)[1] == 1


def test_requests_fit_the_models_positions(model):
    short = Transformer(dataclasses.replace(model.cfg, max_position_embeddings=40), rngs=nnx.Rngs(0))
    assert Engine(short, slots=1, capacity=40).capacity == 40
    with pytest.raises(ConfigError, match=r"capacity = 41: .* max_position_embeddings = 40"):
        Engine(short, slots=1, capacity=41)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("prompt", {"prompt": [99]}),
        ("prompt", {"prompt": [1] * 60}),
        ("temperature", {"temperature": float("nan")}),
        ("top_p", {"top_p": 0.0}),
        ("min_p", {"min_p": 2.0}),
        ("max_new_tokens", {"max_new_tokens": 0}),
        ("seed", {"seed": -1}),
        ("stop", {"stop": ("x",)}),
    ],
)
def test_impossible_requests(model, field, values):
    engine = engine_of(model)
    with pytest.raises(ConfigError, match=field):
        engine.submit(Request(**{"prompt": [1], "max_new_tokens": 5} | values))
    assert not engine.busy
