"""What an operator can set, with the defaults; `trine serve` fills it in."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from trine.engine.errors import UsageError
from trine.serve.messages import Start


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """A server. Raises `UsageError` for impossible values, by name.

    Attributes:
        start: what the engine process loads, and how.
        host, port: where to listen; port 0 takes a free one.
        api_keys: any of them opens all routes but /health and /ready; none leaves the server open.
        names: what `model` may be in a request; the first is the one that is shown.
        max_in_flight: completions (prompts times n) that may be on their way; more are answered 429.
        max_prompts: in one request.
        max_texts_in_flight: texts to embed, classify or compare that may be on their way; more are answered 429.
        max_texts: in one request.
        max_n, max_logprobs: the largest n, and the most likely tokens shown for a position.
        max_body_bytes: of a request.
        max_unread_tokens: of a stream, for each of its choices; a client that leaves more unread is cut off.
        read_seconds, write_seconds: the longest a client may take to send its body, or to accept a piece of answer.
        ping_seconds: a comment is sent in a stream after so long a silence, so that proxies keep it open.
        drain_seconds: at SIGTERM, completions may go on for so long.
        ready_seconds: the engine must answer within this time for /ready to say so.
        log_requests: one line on stderr for every request that ends.
        adapter_root: adapters below this folder may be loaded and unloaded by requests; None leaves those routes out.
    """

    start: Start
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    names: tuple[str, ...] = ()
    max_in_flight: int = 256
    max_prompts: int = 128
    max_texts_in_flight: int = 4096
    max_texts: int = 2048
    max_n: int = 32
    max_logprobs: int = 20
    max_body_bytes: int = 2**23
    max_unread_tokens: int = 1024
    read_seconds: float = 30.0
    write_seconds: float = 30.0
    ping_seconds: float = 15.0
    drain_seconds: float = 30.0
    ready_seconds: float = 5.0
    log_requests: bool = False
    adapter_root: Path | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise UsageError(f"port {self.port} does not exist; give one from 1 to 65535, or 0 for any free one")
        for name in (
            "max_in_flight", "max_prompts", "max_texts_in_flight", "max_texts", "max_n", "max_body_bytes",
            "max_unread_tokens",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise UsageError(f"{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        for name in ("read_seconds", "write_seconds", "ping_seconds", "ready_seconds"):
            if not getattr(self, name) > 0:
                raise UsageError(f"{name.replace('_', '-')} must be above 0, got {getattr(self, name)}")
        for name in ("max_logprobs", "drain_seconds"):
            if not getattr(self, name) >= 0:
                raise UsageError(f"{name.replace('_', '-')} must be 0 or more, got {getattr(self, name)}")
        if any(not key or not key.isascii() or key != key.strip() for key in self.api_keys):
            raise UsageError("an API key must be ASCII text without spaces around it, and not empty")
        if not self.names or any(not name for name in self.names):
            raise UsageError("a served model needs a name that is not empty")
        taken = list(self.names)
        for name, _ in self.start.adapters:
            if not name or name in taken:
                raise UsageError(f"adapter {name!r} needs a name of its own; taken: {', '.join(taken)}")
            taken.append(name)
        if self.adapter_root is not None and not self.adapter_root.is_dir():
            raise UsageError(f"there is no folder {self.adapter_root}; give one that holds adapters")
