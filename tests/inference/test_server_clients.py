"""Clients that may not, ask too much, or meet an engine that failed: each gets an error, the others their answers."""

import asyncio
import contextlib
import dataclasses
import http.client
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from mla_moe import ConfigError
from mla_moe.cli import main
from mla_moe.inference.access import Access
from mla_moe.inference.async_engine import AsyncEngine, EngineDeadError, QueueFullError
from mla_moe.inference.request import Completion, Owner, Request

pytest.importorskip("uvicorn")
server = pytest.importorskip("mla_moe.inference.openai_server")
from starlette.requests import Request as HTTPRequest  # noqa: E402

from mla_moe.inference import request_bodies  # noqa: E402

from .fake_engine import FakeEngine  # noqa: E402
from .serving import TOKENIZER, call, exchange, serving  # noqa: E402

PREFLIGHT = {
    "Origin": "http://localhost:3000",
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type,x-stainless-lang",
}


def test_web_pages_may_call_the_server_only_if_their_origin_is_allowed(port, engine):
    status, headers, _ = exchange(port, "OPTIONS", "/v1/chat/completions", headers=PREFLIGHT)
    assert status == 405
    assert not any(name.lower().startswith("access-control") for name in headers)
    access = Access(cors_origins=["http://localhost:3000"])
    app = server.application(engine, TOKENIZER, "tiny", max_waiting=1, access=access)
    with serving(app) as allowed:
        status, headers, _ = exchange(allowed, "OPTIONS", "/v1/chat/completions", headers=PREFLIGHT)
        assert (status, headers["access-control-allow-origin"]) == (200, "http://localhost:3000")
        assert set(PREFLIGHT["Access-Control-Request-Headers"].split(",")) <= {
            name.strip().lower() for name in headers["access-control-allow-headers"].split(",")
        }
        status, headers, _ = exchange(allowed, "POST", "/v1/completions", b"{", {"Origin": "http://localhost:3000"})
        assert (status, headers["access-control-allow-origin"]) == (400, "http://localhost:3000")  # errors are readable
        other = PREFLIGHT | {"Origin": "http://other"}
        status, headers, _ = exchange(allowed, "OPTIONS", "/v1/completions", headers=other)
        assert status == 400
        assert "access-control-allow-origin" not in headers


@pytest.mark.parametrize(
    ("headers", "status", "param"),
    [
        ({"Host": "evil.example"}, 403, "host"),
        ({"Origin": "http://evil.example"}, 403, "origin"),
        ({"Content-Type": "text/plain"}, 415, "content-type"),
    ],
)
def test_web_pages_cannot_use_the_server(port, headers, status, param):
    got, _, value = exchange(port, "POST", "/v1/completions", b'{"prompt": "a"}', headers)
    error = json.loads(value)["error"]
    assert (got, error["type"], error["param"]) == (status, "invalid_request_error", param)


def test_another_model_is_not_found(port):
    status, response = call(port, "/v1/completions", {"prompt": "a", "model": "huge"})
    assert (status, response["error"]["param"], response["error"]["code"]) == (404, "model", "model_not_found")
    assert call(port, "/v1/completions", {"prompt": "a", "model": "tiny", "max_tokens": 1})[0] == 200


def test_a_key_is_required_but_for_health():
    app = server.application(FakeEngine(), TOKENIZER, "tiny", max_waiting=1, access=Access(api_keys=["secret"]))
    with serving(app) as port:
        status, headers, value = exchange(port, "POST", "/v1/completions", b'{"prompt": "a"}')
        error = json.loads(value)["error"]
        assert (status, error["code"], headers["www-authenticate"]) == (401, "invalid_api_key", "Bearer")
        assert exchange(port, "GET", "/v1/models")[0] == 401
        assert exchange(port, "GET", "/health")[0] == 200
        key = {"Authorization": "Bearer secret"}
        assert exchange(port, "POST", "/v1/completions", b'{"prompt": "a"}', key)[0] == 200


class Panic(BaseException):
    """As pyo3's PanicException, which is no Exception."""


@pytest.mark.parametrize("failure", [ValueError("broken"), Panic("panicked")])
def test_a_dead_engine_is_not_healthy(failure, capfd):
    secret = "my secret prompt"
    with serving(server.application(FakeEngine(failure), TOKENIZER, "tiny", max_waiting=1)) as port:
        assert call(port, "/health")[0] == 200
        for _ in range(2):  # while the engine fails, and afterwards
            status, response = call(port, "/v1/completions", {"prompt": secret})
            assert (status, response["error"]["type"]) == (500, "server_error")
        status, response = call(port, "/health")
        assert (status, response["status"]) == (503, "the engine failed; see the server's log")
        call(port, "/v1/completions", {"prompt": secret, "temperature": secret})
    log = "".join(capfd.readouterr())
    assert str(failure) in log
    assert secret not in log  # prompts are not logged


def test_the_server_may_exit_when_its_engine_fails():
    app = server.application(
        FakeEngine(ValueError("broken")), TOKENIZER, "tiny", max_waiting=1, exit_on_engine_failure=True
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(server.serve, app, "127.0.0.1", port)
        while not running.done():
            with contextlib.suppress(OSError, http.client.HTTPException):
                call(port, "/v1/completions", {"prompt": "a"})
        with pytest.raises(EngineDeadError):
            running.result()


def test_the_command_then_has_status_1(monkeypatch):
    def fail(*_):
        raise EngineDeadError

    model = SimpleNamespace(cfg=SimpleNamespace(max_position_embeddings=64))
    monkeypatch.setattr("mla_moe.cli.serve.load_model_and_tokenizer", lambda _: (model, TOKENIZER))
    monkeypatch.setattr("mla_moe.inference.engine.Engine", lambda *_, **__: FakeEngine())
    monkeypatch.setattr(server, "serve", fail)
    with pytest.raises(SystemExit) as caught:
        main(["serve", "x", "--exit-on-engine-failure"])
    assert str(caught.value).startswith("error: engine = failed")  # which Python prints, and exits with 1


def test_one_client_cannot_fill_the_queue():
    async def submit(counts, **limits):
        async_engine, accepted = AsyncEngine(FakeEngine(), **{"max_waiting": 60} | limits), []  # and 4 that run
        for client, count in counts:
            completions = [Completion(Request([1], 1), owner=Owner(client)) for _ in range(count)]
            try:
                async_engine.submit(completions)
                accepted.append((client, count))
            except QueueFullError:
                pass
            except ConfigError as error:
                accepted.append((error.field, count))
        for completion in [*async_engine._outputs]:
            async_engine.abort(completion)
        assert not async_engine._requests_of
        return accepted

    counts = [("a", 56), ("a", 1), ("b", 4), ("a", 1), ("b", 1), ("c", 1)]
    assert asyncio.run(submit(counts)) == [("a", 56), ("b", 4), ("b", 1), ("c", 1)]
    counts = [("a", 9), ("a", 8), ("a", 1), ("b", 8)]
    assert asyncio.run(submit(counts, max_requests_per_client=8)) == [("n", 9), ("a", 8), ("b", 8)]
    assert asyncio.run(submit([("a", 57), ("b", 4), ("a", 56)])) == [("n", 57), ("b", 4)]  # the last may come again
    assert asyncio.run(submit([("a", 5), ("a", 4), ("b", 1)], max_waiting=0)) == [("n", 5), ("a", 4)]


def test_clients_take_turns_in_the_parser():
    """One with many long bodies does not delay another by more than one of them, nor a short body at all."""
    order = []

    def parse(name):
        def run(content):
            time.sleep(0.02)
            order.append(name)

        return run

    def body(length):
        async def receive():
            return {"type": "http.request", "body": bytes(length)}

        return HTTPRequest({"type": "http", "headers": []}, receive)

    async def parse_all():
        bodies, long = request_bodies.RequestBodies(), request_bodies.LONG_BODY + 1
        many = [bodies.parse(body(long), "a", parse("long a")) for _ in range(8)]
        await asyncio.gather(*many, bodies.parse(body(long), "b", parse("b")), bodies.parse(body(1), "a", parse("a")))
        assert not bodies._long_bytes
        bodies.close()

    asyncio.run(parse_all())
    assert order.index("b") <= 3
    assert order.index("a") <= 2


def test_one_client_cannot_take_the_memory_for_long_bodies():
    async def parse_all():
        def body(*parts):
            parts = iter(parts)

            async def receive():
                length = next(parts, None)
                if length is None:
                    await asyncio.sleep(60)
                return {"type": "http.request", "body": bytes(length), "more_body": length != 1}

            return HTTPRequest({"type": "http", "headers": []}, receive)

        bodies, most = request_bodies.RequestBodies(), request_bodies.MAX_LONG_BODIES // request_bodies.MAX_BODY
        many = [asyncio.ensure_future(bodies.parse(body(request_bodies.MAX_BODY), "a", len)) for _ in range(most)]
        await asyncio.sleep(0.1)
        refused = [task for task in many if task.done()]
        assert len(refused) == most - most // 4
        assert all(isinstance(task.exception(), request_bodies.BusyError) for task in refused)
        assert await bodies.parse(body(1), "a", len) == 1
        assert await bodies.parse(body(request_bodies.MAX_BODY - 1, 1), "b", len) == request_bodies.MAX_BODY
        for task in many:
            task.cancel()
        await asyncio.gather(*many, return_exceptions=True)
        assert not bodies._long_bytes
        bodies.close()

    asyncio.run(parse_all())


def test_encoding_has_a_deadline_for_each_body(monkeypatch):
    monkeypatch.setattr(request_bodies, "ENCODE_TIMEOUT", 0.1)
    encoded = []

    def encode(text):
        encoded.append(text)
        time.sleep(0.15)
        return [1]

    tokenizer = dataclasses.replace(TOKENIZER, encode_raw=encode)
    with serving(server.application(FakeEngine(), tokenizer, "tiny", max_waiting=99)) as port:
        status, _ = call(port, "/v1/completions", {"prompt": ["a", "b", "c"]})
        assert (status, encoded) == (504, ["a"])


@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_decoded_is_an_error(stream):
    """Its other choices are aborted."""

    class Engine(FakeEngine):
        def step(self):
            time.sleep(0.01)
            failed = [c for c in self.waiting if c.request.sample_index == 0]
            for completion in failed:
                completion.finish_reason = "error"
                self.abort(completion)
            return failed

        def abort(self, completion):
            super().abort(completion)
            self.waiting = [c for c in self.waiting if c is not completion]

    with serving(server.application(Engine(), TOKENIZER, "tiny", max_waiting=9)) as port:
        body = {"prompt": "a", "n": 2, "stream": stream, "logprobs": 0}
        status, _, answer = exchange(port, "POST", "/v1/completions", json.dumps(body))
        assert status == (200 if stream else 500)
        error = json.loads(answer.removeprefix(b"data: "))["error"]
        assert error["type"] == "server_error"
        assert "failed to decode" in error["message"]
        assert call(port, "/health")[1]["requests"] == 0


def test_bodies_that_are_sent_slowly_take_bounded_memory(monkeypatch):
    """Short ones still arrive."""
    monkeypatch.setattr(request_bodies, "MAX_LONG_BODIES", 16 * request_bodies.LONG_BODY)
    with (
        serving(server.application(FakeEngine(), TOKENIZER, "tiny", max_waiting=9)) as port,
        contextlib.ExitStack() as s,
    ):
        for _ in range(3):
            connection = s.enter_context(contextlib.closing(http.client.HTTPConnection("127.0.0.1", port)))
            connection.putrequest("POST", "/v1/completions")
            connection.putheader("Content-Type", "application/json")
            connection.putheader("Content-Length", "1000000")
            connection.endheaders(bytes(request_bodies.LONG_BODY + 9))
        time.sleep(0.3)
        status, _ = call(port, "/v1/completions", {"prompt": "a" * 3 * request_bodies.LONG_BODY})
        assert status == 503
        assert call(port, "/v1/completions", {"prompt": "a"})[0] == 200
