"""POST /tokenize and /detokenize: what a text or a conversation is to the model, and back, as vLLM answers it."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from trine.serve.errors import FieldError, bad_request
from trine.serve.jobs import chat_ids, check_vocabulary, text_ids
from trine.serve.schemas import Body, Message, TokenId
from trine.serve.service import Loaded


class TokenizeBody(Body):
    """POST /tokenize: a prompt as /v1/completions takes it, or messages as /v1/chat/completions does."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message] | None, Field(min_length=1)] = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> TokenizeBody:
        if (self.prompt is None) == (self.messages is None):
            raise FieldError("prompt", "give either prompt or messages")
        if self.prompt is None and self.add_special_tokens is not None:
            raise FieldError("add_special_tokens", "add_special_tokens goes with prompt; a chat template adds its own")
        if self.messages is None and self.add_generation_prompt is not None:
            raise FieldError("add_generation_prompt", "add_generation_prompt goes with messages")
        return self


class DetokenizeBody(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[TokenId]


async def tokenize(body: TokenizeBody, loaded: Loaded) -> dict[str, Any]:
    """Ids, their number, the model's context, and the text of each where asked for. Raises `ApiError` 400."""
    if body.messages is None:
        assert body.prompt is not None
        ids = await text_ids(loaded, body.prompt, body.add_special_tokens is not False)
    else:
        ids = await chat_ids(loaded, body.messages, add_generation_prompt=body.add_generation_prompt is not False)
    texts = [loaded.names.text(token) for token in ids] if body.return_token_strs else None
    return {"count": len(ids), "max_model_len": loaded.context_len, "tokens": ids, "token_strs": texts}


def detokenize(body: DetokenizeBody, loaded: Loaded) -> dict[str, Any]:
    """The text of ids, special tokens too. Raises `ApiError` 400 for an id that the vocabulary does not have."""
    check_vocabulary(body.tokens, loaded.tokenizer.vocab_size, "tokens")
    if not body.tokens:
        raise bad_request("tokens is empty; give at least one id", "tokens")
    return {"prompt": loaded.tokenizer.decode(body.tokens, skip_special_tokens=False)}
