"""What all routes share: the engine's link, the loaded tokenizer, how much is on its way, and whether it is ending."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trine.engine.log import say
from trine.serve.call import Call
from trine.serve.errors import ApiError, server_full, unavailable
from trine.serve.link import RETRY_AFTER_DEATH, EngineLink
from trine.serve.logprobs import TokenNames
from trine.serve.messages import Pooling, Ready
from trine.serve.metrics import Metrics
from trine.serve.settings import ServerSettings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trine.engine.text.chat import ChatTemplate
    from trine.engine.text.tokenizer import Tokenizer

RETRY_WHILE_LOADING = 5
RETRY_WHILE_ENDING = 10


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """The model as the API process knows it."""

    tokenizer: Tokenizer
    names: TokenNames
    template: ChatTemplate | None
    context_len: int
    created: int
    generates: bool = True
    pooling: Pooling | None = None
    source_len: int = 0
    source_end: int | None = None


class Admission:
    """How many of something are on their way, at most `limit`."""

    def __init__(self, what: str, limit: int) -> None:
        self.count = 0
        self.what, self._limit = what, limit

    def enter(self, number: int, *, param: str) -> None:
        """Count them in, before anything is done for them. Raises `ApiError` 429 where they are too many, 400 where
        they always are: `param` asks for them.
        """
        limit, what = self._limit, self.what
        if number > limit:
            raise ApiError(400, f"one request asks for {number} {what}; this server takes {limit} at once", param=param)
        if self.count + number > limit:
            raise server_full(limit, what)
        self.count += number

    def leave(self, number: int) -> None:
        """Count them out."""
        self.count -= number


class Service:
    """One server's state."""

    def __init__(self, settings: ServerSettings, engine_command: Sequence[str]) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.link = EngineLink(engine_command, on_delta=self.metrics.observe)
        self.completions = Admission("completions", settings.max_in_flight)
        self.texts = Admission("texts", settings.max_texts_in_flight)
        self.ending = False
        self.adapters = [name for name, _ in settings.start.adapters]
        self._loaded: Loaded | None = None

    def load(self, tokenizer: Tokenizer, template: ChatTemplate | None, ready: Ready) -> None:
        """The engine is ready; from now on requests are taken."""
        self._loaded = Loaded(
            tokenizer=tokenizer,
            names=TokenNames(tokenizer),
            template=template,
            context_len=ready.context_len,
            created=int(time.time()),
            generates=ready.generates,
            pooling=ready.pooling,
            source_len=ready.source_len,
            source_end=ready.source_end,
        )

    @property
    def in_flight(self) -> int:
        """Completions and texts that are on their way."""
        return self.completions.count + self.texts.count

    @property
    def under_way(self) -> str:
        """The same in words."""
        counted = [each for each in (self.completions, self.texts) if each.count]
        return " and ".join(f"{each.count} {each.what}" for each in counted)

    def why_not_ready(self) -> ApiError | None:
        """503 while nothing can be taken, with the reason."""
        if self.link.failure is not None:
            return unavailable(self.link.failure, "engine_died", RETRY_AFTER_DEATH)
        if self.ending:
            return unavailable("the server is shutting down", "shutting_down", RETRY_WHILE_ENDING)
        if self._loaded is None:
            return unavailable("the model is loading", "loading", RETRY_WHILE_LOADING)
        return None

    def require(self) -> Loaded:
        """The model. Raises `ApiError` 503 while nothing can be taken."""
        error = self.why_not_ready()
        if error is not None:
            raise error
        assert self._loaded is not None
        return self._loaded

    def model_name(self, asked: str | None) -> str:
        """The name to answer with. Raises `ApiError` 404 for a model that is not served here."""
        names = (*self.settings.names, *self.adapters)
        if asked is None:
            return names[0]
        if asked not in names:
            served = ", ".join(names)
            raise ApiError(
                404,
                f"there is no model {asked!r} here; this server has {served}",
                param="model",
                code="model_not_found",
            )
        return asked

    def adapter(self, model: str) -> str | None:
        """The adapter that a model's name stands for; None for the model itself."""
        return model if model in self.adapters else None

    def log(self, call: Call, request_id: str, user: str | None, outcome: str) -> None:
        """One line for a request that has ended, where the operator wants them."""
        if self.settings.log_requests:
            by = f" user {user!r}" if user else ""  # quoted: it must not write lines of its own
            say(f"{request_id}{by}: {outcome}, {time.monotonic() - call.started:.3f} s")
