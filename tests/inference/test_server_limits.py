"""Connections that send nothing, half a request, or read nothing: they are closed, and others are served."""

import asyncio
import contextlib
import http.client
import json
import socket
import time
from types import SimpleNamespace

import pytest

pytest.importorskip("uvicorn")
from mla_moe.inference import http_limits
from mla_moe.inference import openai_server as server

from .serving import serving

LARGE = 64 << 20


class App:
    """`/large` responds with 64 MB, `/wait` when it is told to, others with the closed connections by reason."""

    is_done = False

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            raise RuntimeError("no lifespan")
        while scope["path"] == "/wait" and not self.is_done:
            await asyncio.sleep(0.02)
        body = bytes(LARGE) if scope["path"] == "/large" else json.dumps(scope["state"].get("closed", {})).encode()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body})


@pytest.fixture(autouse=True)
def short_times(monkeypatch):
    monkeypatch.setattr(http_limits, "HEADER_TIMEOUT", 0.3)
    monkeypatch.setattr(http_limits, "WRITE_TIMEOUT", 0.3)
    monkeypatch.setattr(http_limits, "CHECK_INTERVAL", 0.05)
    monkeypatch.setattr(http_limits, "MAX_CONNECTIONS", 8)


@pytest.fixture
def port():
    app = App()
    with serving(app) as port:
        yield port
        app.is_done = True


@contextlib.contextmanager
def connected(port, content=b"", source="127.0.0.1"):
    with socket.create_connection(("127.0.0.1", port), timeout=20, source_address=(source, 0)) as connection:
        connection.sendall(content)
        yield connection


def get(port, path="/health"):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("GET", path)
    response = connection.getresponse()
    status, value = response.status, json.loads(response.read())
    connection.close()
    return status, value


WAIT = b"GET /wait HTTP/1.1\r\nHost: localhost\r\n\r\n"


def is_closed(connection):
    """Wait until the other side closes it, and return whether it sent nothing."""
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


REQUEST = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.mark.parametrize("content", [b"", b"G", REQUEST[:-2]])
def test_half_a_request_is_closed(port, content):
    start = time.monotonic()
    with connected(port, content) as connection:
        assert is_closed(connection)
    assert 0.2 < time.monotonic() - start < 5
    assert get(port)[1]["header_timeout"] == 1


def test_bytes_that_trickle_do_not_extend_the_time(port):
    with connected(port, REQUEST[:16]) as connection:
        start = time.monotonic()
        with contextlib.suppress(OSError):
            while time.monotonic() - start < 5:
                connection.sendall(b"x")
                time.sleep(0.05)
        assert time.monotonic() - start < 5


def test_half_of_a_second_request_is_closed(port):
    with connected(port, REQUEST + REQUEST[:9]) as connection:
        assert connection.recv(12) == b"HTTP/1.1 200"
        with contextlib.suppress(ConnectionResetError):
            while connection.recv(4096):
                pass
    assert get(port)[1] == {"header_timeout": 1}


def test_a_client_that_does_not_read_is_closed(port):
    with connected(port, b"GET /large HTTP/1.1\r\nHost: localhost\r\n\r\n"):
        for _ in range(100):
            if "write_timeout" in (closed := get(port)[1]):
                break
            time.sleep(0.05)
        assert closed == {"write_timeout": 1}


def test_a_client_that_reads_slowly_gets_everything(port, monkeypatch):
    monkeypatch.setattr(http_limits, "WRITE_TIMEOUT", 1.0)  # longer than a busy machine lets this thread wait
    with connected(port, b"GET /large HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n") as connection:
        size, start = 0, time.monotonic()
        while content := connection.recv(1 << 20):
            size += len(content)
            time.sleep(0.05)
    assert size > LARGE
    assert time.monotonic() - start > 2 * http_limits.WRITE_TIMEOUT


@pytest.mark.parametrize("content", [b"", REQUEST[:-2], b"POST /wait HTTP/1.1\r\nHost: localhost\r\n"])
def test_silent_connections_make_room_for_others(port, monkeypatch, content):
    monkeypatch.setattr(http_limits, "HEADER_TIMEOUT", 60)
    with contextlib.ExitStack() as stack:
        for _ in range(40):
            stack.enter_context(connected(port, content))
        status, closed = get(port)
        assert status == 200
        assert closed["replaced"] >= 40 - 8


def test_when_all_connections_wait_for_a_response_health_has_one(port):
    with contextlib.ExitStack() as stack:
        for source in ("127.0.0.2", "127.0.0.3"):
            for _ in range(4):
                stack.enter_context(connected(port, b"GET /wait HTTP/1.1\r\nHost: localhost\r\n\r\n", source))
        time.sleep(0.3)  # all have sent their request
        assert get(port)[0] == 200
        status, value = get(port, "/v1/models")
        assert (status, value["error"]["type"]) == (503, "server_error")


def test_one_network_has_at_most_half_of_the_connections(port):
    with contextlib.ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(connected(port, WAIT, "127.0.0.2"))
        time.sleep(0.3)
        refused = stack.enter_context(connected(port, WAIT, "127.0.0.2"))
        assert refused.recv(12) == b"HTTP/1.1 503"
        assert get(port, "/v1/models")[0] == 200


def test_refused_connections_do_not_make_room_for_more(port, monkeypatch):
    """Nor are they closed before their response; but there is a bounded number of them."""
    monkeypatch.setattr(http_limits, "MAX_REFUSED", 10)
    monkeypatch.setattr(http_limits, "HEADER_TIMEOUT", 60)
    with contextlib.ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(connected(port, WAIT, "127.0.0.2"))
        time.sleep(0.3)
        silent = [stack.enter_context(connected(port, b"", "127.0.0.2")) for _ in range(10)]
        refused = stack.enter_context(connected(port, WAIT, "127.0.0.2"))
        assert refused.recv(12) == b"HTTP/1.1 503"
        assert is_closed(silent[0])
        silent[1].sendall(REQUEST)
        response = b""
        while content := silent[1].recv(4096):
            response += content
        assert response.startswith(b"HTTP/1.1 200")
        assert b"connection: close" in response
        assert get(port)[1] == {"refused": 11, "replaced": 1}


def test_others_make_room_if_the_largest_network_cannot(port, monkeypatch):
    monkeypatch.setattr(http_limits, "HEADER_TIMEOUT", 60)
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(connected(port, b"", f"127.0.0.{i}")) for i in (4, 5, 6, 7)]
        for _ in range(4):
            stack.enter_context(connected(port, WAIT, "127.0.0.2"))
        time.sleep(0.3)
        assert get(port, "/v1/models")[0] == 200
        assert is_closed(silent[0])


def test_a_response_that_is_being_sent_is_not_replaced():
    def connection(unsent, *, paused, cycle=None):
        protocol = http_limits.LimitedProtocol.__new__(http_limits.LimitedProtocol)
        protocol.transport = SimpleNamespace(get_write_buffer_size=lambda: unsent, is_closing=lambda: False)
        protocol.flow, protocol.cycle = SimpleNamespace(write_paused=paused), cycle
        return protocol

    complete = SimpleNamespace(response_complete=True, more_body=False)
    assert not connection(9, paused=False, cycle=complete)._may_be_closed
    assert connection(0, paused=False, cycle=complete)._may_be_closed
    assert connection(LARGE, paused=True, cycle=complete)._may_be_closed


@pytest.mark.parametrize(
    "content",
    [b"\x16\x03\x01\x02\x00\x01\x00", b"GET / HTTP/1.1\r\n\r\n", b"GET /" + b"a" * 70_000, b"GET  / \r\n\r\n",
     b"POST /wait HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"],
)  # fmt: skip
def test_what_is_not_http_is_an_error_of_the_api(port, content, caplog):
    with connected(port, content) as connection:
        response = b""
        while content := connection.recv(4096):
            response += content
    head, _, body = response.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert json.loads(body)["error"]["type"] == "invalid_request_error"
    assert not [record for record in caplog.records if record.exc_info]
    assert get(port)[0] == 200


def test_a_shutdown_responds_to_what_it_cancels(monkeypatch, caplog):
    monkeypatch.setattr(server, "SHUTDOWN_TIMEOUT", 0.1)
    with serving(App()) as port:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        connection.request("GET", "/wait")
        time.sleep(0.2)
    assert connection.getresponse().status == 503
    connection.close()
    assert not [record for record in caplog.records if record.exc_info]
