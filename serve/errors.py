"""Errors as OpenAI's clients read them: `{"error": {"message", "type", "param", "code"}}` and a status.

    400 invalid_request_error    a field is wrong, unknown or unsupported (`param` names it); the prompt is too long
    401 invalid_request_error    no key or a wrong one
    404 invalid_request_error    no such model or path             405  the path takes another method
    413 invalid_request_error    the body is too large             408  the body did not come in time
    429 rate_limit_error         too many requests are on their way; `Retry-After` says when to try again
    500 server_error             this request failed inside the engine
    503 server_error             loading, shutting down, or the engine process has died; `Retry-After`

The engine's own errors (`trine.engine.errors`) come over the socket as `Refused` and become the same.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection
from typing import Any

import msgspec
from pydantic import ValidationError

from trine.serve.messages import Refused


class ApiError(Exception):
    """One failed HTTP request: its status and what its body says."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
        details: dict[str, int] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after = retry_after
        self.details = details or {}

    @property
    def type(self) -> str:
        """OpenAI's class of error."""
        if self.status == 429:
            return "rate_limit_error"
        return "server_error" if self.status >= 500 else "invalid_request_error"

    def body(self) -> bytes:
        """The JSON body."""
        known = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return msgspec.json.encode({"error": {**known, **self.details}})

    def headers(self) -> dict[str, str]:
        """`Retry-After` where waiting helps, and what a 401 must say."""
        headers = {} if self.retry_after is None else {"retry-after": str(self.retry_after)}
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return headers


class FieldError(ValueError):
    """What pydantic's checks of several fields raise: the field to name is part of it."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


def bad_request(message: str, param: str | None, *, code: str = "invalid_value") -> ApiError:
    """400, with the field to blame."""
    return ApiError(400, message, param=param, code=code)


def too_long(prompt_tokens: int, context_len: int, param: str) -> ApiError:
    """400 for a prompt that leaves no room for one new token; clients that shorten prompts read the two numbers."""
    return ApiError(
        400,
        f"the prompt has {prompt_tokens} tokens but the model's context holds {context_len}, the new tokens included; "
        f"shorten it to {context_len - 1} tokens or fewer",
        param=param,
        code="context_length_exceeded",
        details={"n_prompt_tokens": prompt_tokens, "n_ctx": context_len},
    )


def source_too_long(source_tokens: int, source_len: int, param: str) -> ApiError:
    """400 for a prompt that the encoder of an encoder-decoder does not take."""
    return ApiError(
        400,
        f"the prompt is the source of an encoder-decoder and has {source_tokens} tokens; it can have {source_len}: "
        "shorten it, or split it up",
        param=param,
        code="context_length_exceeded",
        details={"n_prompt_tokens": source_tokens, "n_ctx": source_len},
    )


def input_too_long(number: int, num_tokens: int, max_tokens: int) -> ApiError:
    """400 for a text that an encoder does not take whole."""
    return ApiError(
        400,
        f"input {number} has {num_tokens} tokens but the model takes {max_tokens}; shorten it, or set "
        "truncate_prompt_tokens to -1 to have its end left out",
        param="input",
        code="context_length_exceeded",
        details={"n_prompt_tokens": num_tokens, "n_ctx": max_tokens},
    )


ROUTES = {
    "embedding": "/v1/embeddings, /v1/score or /v1/rerank",
    "classification": "/v1/classify (with one class /v1/score or /v1/rerank)",
}


def wrong_kind(lacks: str, *, generates: bool, kind: str | None) -> ApiError:
    """400 where a model does not do what a route is for; what it can do instead is said."""
    if kind == "tagging":
        return ApiError(400, f"this model tags tokens and {lacks}; use `trine classify`", code="wrong_kind_of_model")
    routes = [ROUTES[kind]] if kind is not None else []
    routes += ["/v1/completions"] if generates else []
    return ApiError(400, f"this model {lacks}; use {' or '.join(routes)}", code="wrong_kind_of_model")


def server_full(limit: int, what: str = "completions") -> ApiError:
    """429: as many completions, or texts, as the server takes are on their way."""
    return ApiError(
        429,
        f"the server is full: it takes {limit} {what} at once; try again later",
        code="server_full",
        retry_after=1,
    )


def unavailable(message: str, code: str, retry_after: int) -> ApiError:
    """503 for the whole server."""
    return ApiError(503, message, code=code, retry_after=retry_after)


def of_refusal(refused: Refused) -> ApiError:
    """What the engine did not take."""
    if refused.reason == "full":
        return ApiError(429, refused.error, code="server_full", retry_after=1)
    if refused.reason == "internal":
        return ApiError(500, refused.error, code="internal_error")
    code = "context_length_exceeded" if refused.reason == "too_long" else "invalid_value"
    return ApiError(400, refused.error, param=refused.field, code=code)


def of_validation(error: ValidationError, known: Collection[str], unsupported: Collection[str]) -> ApiError:
    """The first of pydantic's complaints, as one sentence with the field's name."""
    # An unknown field says most about what a caller had in mind: name it first.
    complaints = sorted(error.errors(include_url=False), key=lambda each: each["type"] != "extra_forbidden")
    first = complaints[0]
    param = ".".join(str(part) for part in first["loc"]) or None
    if first["type"] == "extra_forbidden":
        return _of_unknown_field(str(param), known, unsupported)
    if first["type"] == "missing":
        return bad_request(f"{param} is required", param, code="missing_required_parameter")
    message = first["msg"].removeprefix("Value error, ")
    together = first.get("ctx", {}).get("error")
    if isinstance(together, FieldError):
        return bad_request(message, together.field)
    if first["type"] != "value_error":
        message = f"{message[:1].lower()}{message[1:]}, got {_shown(first['input'])}"
    return bad_request(f"{param}: {message}" if param else message, param)


def _of_unknown_field(name: str, known: Collection[str], unsupported: Collection[str]) -> ApiError:
    if name in unsupported:
        return bad_request(f"{name} is not supported by this server; leave it out", name, code="unsupported_parameter")
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return bad_request(f"unknown field {name}{hint}", name, code="unknown_parameter")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
