"""The engine: continuous batching, the prefix cache and the routed experts that it records."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mla_moe import ConfigError, Transformer
from mla_moe.config import MeshConfig
from mla_moe.inference import engine as engine_module
from mla_moe.inference import prefix_cache, scheduler
from mla_moe.inference.engine import Engine
from mla_moe.inference.request import Owner, Request
from mla_moe.nn.abstract_model import AbstractModel, model_arrays
from mla_moe.parallel.mesh import make_mesh

MAX_MODEL_LEN = 48


@pytest.fixture(scope="module")
def model(cfg):
    return Transformer(dataclasses.replace(cfg, num_nextn_predict_layers=0), rngs=nnx.Rngs(0))


@pytest.fixture(autouse=True)
def small_prefill_chunks(monkeypatch):
    """Prompts take several prefill chunks, and a shared prefix of a few tokens is copied."""
    monkeypatch.setattr(scheduler, "PREFILL_CHUNK_SIZES", (8,))
    monkeypatch.setattr(scheduler, "PREFILL_BATCH", 2)
    monkeypatch.setattr(prefix_cache, "MIN_SHARED_PREFIX", 4)


@pytest.fixture(scope="module")
def requests():
    rng = np.random.default_rng(0)
    lengths = [1, 30, 9, 2, 17, 33, 8, 5]
    return [
        Request(
            rng.integers(0, 64, n).tolist(), 3 + 2 * i % 7, temperature=i % 2 * 1.5, top_k=i % 3 * 20, sample_index=i
        )
        for i, n in enumerate(lengths)
    ]


def make_engine(model, **options):
    """Engines of one shape, so that they compile once."""
    return Engine(model, max_num_seqs=4, max_model_len=MAX_MODEL_LEN, record_experts=True, **options)


def run(engine):
    while engine.has_unfinished_requests:
        engine.step()


def generate(engine, requests):
    completions = [engine.submit(r) for r in requests]
    run(engine)
    return [c.tokens for c in completions]


@pytest.fixture(scope="module")
def alone(model, requests):
    """Each request's tokens in a new engine without other requests."""
    return [generate(make_engine(model), [r])[0] for r in requests]


def test_tokens_do_not_depend_on_batch_or_slot(model, requests, alone):
    engine = make_engine(model)
    order = [5, 3, 0, 7, 2, 6, 1, 4]
    together = generate(engine, [requests[i] for i in order])
    assert together == [alone[i] for i in order]
    assert engine.occupancy.used > 0.6 * engine.occupancy.available
    assert generate(engine, requests) == alone  # used slots, whose prefix cache holds some of the prompts


def test_tokens_do_not_depend_on_the_batch_with_an_int8_kv_cache(model, requests):
    together = generate(make_engine(model, int8_kv_cache=True), requests)
    for index in (1, 5):  # a long prompt, and a sampled completion
        assert generate(make_engine(model, int8_kv_cache=True), requests[index : index + 1]) == [together[index]]


def test_tokens_and_logprobs_equal_a_forward_pass(model, requests):
    engine = make_engine(model)
    request = dataclasses.replace(requests[4], temperature=0.0, max_new_tokens=10)
    completion = engine.submit(request)
    run(engine)
    text = jnp.array([[*request.prompt, *completion.tokens]])
    logits = jax.jit(lambda m, t: m(t))(model, text)[0, len(request.prompt) - 1 : -1]
    assert completion.tokens == logits.argmax(-1).tolist()
    wanted = jnp.take_along_axis(jax.nn.log_softmax(logits), text[0, len(request.prompt) :, None], axis=1)[:, 0]
    np.testing.assert_allclose(completion.logprobs, wanted, atol=1e-5)
    assert completion.finish_reason == "length"


def test_recorded_experts_equal_one_forward_pass(model, requests):
    engine = make_engine(model)
    one, two = (engine.submit(dataclasses.replace(requests[1], temperature=1.0, sample_index=n)) for n in (0, 1))
    run(engine)
    for completion in (one, two):
        inputs = jnp.array([[*completion.request.prompt, *completion.tokens[:-1]]])
        cache = model.init_cache(1, MAX_MODEL_LEN)
        _, _, experts = jax.jit(lambda m, t, c: m.extend(t, c, form="expanded"))(model, inputs, cache)
        np.testing.assert_array_equal(np.sort(completion.experts_TlK), np.sort(np.moveaxis(experts[:, 0], 0, 1)))


def test_completions_of_one_prompt_share_its_prefill(model, requests, monkeypatch):
    longer = dataclasses.replace(requests[1], prompt=[*requests[1].prompt, 1, 2, 3])
    expected = generate(make_engine(model), [longer])
    engine, batches = make_engine(model), []
    prefill = engine_module.prefill
    monkeypatch.setattr(engine_module, "prefill", lambda *args: batches.append(args) or prefill(*args))
    group = [dataclasses.replace(requests[1], temperature=1.0, sample_index=n) for n in range(4)]
    completions = generate(engine, group)
    assert len(batches) == 4  # 29 tokens in chunks of 8, once
    assert len({tuple(c) for c in completions}) == 4
    assert generate(engine, [longer]) == expected
    assert len(batches) == 5  # the shared prefix was cached


def test_a_slot_holds_only_the_prefix_that_was_copied(model, monkeypatch):
    """Two requests arrive together. The first copies the start of a cached prompt, the second shares all of it."""
    monkeypatch.setattr(scheduler, "PREFILL_CHUNK_SIZES", (64,))
    model = Transformer(dataclasses.replace(model.cfg, max_position_embeddings=512), rngs=nnx.Rngs(0))
    cached, other = np.random.default_rng(0).integers(0, 64, (2, 300)).tolist()
    longer = Request([*cached, 7], 8)

    used, unused = (Engine(model, max_num_seqs=3, max_model_len=512) for _ in range(2))
    first, _, last = (used.submit(Request(prompt, 100)) for prompt in ([1], cached, [2]))
    used.step()
    used.abort(first)
    used.abort(last)
    _, completion = generate(used, [Request([*cached[:10], *other], 8), longer])
    assert completion == generate(unused, [longer])[0]


def test_stop_tokens_and_stop_strings(model, requests):
    request = dataclasses.replace(requests[2], temperature=0.0, max_new_tokens=12)
    engine = make_engine(model, decode=lambda ids: "".join(f"<{i}>" for i in ids))
    free, third = engine.submit(request), None
    run(engine)
    third = free.tokens[2]
    cut = free.tokens.index(third) + 1
    by_id = engine.submit(dataclasses.replace(request, stop_ids=(third,)))
    by_string = engine.submit(dataclasses.replace(request, stop=(f"><{third}",)))
    run(engine)
    assert by_id.tokens == free.tokens[:cut]
    assert by_string.tokens == free.tokens[:cut]
    assert by_id.finish_reason == by_string.finish_reason == "stop"
    before = "".join(f"<{i}>" for i in free.tokens[: cut - 1])
    assert by_id.text == before
    assert by_string.text == before[:-1]


def test_aborted_requests_free_their_slot(model, requests, alone):
    engine = make_engine(model)
    long = dataclasses.replace(requests[0], max_new_tokens=40)
    running = [engine.submit(dataclasses.replace(long, sample_index=n)) for n in range(4)]
    waiting, last = engine.submit(requests[1]), engine.submit(requests[2])
    engine.step()
    assert all(len(c.tokens) == 16 for c in running)
    engine.abort(running[1])
    engine.abort(waiting)
    engine.step()
    assert last.tokens == alone[2]
    run(engine)
    assert [c.finish_reason for c in (*running, waiting)] == ["length", "abort", "length", "length", "abort"]
    assert waiting.tokens == []


def test_a_preempted_request_resumes_with_the_same_tokens(model, requests, alone):
    """A client with all slots gives one to another client, which so gets its first tokens in the next step."""
    engine = make_engine(model)
    long = [dataclasses.replace(requests[1], max_new_tokens=18, temperature=1.0, sample_index=n) for n in range(6)]
    expected = generate(engine, long)
    assert engine.num_preemptions == 0
    many = [engine.check(request) for request in long]
    for completion in many:
        completion.owner = Owner("a")
        engine.enqueue(completion)
    engine.step()
    assert [len(c.tokens) for c in many] == [16] * 4 + [0] * 2
    other = engine.check(requests[2])
    other.owner = Owner("b")
    engine.enqueue(other)
    engine.step()
    assert other.tokens
    run(engine)
    assert (other.tokens, engine.num_preemptions) == (alone[2], 1)
    assert [c.tokens for c in many] == expected
    assert all(len(c.logprobs) == 18 for c in many)
    assert all(c.experts_TlK.shape[0] == len(c.request.prompt) + 17 for c in many)


def test_new_weights_clear_the_prefix_cache(model, requests):
    engine = make_engine(model)
    before = generate(engine, requests[1:2])
    other = Transformer(model.cfg, rngs=nnx.Rngs(1))
    engine.load_weights(other)
    after = generate(engine, requests[1:2])
    assert before != after == generate(make_engine(other), requests[1:2])


@pytest.mark.slow
def test_a_mesh_generates_the_tokens_of_one_device(model, requests, alone):
    mesh = make_mesh(MeshConfig(data=2, expert=2, tensor=2))
    abstract_model = AbstractModel(model.cfg)
    shardings = abstract_model.shardings(mesh)
    arrays = {path: jax.device_put(array, shardings[path]) for path, array in model_arrays(model).items()}
    engine = Engine(abstract_model.merge(arrays), max_num_seqs=4, max_model_len=MAX_MODEL_LEN)
    assert generate(engine, requests) == alone
    assert engine.cache_LBSW.sharding.shard_shape(engine.cache_LBSW.shape)[1] == 1


def test_max_model_len_is_limited_by_max_position_embeddings(model):
    short = Transformer(dataclasses.replace(model.cfg, max_position_embeddings=40), rngs=nnx.Rngs(0))
    assert Engine(short, max_num_seqs=1, max_model_len=40).max_model_len == 40
    with pytest.raises(ConfigError, match=r"max_model_len = 41: .* max_position_embeddings = 40"):
        Engine(short, max_num_seqs=1, max_model_len=41)


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
def test_invalid_requests_are_refused(model, field, values):
    engine = make_engine(model)
    with pytest.raises(ConfigError, match=field):
        engine.submit(Request(**{"prompt": [1], "max_new_tokens": 5} | values))
    assert not engine.has_unfinished_requests
