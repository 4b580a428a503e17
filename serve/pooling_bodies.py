"""The request bodies of the routes that answer with vectors and scores; as `schemas.py`.

embeddings   input                    one vector of each
classify     input (and text_pair)    classes of each, or of each pair
score        text_1, text_2           one number for each pair
rerank       query, documents         the documents by their number, the best first
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from trine.serve.errors import FieldError
from trine.serve.schemas import MAX_NEW_TOKENS, Body, Prompt


def _check_texts(value: Any) -> Any:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError("must be a string, or a list of at least one string")
    return texts


def _check_documents(value: Any) -> Any:
    if not isinstance(value, list) or not value:
        raise ValueError("must be a list of at least one text")
    return [_document(document) for document in value]


def _document(value: Any) -> str:
    text = value.get("text") if isinstance(value, dict) and value.keys() == {"text"} else value
    if not isinstance(text, str):
        raise ValueError(f'each document must be a string or {{"text": "..."}}, got {value!r:.80}')
    return text


Texts = Annotated[list[str], BeforeValidator(_check_texts)]
Documents = Annotated[list[str], BeforeValidator(_check_documents)]


class PoolingBody(Body):
    """What they share. `truncate_prompt_tokens`: longer texts keep so many tokens; -1 as many as the model takes."""

    model: str | None = None
    truncate_prompt_tokens: Annotated[int | None, Field(ge=-1, le=MAX_NEW_TOKENS)] = None
    priority: Annotated[int | None, Field(ge=-(2**31), lt=2**31)] = None
    user: Annotated[str | None, Field(max_length=256)] = None

    @model_validator(mode="after")
    def _keeps_something(self) -> PoolingBody:
        if self.truncate_prompt_tokens == 0:
            raise FieldError(
                "truncate_prompt_tokens",
                "truncate_prompt_tokens 0 keeps nothing; give 1 or more, or -1 for what the model takes",
            )
        return self


class EmbeddingBody(PoolingBody):
    """POST /v1/embeddings."""

    input: Prompt
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int | None, Field(ge=1, le=MAX_NEW_TOKENS)] = None
    prompt_name: Annotated[str | None, Field(max_length=256)] = None
    add_special_tokens: bool | None = None

    @model_validator(mode="after")
    def _prompts_go_before_texts(self) -> EmbeddingBody:
        first = self.input[0] if isinstance(self.input, list) else self.input
        if not isinstance(first, str) and (self.prompt_name is not None or self.add_special_tokens is not None):
            field = "add_special_tokens" if self.prompt_name is None else "prompt_name"
            raise FieldError(field, "token ids are taken as they are; leave out prompt_name and add_special_tokens")
        return self


class ClassifyBody(PoolingBody):
    """POST /v1/classify. `use_activation` false: the logits themselves."""

    input: Prompt
    text_pair: Texts | None = None
    use_activation: bool | None = None

    @model_validator(mode="after")
    def _pairs_fit(self) -> ClassifyBody:
        if self.text_pair is None:
            return self
        texts = [self.input] if isinstance(self.input, str) else self.input
        if not all(isinstance(text, str) for text in texts):
            raise FieldError("text_pair", "text_pair goes with texts, not with token ids")
        if len(texts) != len(self.text_pair):
            raise FieldError(
                "text_pair", f"text_pair has {len(self.text_pair)} texts for {len(texts)} of input; give one for each"
            )
        return self


class ScoreBody(PoolingBody):
    """POST /v1/score: one text with one, one with each of several, or several with as many."""

    text_1: Texts
    text_2: Texts

    @model_validator(mode="after")
    def _pairs_fit(self) -> ScoreBody:
        if len(self.text_1) not in (1, len(self.text_2)):
            raise FieldError(
                "text_1",
                f"text_1 has {len(self.text_1)} texts and text_2 {len(self.text_2)}; give one text_1 for all, or as "
                "many as text_2 has",
            )
        return self


class RerankBody(PoolingBody):
    """POST /v1/rerank."""

    query: str
    documents: Documents
    top_n: Annotated[int | None, Field(ge=1, le=MAX_NEW_TOKENS)] = None
    return_documents: bool | None = None
