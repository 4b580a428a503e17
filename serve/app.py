"""The routes, and what stands before them: the key, the size of a body, errors in OpenAI's form.

POST /v1/completions   POST /v1/chat/completions   GET /v1/models   GET /v1/models/{name}   GET /metrics
POST /v1/embeddings    POST /v1/classify    POST /v1/score    POST /v1/rerank          where the model gives vectors
POST /tokenize         POST /detokenize     what a text is to the model, and back (`tokens.py`)
POST /v1/load_lora_adapter   POST /v1/unload_lora_adapter    where the operator allows it (`adapters.py`)
GET /health            the process is alive                         open without a key
GET /ready             a model is loaded and the engine answers     open without a key
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trine.serve.adapters import AdapterChanges
from trine.serve.answers import Answer
from trine.serve.errors import ApiError, unavailable, wrong_kind
from trine.serve.jobs import Job, chat_job, completion_job, prompts_of, with_adapter
from trine.serve.metrics import CONTENT_TYPE
from trine.serve.pooling_answers import PoolingAnswer
from trine.serve.pooling_bodies import ClassifyBody, EmbeddingBody, PoolingBody, RerankBody, ScoreBody
from trine.serve.pooling_jobs import PoolingJob, classify_job, embedding_job, num_texts, rerank_job, score_job
from trine.serve.response import EngineResponse
from trine.serve.schemas import (
    ChatBody,
    CompletionBody,
    GenerationBody,
    LoadAdapterBody,
    UnloadAdapterBody,
    check_limits,
    parse_body,
)
from trine.serve.service import Loaded, Service
from trine.serve.tokens import DetokenizeBody, TokenizeBody, detokenize, tokenize

OPEN_PATHS = frozenset({"/health", "/ready"})


def make_app(service: Service) -> ASGIApp:
    """The ASGI application of one server."""
    app = FastAPI(title="Trine", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_mistake)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        body = parse_body(CompletionBody, await _read(request, service))
        prompts = prompts_of(body)
        if len(prompts) > (limit := service.settings.max_prompts):
            raise ApiError(400, f"prompt holds {len(prompts)} prompts; this server takes {limit}", param="prompt")
        return await _generate(service, body, len(prompts), lambda loaded: completion_job(body, loaded))

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        body = parse_body(ChatBody, await _read(request, service))
        return await _generate(service, body, 1, lambda loaded: chat_job(body, loaded))

    @app.post("/v1/embeddings")
    async def embeddings(request: Request) -> Response:
        body = parse_body(EmbeddingBody, await _read(request, service))
        return await _pool(service, body, "input", lambda loaded: embedding_job(body, loaded))

    @app.post("/v1/classify")
    async def classify(request: Request) -> Response:
        body = parse_body(ClassifyBody, await _read(request, service))
        return await _pool(service, body, "input", lambda loaded: classify_job(body, loaded))

    @app.post("/v1/score")
    async def score(request: Request) -> Response:
        body = parse_body(ScoreBody, await _read(request, service))
        return await _pool(service, body, "text_2", lambda loaded: score_job(body, loaded))

    @app.post("/v1/rerank")
    async def rerank(request: Request) -> Response:
        body = parse_body(RerankBody, await _read(request, service))
        return await _pool(service, body, "documents", lambda loaded: rerank_job(body, loaded))

    @app.post("/tokenize")
    async def to_tokens(request: Request) -> Response:
        body = parse_body(TokenizeBody, await _read(request, service))
        service.model_name(body.model)
        return _json(await tokenize(body, service.require()))

    @app.post("/detokenize")
    async def to_text(request: Request) -> Response:
        body = parse_body(DetokenizeBody, await _read(request, service))
        service.model_name(body.model)
        return _json(detokenize(body, service.require()))

    @app.get("/v1/models")
    async def models() -> Response:
        loaded = service.require()
        names = (*service.settings.names, *service.adapters)
        return _json({"object": "list", "data": [_model(name, loaded, service) for name in names]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        loaded = service.require()
        return _json(_model(service.model_name(name), loaded, service))

    if service.settings.adapter_root is not None:
        changes = AdapterChanges(service, service.settings.adapter_root)

        @app.post("/v1/load_lora_adapter")
        async def load_adapter(request: Request) -> Response:
            return _json(await changes.load(parse_body(LoadAdapterBody, await _read(request, service))))

        @app.post("/v1/unload_lora_adapter")
        async def unload_adapter(request: Request) -> Response:
            return _json(await changes.unload(parse_body(UnloadAdapterBody, await _read(request, service))))

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(
            service.metrics.text(service.link.stats, service.completions.count, service.texts.count),
            media_type=CONTENT_TYPE,
        )

    @app.get("/health")
    async def health() -> Response:
        return _json({"status": "alive"})

    @app.get("/ready")
    async def ready() -> Response:
        error = service.why_not_ready()
        if error is None and not await service.link.answers(seconds := service.settings.ready_seconds):
            error = unavailable(f"the engine has not answered for {seconds:g} s", "engine_busy", 1)
        if error is not None:
            raise error
        return _json({"status": "ready"})

    return Guard(app, service)


async def _generate(
    service: Service, body: GenerationBody, prompts: int, make_job: Callable[[Loaded], Awaitable[Job]]
) -> Response:
    loaded = service.require()
    model = service.model_name(body.model)
    if not loaded.generates:
        raise wrong_kind("completes no texts", generates=False, kind=loaded.pooling.kind if loaded.pooling else None)
    check_limits(body, max_n=service.settings.max_n, max_logprobs=service.settings.max_logprobs)
    completions = prompts * (body.n or 1)
    service.completions.enter(completions, param="n")
    try:
        job = with_adapter(await make_job(loaded), service.adapter(model))
        answer = Answer.to(job, loaded, model)
        # It counts them out when it ends.
        return EngineResponse(service, answer, admission=service.completions, admitted=completions)
    except BaseException:
        service.completions.leave(completions)
        raise


async def _pool(
    service: Service, body: PoolingBody, param: str, make_job: Callable[[Loaded], Awaitable[PoolingJob]]
) -> Response:
    loaded = service.require()
    model = service.model_name(body.model)
    if service.adapter(model) is not None:
        raise ApiError(400, f"{model!r} is an adapter, and vectors are the model's own; name the model", param="model")
    texts, limit = num_texts(body), service.settings.max_texts
    if texts > limit:
        raise ApiError(400, f"the request holds {texts} texts; this server takes {limit} in one", param=param)
    service.texts.enter(texts, param=param)
    try:
        answer = PoolingAnswer(await make_job(loaded), model)
        return EngineResponse(service, answer, admission=service.texts, admitted=texts)
    except BaseException:
        service.texts.leave(texts)
        raise


async def _read(request: Request, service: Service) -> bytes:
    """The body, not more than allowed and not slower. Raises `ApiError` 408 and 413."""
    limit, seconds = service.settings.max_body_bytes, service.settings.read_seconds
    too_large = ApiError(413, f"the body is larger than {limit} bytes", code="request_too_large")
    if int(request.headers.get("content-length", "0")) > limit:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for piece in request.stream():
                body += piece
                if len(body) > limit:
                    raise too_large
    except TimeoutError:
        raise ApiError(408, f"the body did not come within {seconds:g} s", code="request_timeout") from None
    except ClientDisconnect:
        raise ApiError(400, "the client went away before its body had come") from None  # nobody reads it
    return bytes(body)


def _model(name: str, loaded: Loaded, service: Service) -> dict[str, Any]:
    parent = {} if service.adapter(name) is None else {"parent": service.settings.names[0]}
    return {
        "id": name,
        "object": "model",
        "created": loaded.created,
        "owned_by": "trine",
        "max_model_len": loaded.context_len,
        **parent,
    }


def _json(value: dict[str, Any]) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")


def _failed(error: ApiError) -> Response:
    return Response(error.body(), error.status, headers=error.headers(), media_type="application/json")


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _failed(error)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.url.path
    if error.status_code == 404:
        return _failed(ApiError(404, f"there is nothing at {path}", code="not_found"))
    if error.status_code == 405:
        response = _failed(ApiError(405, f"{path} does not take {request.method}", code="method_not_allowed"))
        response.headers["allow"] = (error.headers or {}).get("Allow", "")
        return response
    return _failed(ApiError(error.status_code, error.detail))


async def _on_mistake(request: Request, error: Exception) -> Response:
    """A mistake of ours: the traceback goes to stderr, and not to the client."""
    return _failed(ApiError(500, "internal error; the server's log has the details", code="internal_error"))


class Guard:
    """Checks the key of every request to a path that is not open, and counts what was answered."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service
        self._keys = [key.encode() for key in service.settings.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = scope.get("route")  # the pattern, not what a stranger typed
                self._service.metrics.count_http(scope["method"], getattr(route, "path", "other"), message["status"])
            await send(message)

        if self._keys and scope["path"] not in OPEN_PATHS and not self._knows(scope):
            error = ApiError(401, "give a valid API key: Authorization: Bearer KEY", code="invalid_api_key")
            await _failed(error)(scope, receive, counted)
            return
        await self._app(scope, receive, counted)

    def _knows(self, scope: Scope) -> bool:
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, key = given.partition(b" ")
        # Compared with every key, each in a time that does not depend on how much of it is right.
        matches = [hmac.compare_digest(key.strip(), known) for known in self._keys]
        return scheme.lower() == b"bearer" and any(matches)
