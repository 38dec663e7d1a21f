"""The OpenAI-compatible server over real connections."""

import asyncio
import gc
import http.client
import json
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from mla_moe.inference.request import Request

pytest.importorskip("uvicorn")
server = pytest.importorskip("mla_moe.inference.openai_server")

from mla_moe.inference import request_bodies  # noqa: E402

from .serving import JSON, MAX_MODEL_LEN, TOKENIZER, call, exchange, serving, wait_until_idle  # noqa: E402


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
        ("completions", {"prompt": "a", "stream_options": {"include_usage": True}}, 400, "stream_options"),
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
    """As with OpenAI a completion then has at most 16 tokens, and a chat may fill the model's length."""
    status, response = call(port, "/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]})
    assert status == 200
    assert response["usage"]["total_tokens"] <= MAX_MODEL_LEN
    for prompt in ([5], [5] * (MAX_MODEL_LEN - 1)):
        status, response = call(port, "/v1/completions", {"prompt": prompt})
        assert status == 200
        assert response["usage"]["completion_tokens"] <= 16


def test_a_body_that_does_not_arrive_times_out(port, monkeypatch):
    monkeypatch.setattr(request_bodies, "BODY_TIMEOUT", 0.2)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.putrequest("POST", "/v1/completions")
    connection.putheader("Content-Type", "application/json")
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
        connection.request("POST", "/v1/completions", json.dumps(body | {"stream": True}), JSON)
        assert b"generation took too long" in connection.getresponse().read()
        connection.close()
        wait_until_idle(port)
    gc.collect()
    assert not caplog.records


def test_a_client_that_disconnects_frees_its_slots(port):
    for stream in (True, False):
        connection = http.client.HTTPConnection("127.0.0.1", port)
        body = {"prompt": [5], "max_tokens": 60, "n": 40, "stream": stream}
        connection.request("POST", "/v1/completions", json.dumps(body), JSON)
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
    connection.request("POST", "/v1/chat/completions", json.dumps(body | {"stream": True} | usage), JSON)
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
        assert [p["delta"].get("role") for p in parts] == ["assistant"] + [None] * (len(parts) - 1)
        parts = parts[1:]
        assert "".join(p["delta"]["content"] for p in parts) == choice["message"]["content"]
        assert parts[-1]["finish_reason"] == choice["finish_reason"]
        streamed = [x for p in parts for x in p["logprobs"]["content"]]
        assert streamed == choice["logprobs"]["content"]
    assert [event["choices"][0]["index"] for event in events[:2]] == [0, 1]  # clients list choices as they come
    assert len(events) > 4


def test_a_full_queue_refuses_requests(port):
    body = {"prompt": [5], "max_tokens": 60, "n": 64, "stream": True}
    connections = []
    for _ in range(6):
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request("POST", "/v1/completions", json.dumps(body), JSON)
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


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/v1/responses", 404), ("GET", "/v1/completions", 405)])
def test_other_paths_and_methods_are_errors_of_the_api(port, method, path, status):
    got, _, value = exchange(port, method, path)
    assert got == status
    assert json.loads(value)["error"]["type"] == "invalid_request_error"


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


def test_running_requests_do_not_delay_shutdown():
    assert 0 < server.http_server(None, "127.0.0.1", 8000).config.timeout_graceful_shutdown < 10
