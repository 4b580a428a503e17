"""The request bodies: which fields there are, their types and ranges. What is not here is refused by name.

`null` always means "not given", in messages and other parts too: answers hold nulls (`refusal`), and clients send
answers back as turns. Types are strict, as in OpenAI's API: "1" is no number. Fields of OpenAI's that this server does
not have (`UNSUPPORTED_...`) are refused too, unless they are null or ask for nothing (`ASKS_NOTHING`): clients send
their defaults.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import msgspec
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from trine.serve.errors import FieldError, bad_request, of_validation

MAX_SEED = 2**63 - 1
MAX_STOPS = 16
MAX_STOP_LENGTH = 1024
MAX_IDS = 4096  # in a list of allowed, banned, biased or stopping ids
MAX_NEW_TOKENS = 2**31 - 1

UNSUPPORTED_IN_COMPLETIONS = frozenset({"best_of", "suffix"})
# fmt: off
UNSUPPORTED_IN_CHAT = frozenset((
    "audio", "chat_template", "chat_template_kwargs", "documents", "function_call", "functions",
    "include_reasoning", "metadata", "modalities", "moderation", "parallel_tool_calls", "prediction",
    "prompt_cache_key", "prompt_cache_retention", "reasoning_effort", "safety_identifier", "service_tier",
    "store", "tool_choice", "tools", "verbosity", "web_search_options",
))
# fmt: on
# Values of theirs that ask for what is done anyway, since no tool is ever called and nothing is stored.
ASKS_NOTHING: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
}


class Body(BaseModel):
    """Fields are strict; what is not among them is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _null_is_not_given(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        return {name: value for name, value in fields.items() if value is not None}


def _check_prompt(value: Any) -> Any:
    """A text, a list of texts, a list of ids, or a list of lists of ids."""
    if isinstance(value, str) or (isinstance(value, list) and value and _is_prompt_list(value)):
        return value
    raise ValueError("must be a string, a list of strings, a list of token ids, or a list of lists of token ids")


def _is_prompt_list(value: list[Any]) -> bool:
    if isinstance(value[0], list):
        return all(isinstance(ids, list) and ids and _all_ids(ids) for ids in value)
    return all(isinstance(text, str) for text in value) or _all_ids(value)


def _all_ids(values: list[Any]) -> bool:
    return all(type(value) is int for value in values)  # a bool is no id


def _check_stop(value: Any) -> Any:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise ValueError("must be a string or a list of strings, none of them empty")
    if len(stops) > MAX_STOPS or any(len(stop) > MAX_STOP_LENGTH for stop in stops):
        raise ValueError(f"must be at most {MAX_STOPS} strings of at most {MAX_STOP_LENGTH} characters")
    return stops


def _check_bias(value: Any) -> Any:
    if not isinstance(value, dict) or len(value) > MAX_IDS:
        raise ValueError(f"must be an object of at most {MAX_IDS} token ids, each with a number")
    biases = {}
    for key, bias in value.items():
        if not str(key).isdecimal():
            raise ValueError(f"{key!r} is no token id")
        if isinstance(bias, bool) or not isinstance(bias, (int, float)) or not -100 <= bias <= 100:
            raise ValueError(f"the bias of {key} must be a number from -100 to 100, got {bias!r}")
        biases[int(key)] = float(bias)
    return biases


def _check_content(value: Any) -> Any:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError(f"must be a string or a list of text parts, got {value!r:.80}")
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text" or part.keys() != {"type", "text"}:
            raise ValueError(f'only parts like {{"type": "text", "text": "..."}} are supported, got {part!r:.80}')
        if not isinstance(part["text"], str):
            raise ValueError(f"the text of a part must be a string, got {part['text']!r:.80}")
    return "\n".join(part["text"] for part in value)


Prompt = Annotated[str | list[str] | list[int] | list[list[int]], BeforeValidator(_check_prompt)]
Stop = Annotated[list[str] | None, BeforeValidator(_check_stop)]
Bias = Annotated[dict[int, float] | None, BeforeValidator(_check_bias)]
Content = Annotated[str, BeforeValidator(_check_content)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], Field(max_length=MAX_IDS)]
Penalty = Annotated[float, Field(ge=-2, le=2)]


class StreamOptions(Body):
    """`include_usage`: one more chunk with the counts at the end; `continuous_usage_stats`: counts in every chunk."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class JsonSchema(Body):
    """A schema that the text must match. Name and description are for people; `strict` changes nothing."""

    name: Annotated[str, Field(min_length=1, max_length=64)]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Body):
    """text, any JSON object, or JSON that matches a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_where_needed(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema is needed with type json_schema, and only there")
        return self


class StructuredOutputs(Body):
    """What the text must match: exactly one of these. `grammar` is in the Lark-like syntax of llguidance."""

    json_: Annotated[dict[str, Any] | None, Field(alias="json")] = None
    regex: Annotated[str | None, Field(min_length=1)] = None
    choice: Annotated[list[str] | None, Field(min_length=1, max_length=1024)] = None
    grammar: Annotated[str | None, Field(min_length=1)] = None

    @model_validator(mode="after")
    def _exactly_one(self) -> StructuredOutputs:
        if sum(value is not None for value in (self.json_, self.regex, self.choice, self.grammar)) != 1:
            raise ValueError("give exactly one of json, regex, choice and grammar")
        return self


class GenerationBody(Body):
    """What completions and chat share."""

    model: str | None = None
    max_tokens: Annotated[int | None, Field(ge=0, le=MAX_NEW_TOKENS)] = None
    temperature: Annotated[float | None, Field(ge=0, le=100)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    top_k: Annotated[int | None, Field(ge=0, le=MAX_NEW_TOKENS)] = None
    min_p: Annotated[float | None, Field(ge=0, le=1)] = None
    repetition_penalty: Annotated[float | None, Field(gt=0, le=100)] = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    n: Annotated[int | None, Field(ge=1)] = None
    seed: Annotated[int | None, Field(ge=0, le=MAX_SEED)] = None
    stop: Stop = None
    stop_token_ids: TokenIds | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int | None, Field(ge=0, le=MAX_NEW_TOKENS)] = None
    logit_bias: Bias = None
    allowed_token_ids: Annotated[TokenIds | None, Field(min_length=1)] = None
    banned_token_ids: TokenIds | None = None
    prompt_logprobs: Annotated[int | None, Field(ge=0)] = None
    skip_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: Annotated[int | None, Field(ge=-(2**31), lt=2**31)] = None
    cache_salt: Annotated[str | None, Field(min_length=1, max_length=256)] = None
    user: Annotated[str | None, Field(max_length=256)] = None

    @model_validator(mode="after")
    def _fits_together(self) -> GenerationBody:
        if self.stream_options is not None and not self.stream:
            raise FieldError("stream_options", "stream_options is only for stream: true")
        if self.prompt_logprobs is not None and self.stream:
            raise FieldError("prompt_logprobs", "prompt_logprobs cannot be streamed; leave out stream")
        if self.structured_outputs and self.response_format and self.response_format.type != "text":
            raise FieldError(
                "structured_outputs",
                "response_format and structured_outputs both say what the text must match; give one",
            )
        if self.temperature == 0 and (self.n or 1) > 1:
            raise FieldError(
                "n", f"n = {self.n} with temperature 0 repeats one completion; set a temperature above 0 or n = 1"
            )
        if self.allowed_token_ids is not None and not set(self.allowed_token_ids) - set(self.banned_token_ids or ()):
            raise FieldError(
                "banned_token_ids",
                "allowed_token_ids without banned_token_ids leaves no id to choose; allow at least one",
            )
        return self


class LoadAdapterBody(Body):
    """POST /v1/load_lora_adapter."""

    lora_name: Annotated[str, Field(min_length=1, max_length=256)]
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]


class UnloadAdapterBody(Body):
    """POST /v1/unload_lora_adapter."""

    lora_name: Annotated[str, Field(min_length=1, max_length=256)]


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    prompt: Prompt
    echo: bool | None = None
    logprobs: Annotated[int | None, Field(ge=0)] = None
    add_special_tokens: bool | None = None

    @model_validator(mode="after")
    def _something_to_say(self) -> CompletionBody:
        if self.max_tokens == 0 and not self.echo:
            raise FieldError(
                "max_tokens", "max_tokens 0 asks for nothing; give 1 or more, or echo: true for the prompt alone"
            )
        return self


class Message(Body):
    """One turn. A list of text parts becomes one text, joined by line ends."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content
    name: str | None = None

    def for_template(self) -> dict[str, str]:
        """As chat templates expect it."""
        named = {} if self.name is None else {"name": self.name}
        return {"role": self.role, "content": self.content, **named}


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int | None, Field(ge=1, le=MAX_NEW_TOKENS)] = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, Field(ge=0)] = None
    add_generation_prompt: bool | None = None

    @model_validator(mode="after")
    def _chat_fits_together(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise FieldError("top_logprobs", "top_logprobs needs logprobs: true")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise FieldError("max_tokens", "max_tokens is the old name of max_completion_tokens; give one of them")
        if self.max_tokens == 0:
            raise FieldError("max_tokens", "max_tokens must be at least 1, got 0")
        return self


BodyT = TypeVar("BodyT", bound=Body)
_UNSUPPORTED: dict[type[Body], frozenset[str]] = {
    CompletionBody: UNSUPPORTED_IN_COMPLETIONS,
    ChatBody: UNSUPPORTED_IN_CHAT,
}


def parse_body(kind: type[BodyT], body: bytes) -> BodyT:
    """The request in a body. Raises `ApiError` 400 that names the field."""
    try:
        fields = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise bad_request(f"the body is not valid JSON: {reason}", None, code="invalid_json") from None
    except UnicodeDecodeError:
        raise bad_request("the body is not valid UTF-8", None, code="invalid_json") from None
    if not isinstance(fields, dict):
        raise bad_request(f"the body must be a JSON object, not a {type(fields).__name__}", None)
    unsupported = _UNSUPPORTED.get(kind, frozenset())
    fields = {
        name: value for name, value in fields.items() if name not in unsupported or not _asks_nothing(name, value)
    }
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise of_validation(error, kind.model_fields, unsupported) from None
    except RecursionError:
        raise bad_request("the body is nested too deeply", None) from None


def _asks_nothing(name: str, value: Any) -> bool:
    return any(type(value) is type(known) and value == known for known in ASKS_NOTHING.get(name, ()))


def check_limits(body: GenerationBody, *, max_n: int, max_logprobs: int) -> None:
    """What the operator of the server limits. Raises `ApiError` 400."""
    asked = {"n": (body.n, max_n), "prompt_logprobs": (body.prompt_logprobs, max_logprobs)}
    if isinstance(body, CompletionBody):
        asked["logprobs"] = (body.logprobs, max_logprobs)
    if isinstance(body, ChatBody):
        asked["top_logprobs"] = (body.top_logprobs, max_logprobs)
    for name, (value, limit) in asked.items():
        if value is not None and value > limit:
            raise bad_request(f"{name} must be at most {limit} on this server, got {value}", name)
