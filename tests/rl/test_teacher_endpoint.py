"""A teacher of distillation behind an endpoint with OpenAI's API: its answers, its errors, and the loss."""

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mla_moe import ConfigError
from mla_moe.config import RLConfig
from mla_moe.rl import teacher_endpoint
from mla_moe.rl.objectives import TokenInputs, sampled_distillation_sums
from mla_moe.rl.teacher_endpoint import TeacherEndpoint
from mla_moe.text.tokenizer import ByteTokenizer


def scored(body):
    """As `mla-moe serve` and vLLM answer: the score of each token is its id."""
    tokens = [bytes([token]).decode(errors="replace") if token < 256 else "<eos>" for token in body["prompt"]]
    return {"tokens": tokens, "token_logprobs": [None, *(-float(token) for token in body["prompt"][1:])]}


@contextlib.contextmanager
def endpoint(*answers):
    """A server that gives each answer to one request, and the last to all others: a status, or the `logprobs`."""
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append((self.path, self.headers.get("Authorization"), body))
            answer = answers[min(len(requests), len(answers)) - 1]
            status = answer if isinstance(answer, int) else 200
            logprobs = answer(body) if callable(answer) else answer
            choice = {"logprobs": logprobs}
            if isinstance(logprobs, dict) and "top" in logprobs:
                choice["prompt_logprobs"] = logprobs.pop("top")
            content = json.dumps({"choices": [choice]}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield (
                TeacherEndpoint(f"http://127.0.0.1:{server.server_port}/v1/", "big", 258, ByteTokenizer().token_bytes),
                requests,
            )
        finally:
            server.shutdown()
            thread.join()


def with_top(body):
    """The three most likely tokens are 1, 2 and 3; vLLM gives the text's own token too."""
    top = {str(token): {"logprob": -1.0 - token, "rank": token} for token in (3, 1, 2)}
    positions = [{str(token): {"logprob": -9.0, "rank": 7}} | top for token in body["prompt"][1:]]
    return scored(body) | {"top": [None, *positions]}


def test_the_most_likely_tokens_of_each_place_are_read():
    with endpoint(with_top) as (teacher, requests):
        teacher._top_k = 3
        teacher.check()
        assert teacher.score_top([[5, 6, 7]]) == [([[1, 2, 3]] * 2, [[-2.0, -3.0, -4.0]] * 2)]
        teacher._top_k = 5
        with pytest.raises(ConfigError, match=r"^rl.teacher_top_k = 5: .* gives no 5 log-probabilities at each pos"):
            teacher.score_top([[5, 6, 7]])
    assert [body["prompt_logprobs"] for _, _, body in requests] == [3, 3, 5]
    with endpoint(scored) as (teacher, _):
        teacher._top_k = 3
        with pytest.raises(ConfigError, match=r"^rl.teacher_top_k = 3: .*prompt_logprobs\); set 0"):
            teacher.check()


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(teacher_endpoint.time, "sleep", lambda _: None)


def test_tokens_are_scored_and_retries_counted(monkeypatch):
    monkeypatch.setenv(teacher_endpoint.API_KEY, "key")
    with endpoint(503, 429, scored) as (teacher, requests):
        assert teacher.score([[5, 6, 7]]) == [[-6.0, -7.0]]
        assert teacher.retries == 2
        teacher.check()
        assert teacher.score([[1, i, i] for i in range(40)]) == [[-float(i)] * 2 for i in range(40)]
    path, key, body = requests[0]
    assert (path, key) == ("/v1/completions", "Bearer key")
    assert {name: value for name, value in body.items() if name != "temperature"} == {
        "model": "big",
        "prompt": [5, 6, 7],
        "echo": True,
        "logprobs": 0,
        "max_tokens": 0,
    }


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (404, "responded with status 404.*teacher_model"),
        (500, "responded with status 500"),
        (None, "gives no log-probabilities of a prompt"),
        (lambda body: scored(body) | {"token_logprobs": [None, -1.0]}, "has 2 tokens where the student has 66"),
        (lambda body: scored(body) | {"tokens": ["x"] * 66}, r"its token 0 is 'x', and the student's '\\x00'"),
        (lambda body: scored(body) | {"token_logprobs": [None] * 66}, "no finite numbers"),
    ],
)
def test_an_endpoint_that_cannot_teach_is_named(answer, message):
    with endpoint(answer) as (teacher, _), pytest.raises(ConfigError, match=f"^rl.teacher = .*{message}"):
        teacher.check()


def test_an_endpoint_that_is_down_is_named():
    with endpoint(200) as (teacher, _):
        pass
    with pytest.raises(ConfigError, match=r"^rl.teacher = 'http://127.*cannot be reached"):
        teacher.score([[1, 2]])
    assert teacher.retries == teacher_endpoint.ATTEMPTS - 1


@pytest.mark.parametrize("old", [False, True])
def test_gradient_is_in_expectation_that_of_the_reverse_kl(old):
    """Each token of a vocabulary once, weighted by its probability."""
    rng = np.random.default_rng(0)
    logits, teacher = jnp.asarray(rng.standard_normal((2, 7)), jnp.float32)
    log_q = jax.nn.log_softmax(teacher)
    fixed = jax.nn.log_softmax(logits)[None]

    def loss(logits):
        tokens = TokenInputs(
            completion_BT=jnp.zeros((1, 7), jnp.int32),
            weight_BT=jnp.exp(fixed),
            advantage_BT=jnp.zeros((1, 7)),
            sampler_logprob_BT=fixed,
            old_logprob_BT=fixed if old else None,
            teacher_logprob_BT=log_q[None],
        )
        sums = sampled_distillation_sums(jax.nn.log_softmax(logits)[None], jnp.zeros((1, 7)), tokens, 2.0)
        return sums.loss, sums

    (value, sums), gradient = jax.value_and_grad(loss, has_aux=True)(logits)
    exact = lambda x: jnp.sum(jax.nn.softmax(x) * (jax.nn.log_softmax(x) - log_q))  # noqa: E731
    kl, wanted = jax.value_and_grad(exact)(logits)
    np.testing.assert_allclose(value, kl, rtol=1e-5)
    np.testing.assert_allclose(gradient, wanted, atol=1e-6)
    assert int(sums.tokens) == 7


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"teacher_model": None}, "rl.teacher_model"),
        ({"teacher": "here"}, "rl.teacher_model"),
        ({"teacher": "http://user:secret@host/v1"}, r"^rl.teacher = 'http://host/v1': write http://HOST:PORT/v1"),
        ({"teacher": "http://[::1"}, r"^rl.teacher = 'http://\[::1': write"),
        ({"teacher": "https://host/v1?key=secret"}, r"^rl.teacher = 'https://host/v1': write"),
        ({"temperature": 0.7}, "rl.temperature"),
        ({"teacher_top_k": 129}, "rl.teacher_top_k"),
        ({"teacher_top_k": 4, "teacher": "here", "teacher_model": None}, "rl.teacher_top_k = 4: is for an endpoint"),
    ],
)
def test_settings_of_an_endpoint(changes, field):
    settings = {"objective": "distillation", "teacher": "http://localhost:8000/v1", "teacher_model": "big"}
    assert RLConfig(**settings).teacher_is_endpoint
    with pytest.raises(ConfigError, match=field):
        RLConfig(**settings | changes)
