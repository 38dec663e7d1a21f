"""Servers and clients for the tests of the server."""

import contextlib
import http.client
import json
import threading
import time

import pytest

from mla_moe.text.chat_tokenizer import ChatTokenizer

pytest.importorskip("uvicorn")
server = pytest.importorskip("mla_moe.inference.openai_server")

MAX_MODEL_LEN = 64
JSON = {"Content-Type": "application/json"}


def decode(ids):
    return "".join(chr(97 + i % 26) + str(i // 26) for i in ids)


def encode(text):
    return [1, *(ord(c) % 64 for c in text)]


TOKENIZER = ChatTokenizer(
    encode=encode,
    encode_raw=encode,
    encode_template=lambda template, question: encode(template.replace("{question}", question)),
    encode_chat=lambda messages: [2, *(ord(c) % 64 for m in messages for c in m["content"])],
    decode=decode,
    token_bytes=lambda token: decode([token]).encode(),
    stop_ids=(63,),
    encode_training=lambda conversations: [],
)


@contextlib.contextmanager
def serving(app):
    """The port on which an application listens."""
    running = server.http_server(app, "127.0.0.1", 0)
    thread = threading.Thread(target=running.run)
    thread.start()
    while not running.started:
        time.sleep(0.01)
    yield running.servers[0].sockets[0].getsockname()[1]
    running.should_exit = True
    thread.join()


def call(port, path, body=None, raw=None):
    content = raw if raw is not None else None if body is None else json.dumps(body)
    status, _, value = exchange(port, "GET" if content is None else "POST", path, content)
    return status, json.loads(value)


def exchange(port, method, path, content=None, headers=()):
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=120)) as connection:
        connection.request(method, path, content, JSON | dict(headers))
        response = connection.getresponse()
        return response.status, dict(response.getheaders()), response.read()


def wait_until_idle(port):
    for _ in range(1000):
        status, health = call(port, "/health")
        assert status == 200
        if health["requests"] == health["running"] == 0:
            return health
        time.sleep(0.01)
    raise AssertionError(health)
