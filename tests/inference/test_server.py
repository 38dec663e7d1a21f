"""The OpenAI-compatible server over real connections."""

import asyncio
import contextlib
import dataclasses
import gc
import http.client
import json
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from flax import nnx

from mla_moe import Transformer
from mla_moe.inference.engine import Engine
from mla_moe.inference.request import Request
from mla_moe.text.chat_tokenizer import ChatTokenizer

uvicorn = pytest.importorskip("uvicorn")
server = pytest.importorskip("mla_moe.inference.openai_server")

MAX_MODEL_LEN = 64


def decode(ids):
    return "".join(chr(97 + i % 26) + str(i // 26) for i in ids)


@pytest.fixture(scope="module")
def engine(cfg):
    model = Transformer(dataclasses.replace(cfg, num_nextn_predict_layers=0), rngs=nnx.Rngs(0))
    return Engine(model, max_num_seqs=4, max_model_len=MAX_MODEL_LEN, decode=decode)


TOKENIZER = ChatTokenizer(
    encode=lambda text: [1, *(ord(c) % 64 for c in text)],
    encode_chat=lambda messages: [2, *(ord(c) % 64 for m in messages for c in m["content"])],
    decode=decode,
    stop_ids=(63,),
)


@contextlib.contextmanager
def serving(app):
    """The port on which an application listens."""
    running = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=running.run)
    thread.start()
    while not running.started:
        time.sleep(0.01)
    yield running.servers[0].sockets[0].getsockname()[1]
    running.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def port(engine):
    with serving(server.application(engine, TOKENIZER, "tiny", max_waiting=250)) as port:
        yield port


def call(port, path, body=None, raw=None):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    content = raw if raw is not None else None if body is None else json.dumps(body)
    connection.request("GET" if content is None else "POST", path, content)
    response = connection.getresponse()
    status, value = response.status, json.loads(response.read())
    connection.close()
    return status, value


def wait_until_idle(port):
    for _ in range(1000):
        status, health = call(port, "/health")
        assert status == 200
        if health["requests"] == health["running"] == 0:
            return health
        time.sleep(0.01)
    raise AssertionError(health)


@pytest.mark.slow
def test_200_concurrent_requests_get_their_own_completions(port, engine):
    rng = random.Random(0)
    bodies = [
        {
            "prompt": [rng.randrange(64) for _ in range(rng.randint(1, 30))],
            "max_tokens": rng.randint(1, 30),
            "temperature": rng.choice([0, 1]),
            "seed": i,
        }
        for i in range(200)
    ]

    def complete(body):
        time.sleep(random.random() * 0.5)
        return call(port, "/v1/completions", body)

    with ThreadPoolExecutor(100) as pool:
        responses = list(pool.map(complete, bodies))
    health = wait_until_idle(port)
    assert health["occupancy_while_waiting"] >= 0.8
    completions = [
        engine.submit(Request(b["prompt"], b["max_tokens"], b["temperature"], seed=b["seed"], stop_ids=(63,)))
        for b in bodies
    ]
    while engine.has_unfinished_requests:
        engine.step()
    for completion, (status, response) in zip(completions, responses, strict=True):
        assert status == 200
        assert response["choices"][0]["text"] == completion.text
        assert response["choices"][0]["finish_reason"] == completion.finish_reason
        assert response["usage"]["completion_tokens"] == len(completion.tokens)


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("completions", {"prompt": [99]}, 400, "prompt"),
        ("completions", {"prompt": [1] * 70}, 400, "len(prompt)"),
        ("completions", {}, 400, "prompt"),
        ("completions", {"prompt": {}}, 400, "prompt"),
        ("completions", {"prompt": "a", "temperature": "hot"}, 400, "temperature"),
        ("completions", {"prompt": "a", "max_tokens": 0}, 400, "max_tokens"),
        ("completions", {"prompt": "a", "n": 1000}, 400, "n"),
        ("completions", {"prompt": "a", "stop": [1]}, 400, "stop"),
        ("completions", {"prompt": "a", "top_k": 1 << 40}, 400, "top_k"),
        ("completions", {"prompt": "a", "temperature": 10**400}, 400, "temperature"),
        ("completions", {"prompt": "a", "stop": ["x"] * 9}, 400, "stop"),
        ("completions", {"\ud800": 1}, 400, "?"),
        ("completions", b"[" * 100_000, 400, "body"),
        ("completions", {"prompt": "a", "frequency_penalty": 1.0}, 400, "frequency_penalty"),
        ("completions", {"prompt": "a", "logprobs": 2}, 400, "logprobs"),
        ("completions", {"prompt": "a", "tools": [{}]}, 400, "tools"),
        ("chat/completions", {"messages": [], "logprobs": True, "top_logprobs": 2}, 400, "top_logprobs"),
        ("chat/completions", {"messages": []}, 400, "messages"),
        ("chat/completions", {"messages": [{"role": "user", "content": None}]}, 400, "messages[0].content"),
        ("chat/completions", {"messages": [{"role": "user", "content": [1]}]}, 400, "messages[0].content"),
        ("completions", b"{", 400, "body"),
        ("completions", b" " * (5 << 20), 413, None),
    ],
)  # fmt: skip
def test_the_error_for_a_malformed_request_names_the_field(port, path, body, status, param):
    raw = body if isinstance(body, bytes) else None
    got, response = call(port, f"/v1/{path}", body, raw)
    assert (got, response["error"]["param"]) == (status, param)
    wait_until_idle(port)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("completions", {"prompt": "a", "seed": -1}),
        ("completions", {"prompt": "a", "seed": 1 << 40}),
        ("completions", {"prompt": "a", "logit_bias": {}, "best_of": 1, "echo": False, "presence_penalty": 0.0}),
        ("chat/completions", {"tools": [], "tool_choice": "auto", "response_format": {"type": "text"}}),
        ("chat/completions", {"top_logprobs": 0, "stream_options": None}),
    ],
)
def test_unsupported_fields_with_default_values_are_accepted(port, path, body):
    messages = {} if path == "completions" else {"messages": [{"role": "user", "content": "hi"}]}
    assert call(port, f"/v1/{path}", {"max_tokens": 2} | messages | body)[0] == 200


def test_message_content_may_be_text_parts(port):
    def chat(*contents):
        messages = [{"role": role, "content": c} for role, c in zip(("user", "assistant"), contents, strict=False)]
        return call(port, "/v1/chat/completions", {"messages": messages, "max_tokens": 8, "temperature": 0})[1]

    parts = [{"type": "text", "text": "good"}, {"type": "text", "text": "day"}]
    one, other = chat(parts, None), chat("good\nday")
    assert one["choices"] == other["choices"]
    assert one["usage"] == other["usage"]


def test_choices_without_a_seed_differ(port):
    _, response = call(port, "/v1/completions", {"prompt": ["a", "a"], "n": 2, "max_tokens": 12})
    assert len({choice["text"] for choice in response["choices"]}) == 4


def test_logprobs_contain_the_text_of_their_tokens(port):
    body = {"prompt": "a", "logprobs": 0, "max_tokens": 3, "temperature": 0}
    choice = call(port, "/v1/completions", body)[1]["choices"][0]
    assert "".join(choice["logprobs"]["tokens"]) == choice["text"]
    assert len(choice["logprobs"]["token_logprobs"]) == 3
    body = {"messages": [{"role": "user", "content": "a"}], "logprobs": True, "max_tokens": 3, "temperature": 0}
    choice = call(port, "/v1/chat/completions", body)[1]["choices"][0]
    tokens = choice["logprobs"]["content"]
    assert "".join(t["token"] for t in tokens) == choice["message"]["content"]
    assert all(bytes(t["bytes"]).decode() == t["token"] and t["top_logprobs"] == [] for t in tokens)


def test_max_tokens_is_optional(port):
    status, response = call(port, "/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]})
    assert status == 200
    assert response["usage"]["total_tokens"] <= MAX_MODEL_LEN


def test_a_body_that_does_not_arrive_times_out(port, monkeypatch):
    monkeypatch.setattr(server, "BODY_TIMEOUT", 0.2)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.putrequest("POST", "/v1/completions")
    connection.putheader("Content-Length", "100")
    connection.endheaders(b"{")
    assert connection.getresponse().status == 408
    connection.close()


def test_a_request_that_times_out_is_aborted(engine, caplog):
    """Its slot is freed, nothing is logged, and a stream ends with the error."""
    app = server.application(engine, TOKENIZER, "tiny", max_waiting=250, timeout=0.0)
    with serving(app) as port:
        body = {"prompt": [5], "max_tokens": 60, "n": 8}
        status, response = call(port, "/v1/completions", body)
        assert (status, response["error"]["type"]) == (504, "server_error")
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("POST", "/v1/completions", json.dumps(body | {"stream": True}))
        assert b"the answer took too long" in connection.getresponse().read()
        connection.close()
        wait_until_idle(port)
    gc.collect()
    assert not caplog.records


def test_a_client_that_disconnects_frees_its_slots(port):
    for stream in (True, False):
        connection = http.client.HTTPConnection("127.0.0.1", port)
        body = {"prompt": [5], "max_tokens": 60, "n": 40, "stream": stream}
        connection.request("POST", "/v1/completions", json.dumps(body))
        response = connection.getresponse() if stream else None
        assert response is None or response.read(10)
        while call(port, "/health")[1]["running"] < 4:
            time.sleep(0.01)
        if response:
            response.close()
        connection.close()
        wait_until_idle(port)


def test_a_stream_adds_up_to_the_full_response(port):
    message = [{"role": "user", "content": "hello"}]
    body = {"messages": message, "max_completion_tokens": 40, "seed": 3, "n": 2, "logprobs": True}
    usage = {"stream_options": {"include_usage": True}}
    _, full = call(port, "/v1/chat/completions", body)
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("POST", "/v1/chat/completions", json.dumps(body | {"stream": True} | usage))
    with connection.getresponse() as response:
        lines = response.read().decode().split("\n\n")
    connection.close()
    assert lines[-2:] == ["data: [DONE]", ""]
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    last = events.pop()
    assert (last["choices"], last["usage"]) == ([], full["usage"])
    assert all(event["usage"] is None for event in events)
    for index, choice in enumerate(full["choices"]):
        parts = [e["choices"][0] for e in events if e["choices"][0]["index"] == index]
        assert "".join(p["delta"]["content"] for p in parts) == choice["message"]["content"]
        assert parts[-1]["finish_reason"] == choice["finish_reason"]
        streamed = [x for p in parts for x in p["logprobs"]["content"]]
        assert streamed == choice["logprobs"]["content"]
    assert len(events) > 2


def test_a_full_queue_refuses_requests(port):
    body = {"prompt": [5], "max_tokens": 60, "n": 64, "stream": True}
    connections = []
    for _ in range(6):
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request("POST", "/v1/completions", json.dumps(body))
        connections.append(connection)
    responses = [connection.getresponse() for connection in connections]
    statuses = [response.status for response in responses]
    assert statuses.count(429) >= 1
    assert statuses.count(200) >= 3
    for connection, response in zip(connections, responses, strict=True):
        response.close()
        connection.close()
    wait_until_idle(port)


def test_models_are_listed(port):
    model = call(port, "/v1/models")[1]["data"][0]
    assert model["id"] == "tiny"
    assert call(port, "/v1/models/tiny") == (200, model)
    status, response = call(port, "/v1/models/huge")
    assert (status, response["error"]["param"]) == (404, "model")


def test_a_forced_shutdown_waits_for_the_running_step(engine):
    """A second Ctrl-C cancels the lifespan task."""
    app = server.application(engine, TOKENIZER, "tiny", max_waiting=1)
    before = set(threading.enumerate())

    async def live():
        async with app.router.lifespan_context(app):
            raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(live())
    assert set(threading.enumerate()) == before


def test_running_requests_do_not_delay_shutdown(monkeypatch):
    seen = {}
    monkeypatch.setattr(uvicorn, "run", lambda app, **how: seen.update(how))
    server.serve(None, "127.0.0.1", 8000)
    assert 0 < seen["timeout_graceful_shutdown"] < 10
