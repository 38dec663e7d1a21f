"""An HTTP server with OpenAI's interface: completions, chat completions, streams.

    POST /v1/completions    POST /v1/chat/completions    GET /v1/models    GET /v1/models/NAME    GET /health

Errors are `{"error": {"message", "type", "param", "code"}}`: 400 for a request that makes no sense, 408 for one that
does not come, 413 for one that is too large, 429 when too many are waiting, 504 for an answer that takes too long. A
client that hangs up frees its slot.
"""

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from mla_moe.config import ConfigError
from mla_moe.inference.async_engine import AsyncEngine, EngineDeadError, QueueFullError, RequestOutput
from mla_moe.inference.engine import Engine
from mla_moe.inference.openai_requests import (
    CHAT,
    COMPLETION,
    build_requests,
    parse_body,
    parse_messages,
    parse_prompts,
)
from mla_moe.inference.openai_responses import chat_choice, completion_choice, usage
from mla_moe.inference.request import Completion, Decode
from mla_moe.text.chat_tokenizer import ChatTokenizer

try:
    from starlette.applications import Starlette
    from starlette.requests import ClientDisconnect
    from starlette.requests import Request as HTTPRequest
    from starlette.responses import JSONResponse, Response, StreamingResponse
    from starlette.routing import Route
except ImportError:
    raise ConfigError("serve", "starlette", "is not installed: pip install 'mla_moe[serve]'") from None

MAX_BODY = 4 << 20
MAX_CONNECTIONS = 1024
BODY_SECONDS = 30.0
"""Longest time in which a body may come."""
GRACE = 2
"""Seconds that running answers have when the server is told to stop."""


def application(
    engine: Engine, language: ChatTokenizer, name: str, *, max_waiting: int, seconds: float = 600
) -> Starlette:
    """The server. `name` is what clients call the model, `seconds` the longest time that an answer may take."""
    desk = AsyncEngine(engine, max_waiting)
    model = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "mla_moe"}

    @contextlib.asynccontextmanager
    async def lifespan(_):
        desk.start()
        try:
            yield
        finally:  # a second Ctrl-C cancels this; to exit amid a step would abort
            desk.stop()

    async def completions(http: HTTPRequest) -> Response:
        body = await _body(http, COMPLETION)
        prompts = parse_prompts(body.get("prompt"), language)
        return await _answer(http, desk, language, name, seconds, body, prompts, completion_choice, "text_completion")

    async def chat(http: HTTPRequest) -> Response:
        body = await _body(http, CHAT)
        if "max_completion_tokens" in body:
            body.setdefault("max_tokens", body["max_completion_tokens"])
        prompts = [language.encode_chat(parse_messages(body.get("messages")))]
        return await _answer(http, desk, language, name, seconds, body, prompts, chat_choice, "chat.completion")

    async def models(_: HTTPRequest) -> Response:
        return JSONResponse({"object": "list", "data": [model]})

    async def one_model(http: HTTPRequest) -> Response:
        if http.path_params["id"] == name:
            return JSONResponse(model)
        return JSONResponse(_error(f"there is no model but {name}", "invalid_request_error", "model"), status_code=404)

    async def health(_: HTTPRequest) -> Response:
        used, offered = engine.load
        status = {
            "status": "broken" if desk.broken else "ok",
            "slots": engine.slots,
            "running": engine.running,
            "requests": desk.open,
            "full_while_waiting": round(used / offered, 4) if offered else None,
        }
        return JSONResponse(status, status_code=503 if desk.broken else 200)

    routes = [
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{id:path}", one_model),
        Route("/health", health),
    ]
    handlers: dict[Any, Any] = dict.fromkeys((ConfigError, *_REFUSALS), _refuse)
    handlers[ClientDisconnect] = _nobody
    return Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers)


def serve(app: Starlette, host: str, port: int) -> None:
    import uvicorn

    uvicorn.run(
        app, host=host, port=port, log_level="warning", limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=GRACE,
    )  # fmt: skip


class _TooLarge(Exception):
    pass


class _TooSlow(Exception):
    pass


_REFUSALS: dict[type[Exception], tuple[int, str, str]] = {
    QueueFullError: (429, "rate_limit_error", "too many requests are waiting; try again later"),
    EngineDeadError: (500, "server_error", "the engine failed; see the server's log"),
    _TooLarge: (413, "invalid_request_error", f"the body has more than {MAX_BODY} bytes"),
    _TooSlow: (408, "invalid_request_error", f"the body did not come within {BODY_SECONDS:g} seconds"),
    TimeoutError: (504, "server_error", "the answer took too long; ask for fewer tokens, or later"),
}
_MESSAGE = 500
"""Characters of an error's message, which repeats what was sent."""


async def _refuse(_: HTTPRequest, error: Exception) -> JSONResponse:
    status, kind, message = _REFUSALS.get(type(error), (400, "invalid_request_error", str(error)))
    param = error.field if isinstance(error, ConfigError) else None
    headers = {"Retry-After": "1"} if status == 429 else None
    return JSONResponse(_error(message, kind, param), status_code=status, headers=headers)


def _error(message: str, kind: str, param: str | None = None) -> dict[str, Any]:
    def shown(text: str) -> str:
        return text[:_MESSAGE].encode(errors="replace").decode()

    return {"error": {"message": shown(message), "type": kind, "param": param and shown(param), "code": None}}


async def _nobody(*_: Any) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _body(http: HTTPRequest, fields: dict[str, Any]) -> dict[str, Any]:
    content = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in http.stream():
                content += chunk
                if len(content) > MAX_BODY:
                    raise _TooLarge
    except TimeoutError:
        raise _TooSlow from None
    return parse_body(content, fields)


async def _answer(
    http: HTTPRequest,
    desk: AsyncEngine,
    language: ChatTokenizer,
    name: str,
    seconds: float,
    body: dict[str, Any],
    prompts: Sequence[list[int]],
    choice: Callable,
    kind: str,
) -> Response:
    """Queue the choices; answer when all are done, or as they come."""
    completions: list[Completion] = []
    try:
        for request in build_requests(body, prompts, language, desk.engine.capacity):
            completions.append(desk.submit(request))
    except Exception:
        for completion in completions:
            desk.cancel(completion)
        raise
    head: dict[str, Any] = {"id": f"{kind[:4]}-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}
    told = language.decode if body.get("logprobs", False) is not False else None  # completions ask with 0
    if body.get("stream"):
        head["object"] = "chat.completion.chunk" if kind == "chat.completion" else kind
        if body.get("stream_options", {}).get("include_usage"):
            head["usage"] = None
        events = _events(desk, prompts, completions, head, choice, told, seconds)
        return StreamingResponse(events, media_type="text/event-stream")
    gathered = asyncio.gather(*(_all_news(desk, completion) for completion in completions))
    watch = asyncio.ensure_future(_hung_up(http))
    try:
        done, _ = await asyncio.wait([gathered, watch], timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if not done:
            raise TimeoutError
        if not gathered.done():
            return await _nobody()
        choices = [choice(i, news, told, whole=True) for i, news in enumerate(gathered.result())]
    finally:
        watch.cancel()
        gathered.cancel()
        with contextlib.suppress(asyncio.CancelledError, EngineDeadError):  # the loop reports what nobody has awaited
            await gathered
    return JSONResponse(head | {"object": kind, "choices": choices, "usage": usage(prompts, completions)})


async def _all_news(desk: AsyncEngine, completion: Completion) -> RequestOutput:
    parts = [news async for news in desk.news(completion)]
    tokens, logprobs = [t for p in parts for t in p.tokens], [x for p in parts for x in p.logprobs]
    return RequestOutput("".join(p.text for p in parts), tokens, logprobs, parts[-1].finish)


async def _hung_up(http: HTTPRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def _events(
    desk: AsyncEngine,
    prompts: Sequence[list[int]],
    completions: list[Completion],
    head: dict[str, Any],
    choice: Callable,
    told: Decode | None,
    seconds: float,
):
    """Server-sent events of all choices as they come, and of usage where the head has its place. When the client hangs
    up, closing this cancels them."""
    merged: asyncio.Queue[tuple[int, RequestOutput | Exception]] = asyncio.Queue()

    async def follow(index: int, completion: Completion) -> None:
        try:
            async for news in desk.news(completion):
                merged.put_nowait((index, news))
        except EngineDeadError as error:
            merged.put_nowait((index, error))

    tasks = [asyncio.ensure_future(follow(i, completion)) for i, completion in enumerate(completions)]
    try:
        left, until = len(completions), time.monotonic() + seconds
        while left:
            try:
                index, news = await asyncio.wait_for(merged.get(), until - time.monotonic())
            except TimeoutError as error:
                index, news = 0, error
            if isinstance(news, Exception):
                _, kind, message = _REFUSALS[type(news)]
                yield f"data: {json.dumps(_error(message, kind))}\n\n"
                return
            left -= news.finish is not None
            yield f"data: {json.dumps(head | {'choices': [choice(index, news, told, whole=False)]})}\n\n"
        if "usage" in head:
            yield f"data: {json.dumps(head | {'choices': [], 'usage': usage(prompts, completions)})}\n\n"
        yield "data: [DONE]\n\n"
    finally:
        for task, completion in zip(tasks, completions, strict=True):
            task.cancel()
            desk.cancel(completion)
