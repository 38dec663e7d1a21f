"""Two hundred requests by OpenAI's client, whose helpers join streams. Runs where `openai` is installed; neither the
package nor its other tests need it."""

import asyncio
import contextlib
import dataclasses
import random

import pytest
from flax import nnx

from mla_moe import Transformer
from mla_moe.inference.engine import Engine
from mla_moe.text.chat_tokenizer import load_chat_tokenizer
from mla_moe.text.tokenizer import ByteTokenizer

openai = pytest.importorskip("openai")
pydantic = pytest.importorskip("pydantic")
server = pytest.importorskip("mla_moe.inference.openai_server")

from .serving import serving, wait_until_idle  # noqa: E402

STREAMS, COMPLETIONS, CONCURRENT = 40, 25, 50
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "日本?"}]


@pytest.fixture(scope="module")
def port(cfg, tmp_path_factory):
    """A server of random bytes, most of which are not valid UTF-8."""
    wide = dataclasses.replace(cfg, num_nextn_predict_layers=0, vocab_size=258)
    tokenizer = load_chat_tokenizer(tmp_path_factory.mktemp("none"), ByteTokenizer())
    tokenizer = dataclasses.replace(
        tokenizer, encode_chat=lambda messages: tokenizer.encode("".join(m["content"] for m in messages))
    )
    model = Transformer(wide, rngs=nnx.Rngs(0))
    engine = Engine(model, max_num_seqs=8, max_model_len=96, decode=tokenizer.decode)
    with serving(server.application(engine, tokenizer, "tiny", max_waiting=250)) as port:
        yield port
        wait_until_idle(port)


@pytest.fixture(scope="module")
def client(port):
    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
        yield client


def chat(seed, **more):
    rng = random.Random(seed)
    n, logprobs, most = rng.randint(1, 4), rng.random() < 0.5, rng.randint(1, 40)
    body = {"n": n, "logprobs": logprobs, "max_completion_tokens": most, "seed": seed}
    stop = {"stop": list("aeiotn1?")} if rng.random() < 0.7 else {}
    return {"model": "tiny", "messages": MESSAGES} | body | stop | more


def test_helpers_join_chat_streams_to_the_full_response(client):
    for seed in range(STREAMS):
        full = client.chat.completions.create(**chat(seed))
        with client.chat.completions.stream(**chat(seed), stream_options={"include_usage": True}) as stream:
            events, final = list(stream), stream.current_completion_snapshot
            finished = all(choice.finish_reason == "stop" for choice in final.choices)
            with contextlib.nullcontext() if finished else pytest.raises(openai.LengthFinishReasonError):
                assert stream.get_final_completion().choices[0].message.content == final.choices[0].message.content
        assert final.usage == full.usage
        assert [choice.index for choice in final.choices] == list(range(len(full.choices)))
        for ours, theirs in zip(final.choices, full.choices, strict=True):
            assert ours.message.role == theirs.message.role == "assistant"
            assert ours.message.content == theirs.message.content
            assert ours.finish_reason == theirs.finish_reason
            assert (ours.logprobs is None) == (theirs.logprobs is None)
            if theirs.logprobs:
                assert ours.logprobs.content == theirs.logprobs.content
                text = b"".join(bytes(token.bytes) for token in theirs.logprobs.content).decode(errors="replace")
                assert text.startswith(theirs.message.content)  # the text ends before a stop string
        if len(full.choices) == 1:
            [choice] = full.choices
            deltas = [event.delta for event in events if event.type == "content.delta"]
            assert "".join(deltas) == choice.message.content
            done = [event.content for event in events if event.type == "content.done"]
            assert done == ([choice.message.content] if choice.message.content else [])
            assert sum(event.type == "logprobs.content.done" for event in events) == bool(choice.logprobs)


def test_completions_and_the_offsets_of_their_tokens(client):
    for seed in range(COMPLETIONS):
        body = {"model": "tiny", "prompt": ["def é", "日"], "logprobs": 0, "seed": seed, "max_tokens": 30}
        full = client.completions.create(**body)
        chunks = list(client.completions.create(**body, stream=True))
        for choice in full.choices:
            parts = [part for chunk in chunks for part in chunk.choices if part.index == choice.index]
            assert "".join(part.text for part in parts) == choice.text
            assert parts[-1].finish_reason == choice.finish_reason
            for name in ("tokens", "token_logprobs", "text_offset"):
                assert [x for p in parts for x in getattr(p.logprobs, name)] == getattr(choice.logprobs, name)
            for token, offset in zip(choice.logprobs.tokens, choice.logprobs.text_offset, strict=True):
                assert "\ufffd" in token or choice.text[offset:].startswith(token)


def test_concurrent_requests_of_the_async_client(client, port):
    async def ask(client, seed):
        if seed % 2:
            return await client.chat.completions.create(**chat(seed))
        async with client.chat.completions.stream(**chat(seed)) as stream:
            await stream.until_done()
            return stream.current_completion_snapshot

    async def ask_all():
        async with openai.AsyncOpenAI(base_url=client.base_url, api_key="none", max_retries=0) as concurrent:
            return await asyncio.gather(*(ask(concurrent, seed) for seed in range(CONCURRENT)))

    for seed, answer in enumerate(asyncio.run(ask_all())):
        assert len(answer.choices) == chat(seed)["n"]
        assert all(choice.message.role == "assistant" for choice in answer.choices)
        if seed % 10 == 0:
            alone = client.chat.completions.create(**chat(seed))
            assert [c.message.content for c in alone.choices] == [c.message.content for c in answer.choices]


class Answer(pydantic.BaseModel):
    number: int


TOOL = {"type": "function", "function": {"name": "f", "strict": True, "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"response_format": Answer}, "response_format"),
        ({"tools": [TOOL]}, "tools"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"logprobs": True, "top_logprobs": 2}, "top_logprobs"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(client, more, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.parse(**chat(0, **more))
    assert caught.value.param == param
    with pytest.raises(openai.BadRequestError) as caught, client.chat.completions.stream(**chat(0, **more)):
        pass
    assert caught.value.param == param


def test_other_resources(client, port):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    for call in (
        lambda: client.models.retrieve("huge"),
        lambda: client.responses.create(model="tiny", input="hi"),
        lambda: client.embeddings.create(model="tiny", input="hi"),
    ):
        with pytest.raises(openai.NotFoundError):
            call()
    for seed in range(4):  # a stream that is closed early frees its slots
        with client.chat.completions.stream(**chat(seed, max_completion_tokens=60, n=4)) as stream:
            next(iter(stream))
        wait_until_idle(port)
