"""An HTTP server with OpenAI's API: completions, chat completions, streams.

    POST /v1/completions    POST /v1/chat/completions    GET /v1/models    GET /v1/models/NAME    GET /health

Errors are `{"error": {"message", "type", "param", "code"}}`: 400 for an invalid request, 401 for a wrong API key, 403
for a `Host` or `Origin` that is not allowed, 404 for another model or path, 408 for a body that does not arrive in
time, 413 for one that is too large, 415 for one that is not JSON, 429 when too many requests are waiting, 500 when the
engine is dead or the tokenizer cannot decode, 503 when too many connections or long bodies are open, 504 for a request
that times out. When a client disconnects its request is aborted. Prompts are not logged.
"""

import asyncio
import contextlib
import dataclasses
import functools
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

from mla_moe.config import ConfigError
from mla_moe.inference.access import Access
from mla_moe.inference.async_engine import AsyncEngine, DecodeError, EngineDeadError, QueueFullError, RequestOutput
from mla_moe.inference.engine import Engine
from mla_moe.inference.openai_api import (
    Choice,
    Echo,
    ModelNotFoundError,
    error_body,
    model_number,
    parse_request,
    prompt_logprobs,
    usage,
)
from mla_moe.inference.request import Completion, Owner
from mla_moe.text.chat_tokenizer import ChatTokenizer

try:
    from starlette.applications import Starlette
    from starlette.datastructures import Headers
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.middleware.cors import CORSMiddleware
    from starlette.requests import ClientDisconnect
    from starlette.requests import Request as HTTPRequest
    from starlette.responses import JSONResponse, Response, StreamingResponse
    from starlette.routing import Route
    from starlette.types import ASGIApp, Receive, Scope, Send

    from mla_moe.inference import request_bodies
    from mla_moe.inference.request_bodies import BodyTimeoutError, BodyTooLargeError, BusyError, RequestBodies
except ImportError:
    raise ConfigError("serve", "starlette", "is not installed: pip install 'mla_moe[serve]'") from None

SHUTDOWN_TIMEOUT = 2
"""Seconds for running requests when the server is shut down."""


def application(
    engine: Engine,
    tokenizer: ChatTokenizer,
    name: str,
    *,
    max_waiting: int,
    timeout: float = 600,
    max_requests_per_client: int | None = None,
    access: Access | None = None,
    exit_on_engine_failure: bool = False,
    adapters: Sequence[str] = (),
) -> Starlette:
    """The ASGI application. `name` is the model's name for clients, `adapters` are those of the engine's adapters, in
    their order; a request's `model` is one of these. `timeout` is the most seconds for one request.
    `max_requests_per_client` is for choices that run or wait; a client is an API key if there are several, else an
    address. `access` is by default that of programs of this machine. With `exit_on_engine_failure`, `serve` ends when
    the engine fails."""
    access = access or Access()
    async_engine = AsyncEngine(engine, max_waiting, max_requests_per_client, lambda: app.state.on_engine_failure())
    bodies = RequestBodies()
    cached_token_bytes = functools.cache(tokenizer.token_bytes)
    names = name, *adapters
    model = {"object": "model", "created": int(time.time()), "owned_by": "mla_moe", "root": name}
    cards = [{"id": each} | model | {"parent": None if each == name else name} for each in names]

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncGenerator[None]:
        async_engine.start()
        try:
            yield
        finally:  # a second Ctrl-C cancels this task; the process must not exit during a step
            bodies.close()
            async_engine.stop()

    def prepare(owner: Owner, chat: bool, content: bytearray) -> tuple[dict, list[list[int]], list[Completion]]:
        """Fields, prompts and completions of a body, in a thread. Raises what `parse_request` does, and
        `TimeoutError`."""
        deadline = time.monotonic() + request_bodies.ENCODE_TIMEOUT

        def encode_raw(text: str) -> list[int]:
            if time.monotonic() > deadline:
                raise TimeoutError
            return tokenizer.encode_raw(text)

        limited = dataclasses.replace(tokenizer, encode_raw=encode_raw)
        body, prompts, requests = parse_request(content, limited, names, engine.max_model_len, chat=chat)
        completions = [engine.check(request) for request in requests]
        for completion in completions:
            completion.owner = owner
        return body, prompts, completions

    async def completions(http: HTTPRequest, *, chat: bool = False) -> Response:
        """Submit a request for every choice; respond when all have finished, or with a stream."""
        owner = Owner(http.state.client, uuid.uuid4().hex)
        parse = functools.partial(prepare, owner, chat)
        body, prompts, submitted = await bodies.parse(http, owner.client, parse)
        async_engine.submit(submitted)
        kind, stream = "chat.completion" if chat else "text_completion", body.get("stream", False)
        head: dict[str, Any] = {"id": f"{kind[:4]}-{owner.group}", "created": int(time.time()), "model": body["model"]}
        token_bytes = None if body.get("logprobs", False) is False else cached_token_bytes  # for completions 0 is on
        only_prompt, echoes = body.get("max_tokens") == 0, [None] * len(submitted)
        if body.get("echo"):
            echoes = [Echo(completion, cached_token_bytes, only=only_prompt) for completion in submitted]
        choices = [Choice(i, token_bytes, chat=chat, stream=stream, echo=echo) for i, echo in enumerate(echoes)]
        if stream:
            head["object"] = f"{kind}.chunk" if chat else kind
            if body.get("stream_options", {}).get("include_usage"):
                head["usage"] = None
            first = [choice.role() for choice in choices] if chat else []
            events = _events(async_engine, prompts, submitted, head, first, choices, timeout)
            return StreamingResponse(events, media_type="text/event-stream")
        outputs = await _outputs(http, async_engine, submitted, timeout)
        if outputs is None:
            return await _disconnected()

        def respond() -> Response:
            full = [choice.build(output) for choice, output in zip(choices, outputs, strict=True)]
            if "prompt_logprobs" in body:
                for choice, completion in zip(full, submitted, strict=True):
                    choice["prompt_logprobs"] = prompt_logprobs(completion, cached_token_bytes)
            counts = usage(prompts, [] if only_prompt else submitted)
            return JSONResponse(head | {"object": kind, "choices": full, "usage": counts})

        return await asyncio.to_thread(respond)  # log-probabilities of many tokens take seconds

    async def models(_: HTTPRequest) -> Response:
        return JSONResponse({"object": "list", "data": cards})

    async def one_model(http: HTTPRequest) -> Response:
        return JSONResponse(cards[model_number(http.path_params["id"], names)])

    async def health(http: HTTPRequest) -> Response:
        used, available = engine.occupancy
        status = {
            "status": async_engine.error or "ok",
            "max_num_seqs": engine.max_num_seqs,
            "running": engine.num_running,
            "requests": async_engine.num_unfinished,
            "occupancy_while_waiting": round(used / available, 4) if available else None,
            "preemptions": engine.num_preemptions,
            "closed_connections": http.scope["state"].get("closed", {}),
        }
        return JSONResponse(status, status_code=503 if async_engine.error else 200)

    routes = [
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/chat/completions", functools.partial(completions, chat=True), methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{id:path}", one_model),
        Route("/health", health),
    ]
    handlers: dict[Any, Any] = dict.fromkeys((ConfigError, *_ERRORS, Exception), _error_response)
    handlers |= {ClientDisconnect: _disconnected, HTTPException: _http_error}
    cors = Middleware(
        CORSMiddleware, allow_origins=access.cors_origins, allow_methods=["GET", "POST"], allow_headers=["*"],
        allow_private_network=True,
    )  # fmt: skip
    middleware = [*[cors] * bool(access.cors_origins), Middleware(AccessMiddleware, access=access)]
    app = Starlette(routes=routes, middleware=middleware, lifespan=lifespan, exception_handlers=handlers)
    app.state.exit_on_engine_failure, app.state.on_engine_failure = exit_on_engine_failure, lambda: None
    return app


class AccessMiddleware:
    """Refuses what `Access` does not allow, and names the client of the rest in the state of its scope."""

    def __init__(self, app: ASGIApp, access: Access):
        self._app, self._access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            refusal = self._access.refusal(scope["method"], scope["path"], headers)
            if refusal is not None:
                status, message, param, code = refusal
                body = error_body(message, "invalid_request_error", param, code)
                challenge = {"WWW-Authenticate": "Bearer"} if status == 401 else None
                await JSONResponse(body, status_code=status, headers=challenge)(scope, receive, send)
                return
            address = (scope.get("client") or ("",))[0]
            scope.setdefault("state", {})["client"] = self._access.client(address, headers)
        await self._app(scope, receive, send)


def http_server(app: Starlette, host: str, port: int) -> Any:
    """The uvicorn server of an application. A peer's address is what it is: `X-Forwarded-For` of a local proxy, or of
    anybody on this machine, does not change it."""
    import uvicorn

    from mla_moe.inference.http_limits import LimitedProtocol

    return uvicorn.Server(
        uvicorn.Config(
            app, host=host, port=port, log_level="warning", http=LimitedProtocol, ws="none", proxy_headers=False,
            timeout_graceful_shutdown=SHUTDOWN_TIMEOUT,
        )
    )  # fmt: skip


def serve(app: Starlette, host: str, port: int) -> None:
    """Serve until a signal. Raises `EngineDeadError` after an engine failure, if the application is to end then."""
    server = http_server(app, host, port)
    failed = []

    def stop() -> None:
        failed.append(True)
        server.should_exit = True

    if app.state.exit_on_engine_failure:
        app.state.on_engine_failure = stop
    with contextlib.suppress(KeyboardInterrupt):
        server.run()
    if failed:
        raise EngineDeadError


_ERRORS: dict[type[Exception], tuple[int, str, str]] = {
    QueueFullError: (429, "rate_limit_error", ""),
    EngineDeadError: (500, "server_error", "the engine failed; see the server's log"),
    DecodeError: (500, "server_error", "the tokenizer failed to decode the completion; see the server's log"),
    BusyError: (503, "server_error", "too many long bodies are being received; try again later"),
    BodyTooLargeError: (413, "invalid_request_error", f"the body has more than {request_bodies.MAX_BODY} bytes"),
    BodyTimeoutError: (
        408, "invalid_request_error", f"the body did not arrive within {request_bodies.BODY_TIMEOUT:g} seconds",
    ),
    TimeoutError: (504, "server_error", "generation took too long; request fewer tokens, or try again later"),
    ModelNotFoundError: (404, "invalid_request_error", ""),
    ConfigError: (400, "invalid_request_error", ""),
}  # fmt: skip
"""Status, type and message of an error; an empty message is the error's own."""


async def _error_response(_: HTTPRequest, error: Exception) -> JSONResponse:
    unknown = 500, "server_error", "an internal error; see the server's log"
    status, kind, message = _ERRORS.get(type(error), unknown)
    param = error.field if isinstance(error, ConfigError) else None
    code = "model_not_found" if status == 404 else None
    headers = {"Retry-After": "1"} if status in (429, 503) else None
    return JSONResponse(error_body(message or str(error), kind, param, code), status_code=status, headers=headers)


async def _http_error(_: HTTPRequest, error: HTTPException) -> JSONResponse:
    """An unknown path, or a method that it does not have."""
    body = error_body(error.detail, "invalid_request_error")
    return JSONResponse(body, status_code=error.status_code, headers=error.headers)


async def _disconnected(*_: Any) -> Response:
    return Response(status_code=499)  # the client will not receive it


async def _outputs(
    http: HTTPRequest, async_engine: AsyncEngine, completions: Sequence[Completion], timeout: float
) -> list[RequestOutput] | None:
    """The full output of every completion, or None if the client disconnects. Raises `TimeoutError` and what
    `AsyncEngine.stream` raises."""
    tasks = [asyncio.ensure_future(_full_output(async_engine, completion)) for completion in completions]
    outputs = asyncio.gather(*tasks)
    disconnect = asyncio.ensure_future(_wait_for_disconnect(http))
    try:
        done, _ = await asyncio.wait([outputs, disconnect], timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if not done:
            raise TimeoutError
        return outputs.result() if outputs.done() else None
    finally:
        for task in (disconnect, outputs, *tasks):  # if one has failed, the others go on until they are cancelled
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError, EngineDeadError, DecodeError):
            await outputs  # asyncio logs errors that are not awaited


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
    first: Sequence[dict[str, Any]],
    choices: Sequence[Choice],
    timeout: float,
) -> AsyncIterator[str]:
    """Server-sent events: chunks of `first`, of all choices in the order of their outputs, and of usage if the head has
    that key. When the client disconnects, closing this iterator aborts the requests."""
    merged: asyncio.Queue[tuple[int, RequestOutput | Exception]] = asyncio.Queue()

    async def follow(index: int, completion: Completion) -> None:
        try:
            async for output in async_engine.stream(completion):
                merged.put_nowait((index, output))
        except (EngineDeadError, DecodeError) as error:
            merged.put_nowait((index, error))

    tasks = [asyncio.ensure_future(follow(i, completion)) for i, completion in enumerate(completions)]
    try:
        for chunk in first:
            yield f"data: {json.dumps(head | {'choices': [chunk]})}\n\n"
        unfinished, deadline = len(completions), time.monotonic() + timeout
        while unfinished:
            try:
                index, output = await asyncio.wait_for(merged.get(), deadline - time.monotonic())
            except TimeoutError as error:
                index, output = 0, error
            if isinstance(output, Exception):
                _, kind, message = _ERRORS[type(output)]
                yield f"data: {json.dumps(error_body(message, kind))}\n\n"
                return
            unfinished -= output.finish_reason is not None
            yield f"data: {json.dumps(head | {'choices': [choices[index].build(output)]})}\n\n"
        if "usage" in head:
            yield f"data: {json.dumps(head | {'choices': [], 'usage': usage(prompts, completions)})}\n\n"
        yield "data: [DONE]\n\n"
    finally:
        for task, completion in zip(tasks, completions, strict=True):
            task.cancel()
            async_engine.abort(completion)
