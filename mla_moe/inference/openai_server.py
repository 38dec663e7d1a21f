"""An HTTP server with OpenAI's API: completions, chat completions, streams.

    POST /v1/completions    POST /v1/chat/completions    GET /v1/models    GET /v1/models/NAME    GET /health

Errors are `{"error": {"message", "type", "param", "code"}}`: 400 for an invalid request, 408 for a body that does not
arrive in time, 413 for one that is too large, 429 when too many requests are waiting, 504 for a request that times out.
When a client disconnects its request is aborted.
"""

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

from mla_moe.config import ConfigError
from mla_moe.inference.async_engine import AsyncEngine, EngineDeadError, QueueFullError, RequestOutput
from mla_moe.inference.engine import Engine
from mla_moe.inference.openai_api import (
    CHAT,
    COMPLETION,
    Choice,
    build_requests,
    chat_choice,
    completion_choice,
    parse_body,
    parse_messages,
    parse_prompts,
    usage,
)
from mla_moe.inference.request import Completion
from mla_moe.text.chat_tokenizer import ChatTokenizer
from mla_moe.text.tokenizer import Decode

try:
    from starlette.applications import Starlette
    from starlette.requests import ClientDisconnect
    from starlette.requests import Request as HTTPRequest
    from starlette.responses import JSONResponse, Response, StreamingResponse
    from starlette.routing import Route
except ImportError:
    raise ConfigError("serve", "starlette", "is not installed: pip install 'mla_moe[serve]'") from None

MAX_BODY = 4 << 20
"""Bytes."""
MAX_CONNECTIONS = 1024
BODY_TIMEOUT = 30.0
"""Seconds in which a body must arrive."""
SHUTDOWN_TIMEOUT = 2
"""Seconds for running requests when the server is shut down."""
MAX_ERROR_LENGTH = 500
"""Characters of an error message, which repeats what the client sent."""


def application(
    engine: Engine, tokenizer: ChatTokenizer, name: str, *, max_waiting: int, timeout: float = 600
) -> Starlette:
    """The ASGI application. `name` is the model's name for clients, `timeout` the most seconds for one request."""
    async_engine = AsyncEngine(engine, max_waiting)
    model = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "mla_moe"}

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncGenerator[None]:
        async_engine.start()
        try:
            yield
        finally:  # a second Ctrl-C cancels this task; the process must not exit during a step
            async_engine.stop()

    async def completions(http: HTTPRequest) -> Response:
        body = await _body(http, COMPLETION)
        prompts = parse_prompts(body.get("prompt"), tokenizer)
        return await respond(http, body, prompts, completion_choice, "text_completion")

    async def chat(http: HTTPRequest) -> Response:
        body = await _body(http, CHAT)
        if "max_completion_tokens" in body:
            body.setdefault("max_tokens", body["max_completion_tokens"])
        prompts = [tokenizer.encode_chat(parse_messages(body.get("messages")))]
        return await respond(http, body, prompts, chat_choice, "chat.completion")

    async def respond(
        http: HTTPRequest, body: dict[str, Any], prompts: list[list[int]], choice: Choice, kind: str
    ) -> Response:
        """Submit a request for every choice; respond when all have finished, or with a stream."""
        submitted: list[Completion] = []
        try:
            for request in build_requests(body, prompts, tokenizer, engine.max_model_len):
                submitted.append(async_engine.submit(request))
        except Exception:
            for completion in submitted:
                async_engine.abort(completion)
            raise
        head: dict[str, Any] = {"id": f"{kind[:4]}-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}
        decode = tokenizer.decode if body.get("logprobs", False) is not False else None  # for completions 0 is on
        if body.get("stream"):
            head["object"] = "chat.completion.chunk" if kind == "chat.completion" else kind
            if body.get("stream_options", {}).get("include_usage"):
                head["usage"] = None
            events = _events(async_engine, prompts, submitted, head, choice, decode, timeout)
            return StreamingResponse(events, media_type="text/event-stream")
        outputs = await _outputs(http, async_engine, submitted, timeout)
        if outputs is None:
            return await _disconnected()
        choices = [choice(i, output, decode, stream=False) for i, output in enumerate(outputs)]
        return JSONResponse(head | {"object": kind, "choices": choices, "usage": usage(prompts, submitted)})

    async def models(_: HTTPRequest) -> Response:
        return JSONResponse({"object": "list", "data": [model]})

    async def one_model(http: HTTPRequest) -> Response:
        if http.path_params["id"] == name:
            return JSONResponse(model)
        return JSONResponse(_error(f"the only model is {name}", "invalid_request_error", "model"), status_code=404)

    async def health(_: HTTPRequest) -> Response:
        used, available = engine.occupancy
        status = {
            "status": "broken" if async_engine.errored else "ok",
            "max_num_seqs": engine.max_num_seqs,
            "running": engine.num_running,
            "requests": async_engine.num_unfinished,
            "occupancy_while_waiting": round(used / available, 4) if available else None,
        }
        return JSONResponse(status, status_code=503 if async_engine.errored else 200)

    routes = [
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{id:path}", one_model),
        Route("/health", health),
    ]
    handlers: dict[Any, Any] = dict.fromkeys((ConfigError, *_ERRORS), _error_response)
    handlers[ClientDisconnect] = _disconnected
    return Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers)


def serve(app: Starlette, host: str, port: int) -> None:
    import uvicorn

    uvicorn.run(
        app, host=host, port=port, log_level="warning", limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=SHUTDOWN_TIMEOUT,
    )  # fmt: skip


class _BodyTooLarge(Exception):
    pass


class _BodyTimeout(Exception):
    pass


_ERRORS: dict[type[Exception], tuple[int, str, str]] = {
    QueueFullError: (429, "rate_limit_error", "too many requests are waiting; try again later"),
    EngineDeadError: (500, "server_error", "the engine failed; see the server's log"),
    _BodyTooLarge: (413, "invalid_request_error", f"the body has more than {MAX_BODY} bytes"),
    _BodyTimeout: (408, "invalid_request_error", f"the body did not arrive within {BODY_TIMEOUT:g} seconds"),
    TimeoutError: (504, "server_error", "the answer took too long; request fewer tokens, or try again later"),
}


async def _error_response(_: HTTPRequest, error: Exception) -> JSONResponse:
    status, kind, message = _ERRORS.get(type(error), (400, "invalid_request_error", str(error)))
    param = error.field if isinstance(error, ConfigError) else None
    headers = {"Retry-After": "1"} if status == 429 else None
    return JSONResponse(_error(message, kind, param), status_code=status, headers=headers)


def _error(message: str, kind: str, param: str | None = None) -> dict[str, Any]:
    def shorten(text: str) -> str:
        return text[:MAX_ERROR_LENGTH].encode(errors="replace").decode()

    return {"error": {"message": shorten(message), "type": kind, "param": param and shorten(param), "code": None}}


async def _disconnected(*_: Any) -> Response:
    return Response(status_code=499)  # the client will not receive it


async def _body(http: HTTPRequest, fields: dict[str, Any]) -> dict[str, Any]:
    content = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT):
            async for chunk in http.stream():
                content += chunk
                if len(content) > MAX_BODY:
                    raise _BodyTooLarge
    except TimeoutError:
        raise _BodyTimeout from None
    return parse_body(content, fields)


async def _outputs(
    http: HTTPRequest, async_engine: AsyncEngine, completions: Sequence[Completion], timeout: float
) -> list[RequestOutput] | None:
    """The full output of every completion, or None if the client disconnects. Raises `TimeoutError`."""
    outputs = asyncio.gather(*(_full_output(async_engine, completion) for completion in completions))
    disconnect = asyncio.ensure_future(_wait_for_disconnect(http))
    try:
        done, _ = await asyncio.wait([outputs, disconnect], timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if not done:
            raise TimeoutError
        return outputs.result() if outputs.done() else None
    finally:
        disconnect.cancel()
        outputs.cancel()
        with contextlib.suppress(asyncio.CancelledError, EngineDeadError):  # asyncio logs errors that are not awaited
            await outputs


async def _full_output(async_engine: AsyncEngine, completion: Completion) -> RequestOutput:
    parts = [output async for output in async_engine.stream(completion)]
    tokens, logprobs = [t for p in parts for t in p.tokens], [x for p in parts for x in p.logprobs]
    return RequestOutput("".join(p.text for p in parts), tokens, logprobs, parts[-1].finish_reason)


async def _wait_for_disconnect(http: HTTPRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def _events(
    async_engine: AsyncEngine,
    prompts: Sequence[list[int]],
    completions: list[Completion],
    head: dict[str, Any],
    choice: Choice,
    decode: Decode | None,
    timeout: float,
) -> AsyncIterator[str]:
    """Server-sent events of all choices in the order of their outputs, and of usage if the head has that key. When the
    client disconnects, closing this iterator aborts the requests."""
    merged: asyncio.Queue[tuple[int, RequestOutput | Exception]] = asyncio.Queue()

    async def follow(index: int, completion: Completion) -> None:
        try:
            async for output in async_engine.stream(completion):
                merged.put_nowait((index, output))
        except EngineDeadError as error:
            merged.put_nowait((index, error))

    tasks = [asyncio.ensure_future(follow(i, completion)) for i, completion in enumerate(completions)]
    try:
        unfinished, deadline = len(completions), time.monotonic() + timeout
        while unfinished:
            try:
                index, output = await asyncio.wait_for(merged.get(), deadline - time.monotonic())
            except TimeoutError as error:
                index, output = 0, error
            if isinstance(output, Exception):
                _, kind, message = _ERRORS[type(output)]
                yield f"data: {json.dumps(_error(message, kind))}\n\n"
                return
            unfinished -= output.finish_reason is not None
            yield f"data: {json.dumps(head | {'choices': [choice(index, output, decode, stream=True)]})}\n\n"
        if "usage" in head:
            yield f"data: {json.dumps(head | {'choices': [], 'usage': usage(prompts, completions)})}\n\n"
        yield "data: [DONE]\n\n"
    finally:
        for task, completion in zip(tasks, completions, strict=True):
            task.cancel()
            async_engine.abort(completion)
