"""What the API process and the engine process say to each other: typed messages, in frames, over one socket.

    API -> engine      Start  Submit  Pool  Abort  Ping  LoadAdapter  UnloadAdapter  Stop
    engine -> API      Ready  Failed  Refused  Step  Pong  AdapterChanged

A frame is its length (4 bytes, big-endian) and one MessagePack value that `msgspec` checks against the types below:
what does not fit is refused, and nothing can be executed by reading it.
"""

from __future__ import annotations

from typing import Literal

import msgspec

LENGTH_BYTES = 4
# Far above any real message (log-probabilities of a long prompt are some tens of MB); a longer one is damage.
MAX_FRAME_BYTES = 2**28


class _Message(msgspec.Struct, frozen=True, tag=True, array_like=True, kw_only=True):
    """Fields travel in order, without their names; both ends are of one version."""


class Start(_Message, frozen=True):
    """Load this and answer `Ready` or `Failed`. None leaves a choice to the engine."""

    checkpoint: str
    device: str = "auto"
    dtype: str = "auto"
    threads: int = 0
    max_running: int | None = None
    max_waiting: int | None = None
    max_batch_tokens: int | None = None
    block_size: int | None = None
    kv_bytes: int = 0
    kv_dtype: str | None = None
    prefix_caching: bool = True
    deterministic: bool = False
    speculate: int = 0
    draft: str | None = None  # a checkpoint
    adapters: tuple[tuple[str, str], ...] = ()  # names and folders


class Sampling(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """`trine.engine.generate.sampling.SamplingParams`, field for field."""

    max_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    n: int = 1
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_ids: tuple[int, ...] | None = None
    banned_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True


class Guide(msgspec.Struct, frozen=True, array_like=True):
    """What the text must match: a kind of grammar and its source (JSON for a schema and for choices).

    `field`: which of a request gave it, to be named where it cannot be used.
    """

    kind: Literal["json_object", "json_schema", "regex", "choice", "grammar"]
    source: str
    field: str


class Submit(_Message, frozen=True):
    """Complete `prompt_ids`; answered by `Refused`, or by deltas in steps."""

    id: str
    prompt_ids: list[int]
    sampling: Sampling
    priority: int = 0
    salt: str = ""
    guide: Guide | None = None
    adapter: str | None = None


class Pool(_Message, frozen=True):
    """A vector of each input; answered by `Refused`, or by deltas whose choice is the number of the input.

    `token_types`: of each id; None is 0 for all.
    """

    id: str
    inputs: list[list[int]]
    token_types: list[list[int]] | None = None
    priority: int = 0


class Abort(_Message, frozen=True):
    """Stop a request at once; nothing more comes of it. Unknown ids (it has just ended) are fine."""

    id: str


class Ping(_Message, frozen=True):
    """Answered between two steps, by the loop that computes."""

    number: int


class LoadAdapter(_Message, frozen=True):
    """Load a LoRA adapter between two steps; answered by `AdapterChanged` with the same number."""

    number: int
    name: str
    folder: str


class UnloadAdapter(_Message, frozen=True):
    """Forget an adapter, unless a request is under way with it; answered by `AdapterChanged`."""

    number: int
    name: str


class Stop(_Message, frozen=True):
    """End the process."""


class Pooling(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """What the model's vectors are: `trine.engine.generate.pooling_info.PoolingInfo`, field for field."""

    kind: Literal["embedding", "classification", "tagging"]
    dim: int
    max_tokens: int
    labels: tuple[str, ...] = ()
    activation: Literal["sigmoid", "softmax", "identity"] = "identity"
    score_activation: Literal["sigmoid", "softmax", "identity"] = "identity"
    token_types: int = 0
    lower_case: bool = False
    prompts: tuple[tuple[str, str], ...] = ()
    default_prompt: str | None = None
    similarity: str = "cosine"
    normalized: bool = False
    dimensions: tuple[int, ...] = ()


class Ready(_Message, frozen=True):
    """Loaded: from which folder, and what it can take. `generates` texts, gives vectors (`pooling`), or both.

    Of an encoder-decoder `source_len`, tokens that a source has at most (0 for others), and `source_end`, the id that
    one ends with; `context_len` is the room of what is generated.
    """

    folder: str
    vocab_size: int
    context_len: int
    device: str
    dtype: str
    generates: bool = True
    pooling: Pooling | None = None
    source_len: int = 0
    source_end: int | None = None


class Failed(_Message, frozen=True):
    """The engine cannot start or go on; the process ends."""

    error: str
    exit_status: int = 1


class Refused(_Message, frozen=True):
    """A request was not taken: it is wrong (`field`, where one is to blame), too long for the context, or too many are
    waiting.
    """

    id: str
    reason: Literal["invalid", "too_long", "full", "internal"]
    error: str
    field: str | None = None


class Logprob(msgspec.Struct, frozen=True, array_like=True):
    """A token's natural log-probability, its rank (1 is the likeliest), and the likeliest ids with theirs."""

    id: int
    logprob: float
    rank: int
    top: list[tuple[int, float]]


class Delta(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """What a step added to one choice of one request.

    `text` and `token_ids` are the new ones; text lags behind ids where a character or a stop string is unfinished.
    `logprobs` has one entry for each new id, where asked for. The counts are totals so far. `prompt_logprobs` comes
    once, with the first delta of a choice; its first entry is None. `vector`: of an input of a `Pool`, float32 numbers,
    the lower byte first; of a tagger those of its tokens one after another.
    """

    id: str
    choice: int = 0
    text: str = ""
    token_ids: list[int] = []
    logprobs: list[Logprob] = []
    finish_reason: Literal["stop", "length", "abort", "error"] | None = None
    stop_reason: int | str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    prompt_logprobs: list[Logprob | None] | None = None
    error: str | None = None
    vector: bytes | None = None


class Stats(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """The engine between two steps, as `trine.engine.generate.records.EngineStats`: totals are since its start."""

    waiting: int = 0
    running: int = 0
    kv_blocks_used: int = 0
    kv_blocks_total: int = 0
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
    preemptions: int = 0
    steps: int = 0
    step_seconds: float = 0.0
    schedule_seconds: float = 0.0
    drafted_tokens: int = 0
    accepted_tokens: int = 0


class Step(_Message, frozen=True):
    """Everything one step brought."""

    deltas: list[Delta]
    stats: Stats


class Pong(_Message, frozen=True):
    """The answer to `Ping`."""

    number: int


class AdapterChanged(_Message, frozen=True):
    """An adapter was loaded or forgotten, or why not."""

    number: int
    error: str | None = None


ToEngine = Start | Submit | Pool | Abort | Ping | LoadAdapter | UnloadAdapter | Stop
ToServer = Ready | Failed | Refused | Step | Pong | AdapterChanged

_encoder = msgspec.msgpack.Encoder()
_to_engine = msgspec.msgpack.Decoder(ToEngine)
_to_server = msgspec.msgpack.Decoder(ToServer)


class ProtocolError(Exception):
    """A frame that is no message of this version."""


def pack(message: ToEngine | ToServer) -> bytes:
    """The message as a frame."""
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise ProtocolError(f"a {type(message).__name__} of {len(body)} bytes exceeds the limit of {MAX_FRAME_BYTES}")
    return len(body).to_bytes(LENGTH_BYTES, "big") + body


def body_length(header: bytes) -> int:
    """Bytes that follow a frame's header. Raises `ProtocolError` where they are too many."""
    length = int.from_bytes(header, "big")
    if length > MAX_FRAME_BYTES:
        raise ProtocolError(f"a frame claims {length} bytes; the limit is {MAX_FRAME_BYTES}")
    return length


def unpack_to_engine(body: bytes) -> ToEngine:
    """The message in a frame's body. Raises `ProtocolError`."""
    try:
        message: ToEngine = _to_engine.decode(body)
    except msgspec.DecodeError as error:
        raise ProtocolError(f"not a message for the engine: {error}") from None
    return message


def unpack_to_server(body: bytes) -> ToServer:
    """The message in a frame's body. Raises `ProtocolError`."""
    try:
        message: ToServer = _to_server.decode(body)
    except msgspec.DecodeError as error:
        raise ProtocolError(f"not a message for the server: {error}") from None
    return message
