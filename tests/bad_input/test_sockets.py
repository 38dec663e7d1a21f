"""Any bytes on a connection: an HTTP answer or an end of the connection, and other clients are served."""

import contextlib
import http.client
import json
import socket
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mla_moe.text.chat_tokenizer import load_chat_tokenizer
from mla_moe.text.tokenizer import ByteTokenizer
from tests.inference.fake_engine import FakeEngine

server = pytest.importorskip("mla_moe.inference.openai_server")
from tests.inference.serving import serving  # noqa: E402

BODY = json.dumps({"prompt": "def ", "max_tokens": 3}).encode()
HEAD = (
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    % len(BODY)
)
PARTS = [
    *HEAD.split(b" "), *HEAD.splitlines(keepends=True), HEAD, BODY, b"\r\n", b"\n", b"\0", b"\xff", b"HTTP/2.0",
    b"Transfer-Encoding: chunked\r\n", b"1\r\na\r\n", b"0\r\n\r\n", b"ffffffffffffffffff\r\n", b"OPTIONS * ",
    b"Connection: close\r\n", b"Content-Length: -1\r\n", b"Content-Length: 99999999999999999999\r\n",
    b"Upgrade: websocket\r\n", b"Expect: 100-continue\r\n", b"X: " + b"a" * 70_000, b"\x16\x03\x01\x02\x00",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET http://evil.example/ HTTP/1.1\r\n",
]  # fmt: skip


@pytest.fixture(scope="module")
def port(tmp_path_factory):
    tokenizer = load_chat_tokenizer(tmp_path_factory.mktemp("none"), ByteTokenizer())
    with serving(server.application(FakeEngine(), tokenizer, "tiny", max_waiting=8)) as port:
        yield port


def exchange(port, content):
    """All that the server sends to a client that sends `content` and nothing more, and is answered before."""
    answer = bytearray()
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection, contextlib.suppress(ConnectionError):
        connection.sendall(HEAD + BODY)
        while not answer.endswith(b"}"):
            answer += connection.recv(1 << 16)
        assert answer.startswith(b"HTTP/1.1 200 ")
        answer.clear()
        connection.sendall(content)
        with contextlib.suppress(OSError):  # "not connected", if the server has closed it by now
            connection.shutdown(socket.SHUT_WR)
        while part := connection.recv(1 << 16):
            answer += part
    return bytes(answer)


@given(st.lists(st.sampled_from(PARTS) | st.binary(max_size=30), max_size=6).map(b"".join))
def test_any_bytes(port, content):
    start = time.monotonic()
    answer = exchange(port, content)
    assert answer.startswith(b"HTTP/1.1 ") or not answer
    assert b"Traceback" not in answer
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", "/health")
    assert connection.getresponse().status == 200
    connection.close()
    assert time.monotonic() - start < 10
