"""Any HTTP request gets a completion or an error that explains it, and the server keeps running."""

import asyncio
import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mla_moe.text.chat_tokenizer import load_chat_tokenizer
from mla_moe.text.tokenizer import ByteTokenizer
from tests.inference.fake_engine import FakeEngine

from .json_values import VALUES, changed

server = pytest.importorskip("mla_moe.inference.openai_server")

COMPLETION = {
    "prompt": "def ", "max_tokens": 3, "temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 1, "n": 2,
    "stop": ["a", "b"], "stream": False, "logprobs": 0, "user": "x", "model": "tiny",
}  # fmt: skip
CHAT = {
    "messages": [{"role": "user", "content": "hi"}], "max_completion_tokens": 3, "stream": True, "n": 1,
    "logprobs": True, "stream_options": {"include_usage": True}, "response_format": {"type": "text"},
}  # fmt: skip


@pytest.fixture(scope="module")
def post(tmp_path_factory):
    """Status, headers and body of the response to a path and a body."""
    app = server.application(
        FakeEngine(), load_chat_tokenizer(tmp_path_factory.mktemp("none"), ByteTokenizer()), "tiny", max_waiting=8
    )
    loop = asyncio.new_event_loop()
    lifespan = app.router.lifespan_context(app)
    loop.run_until_complete(lifespan.__aenter__())

    async def call(path, content, parts):
        edges = [len(content) * i // parts for i in range(parts + 1)]
        remaining = [content[a:b] for a, b in itertools.pairwise(edges)]
        sent = []

        async def receive():
            if not remaining:
                await asyncio.sleep(3600)
            part = remaining.pop(0)
            return {"type": "http.request", "body": part, "more_body": bool(remaining)}

        async def send(message):
            sent.append(message)

        scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "headers": [(b"content-type", b"application/json")],
            "query_string": b"",
            "http_version": "1.1",
        }
        await asyncio.wait_for(app(scope, receive, send), 20)
        return sent[0]["status"], dict(sent[0]["headers"]), b"".join(m.get("body", b"") for m in sent)

    yield lambda path, content, parts=1: loop.run_until_complete(call(path, content, parts))
    loop.run_until_complete(lifespan.__aexit__(None, None, None))
    loop.close()


def check(post, path, content, parts=1):
    status, headers, body = post(path, content, parts)
    assert status in (200, 400, 404, 413)
    assert len(body) < 100_000
    if headers[b"content-type"].startswith(b"text/event-stream"):
        assert body.endswith(b"data: [DONE]\n\n")
    elif status == 200:
        assert all(choice["finish_reason"] in ("stop", "length") for choice in json.loads(body)["choices"])
    else:
        error = json.loads(body)["error"]
        assert error["message"]
        assert error["type"] == "invalid_request_error"
    assert post("/v1/completions", b'{"prompt": "a", "max_tokens": 1}')[0] == 200


@given(changed(COMPLETION) | VALUES, st.integers(1, 3))
def test_any_completion(post, value, parts):
    check(post, "/v1/completions", json.dumps(value).encode(), parts)


@given(changed(CHAT) | VALUES)
def test_any_chat(post, value):
    check(post, "/v1/chat/completions", json.dumps(value).encode())


@given(st.binary(max_size=300) | st.integers(1, 10**5))
def test_any_body(post, value):
    """Bytes, or a depth: Hypothesis would keep what it draws, a megabyte each."""
    check(post, "/v1/completions", b'{"prompt":' * value if isinstance(value, int) else value)


def test_a_valid_request_gets_completions(post):
    assert json.loads(post("/v1/completions", json.dumps(COMPLETION | {"stop": []}).encode())[2])["usage"] == {
        "prompt_tokens": 5, "completion_tokens": 6, "total_tokens": 11,
    }  # fmt: skip
