"""Log-probabilities of prompts: of the engine, and as `echo` of the server."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mla_moe.inference import scheduler
from mla_moe.inference.request import Request

from .serving import TOKENIZER, call, decode


@pytest.fixture(autouse=True)
def small_prefill_chunks(monkeypatch):
    monkeypatch.setattr(scheduler, "PREFILL_CHUNK_SIZES", (16,))


@pytest.fixture(scope="module")
def forward(engine):
    """Log-probabilities of tokens after the first by a pass without a cache."""
    model = engine.graph.merge(engine.weights)

    @jax.jit
    def logprobs(tokens):
        h, _, _ = model.extend(tokens, model.init_cache(1, 64), form="expanded")
        return jax.nn.log_softmax(model.logits(h))

    def score(tokens):
        padded = jnp.asarray([tokens + [0] * (64 - len(tokens))])
        return np.asarray(logprobs(padded)[0, np.arange(len(tokens) - 1), jnp.asarray(tokens[1:])])

    return score


def test_logprobs_of_prompts_are_those_of_a_forward_pass(engine, forward):
    """Over several prefill chunks, beside other requests, and of prompts that are cached already."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 62, n).tolist() for n in (40, 1, 17, 2)]
    requests = [Request(prompt, 3, prompt_logprobs=wanted) for prompt in prompts for wanted in (True, False, True)]
    completions = [engine.submit(request) for request in requests]
    while engine.has_unfinished_requests:
        engine.step()
    for request, completion in zip(requests, completions, strict=True):
        if not request.prompt_logprobs:
            assert completion.prompt_logprobs is None
            continue
        assert np.isnan(completion.prompt_logprobs[0])
        if len(request.prompt) > 1:
            np.testing.assert_allclose(completion.prompt_logprobs[1:], forward(request.prompt), atol=1e-5)
        full = [*request.prompt, *completion.tokens]
        np.testing.assert_allclose(completion.logprobs, forward(full)[len(request.prompt) - 1 :], atol=1e-5)


def test_echo_returns_the_prompt_and_its_logprobs(port, forward):
    prompt = [5, 9, 33, 2, 60, 7]
    body = {"prompt": prompt, "echo": True, "logprobs": 0, "max_tokens": 0, "temperature": 0}
    status, response = call(port, "/v1/completions", body)
    assert status == 200
    (choice,) = response["choices"]
    assert choice["text"] == decode(prompt)
    logprobs = choice["logprobs"]
    assert logprobs["token_logprobs"][0] is None
    np.testing.assert_allclose(logprobs["token_logprobs"][1:], forward(prompt), atol=1e-5)
    assert logprobs["tokens"] == [decode([token]) for token in prompt]
    assert logprobs["text_offset"] == [2 * i for i in range(6)]
    assert response["usage"] == {"prompt_tokens": 6, "completion_tokens": 0, "total_tokens": 6}

    _, plain = call(port, "/v1/completions", body | {"max_tokens": 4, "echo": False})
    _, both = call(port, "/v1/completions", body | {"max_tokens": 4})
    assert both["choices"][0]["text"] == decode(prompt) + plain["choices"][0]["text"]
    both, plain = (r["choices"][0]["logprobs"]["token_logprobs"] for r in (both, plain))
    np.testing.assert_allclose(both[1:], [*logprobs["token_logprobs"][1:], *plain], atol=1e-5)

    _, text = call(port, "/v1/completions", {"prompt": "ab", "echo": True, "max_tokens": 0})
    assert (text["choices"][0]["text"], text["choices"][0]["logprobs"]) == (decode(TOKENIZER.encode_raw("ab")), None)


def test_the_most_likely_tokens_are_those_of_a_forward_pass(port, engine, forward):
    prompt, model = [5, 9, 33, 2, 60, 7], engine.graph.merge(engine.weights)
    body = {"prompt": prompt, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 3}
    status, response = call(port, "/v1/completions", body)
    assert status == 200
    first, *positions = response["choices"][0]["prompt_logprobs"]
    assert first is None
    h, _, _ = model.extend(jnp.asarray([prompt]), model.init_cache(1, 64), form="expanded")
    logprobs = np.asarray(jax.nn.log_softmax(model.logits(h)))[0]
    for position, token, own, row in zip(positions, prompt[1:], forward(prompt), logprobs, strict=False):
        assert position[str(token)]["logprob"] == pytest.approx(own, abs=1e-5)
        ranked = {entry["rank"]: int(token) for token, entry in position.items() if entry["rank"]}
        assert [ranked[rank] for rank in (1, 2, 3)] == np.argsort(-row)[:3].tolist()
        for rank in (1, 2, 3):
            found = position[str(ranked[rank])]
            assert found["logprob"] == pytest.approx(row[ranked[rank]], abs=1e-5)
            assert found["decoded_token"] == decode([ranked[rank]])
    _, none = call(port, "/v1/completions", body | {"prompt_logprobs": 0})
    assert [len(position) for position in none["choices"][0]["prompt_logprobs"][1:]] == [1] * 5


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": [1], "max_tokens": 0}),
        ("/v1/completions", {"prompt": [1], "max_tokens": 0, "echo": True, "stream": True}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "echo": True}),
        ("/v1/completions", {"prompt": [1], "prompt_logprobs": 1, "stream": True}),
        ("/v1/completions", {"prompt": [1], "prompt_logprobs": -1}),
        ("/v1/completions", {"prompt": [1], "prompt_logprobs": 65}),
    ],
)
def test_what_echo_does_not_have_is_refused(port, path, body):
    status, response = call(port, path, body)
    assert status == 400
    assert response["error"]["param"] in ("max_tokens", "echo", "prompt_logprobs")
