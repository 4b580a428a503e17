"""What a tokenizer is, from its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trine.engine.errors import TrineError
from trine.engine.inspect.records import Text
from trine.engine.model.config import ModelConfig
from trine.engine.text.chat import ChatTemplate
from trine.engine.text.tokenizer import Tokenizer


def read_text(folder: Path, config: ModelConfig | None, notes: list[str], problems: list[str]) -> Text | None:
    """The tokenizer of a folder, and its chat templates; what is wrong with them is added to `problems`."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        notes.append("there is no tokenizer.json: only token ids can be put to the model")
        return None
    try:
        tokenizer = Tokenizer.load(folder)
        definition = json.loads(path.read_text(encoding="utf-8"))
    except TrineError as error:
        problems.append(str(error))
        return None
    if config is not None and tokenizer.vocab_size > config.vocab_size:
        problems.append(
            f"the tokenizer has {tokenizer.vocab_size:,} ids and the model {config.vocab_size:,}: they do not belong "
            "together"
        )
    for name in sorted(tokenizer.chat_templates):
        try:
            ChatTemplate.of(tokenizer, name)
        except TrineError as error:
            problems.append(f"chat template {name!r}: {error}")
    inside = tokenizer.encode("a")
    around = tokenizer.encode("a", add_special_tokens=True)
    at = around.index(inside[0]) if inside and inside[0] in around else 0
    return Text(
        kind=_kind(definition),
        size=tokenizer.vocab_size,
        special={
            role: {"text": text, "id": tokenizer.vocabulary[text]} for role, text in tokenizer.special_tokens.items()
        },
        begins=[tokenizer.token_text(each) for each in around[:at]],
        ends=[tokenizer.token_text(each) for each in around[at + len(inside) :]],
        fingerprint=tokenizer.fingerprint,
        templates=sorted(tokenizer.chat_templates),
    )


def _kind(definition: dict[str, Any]) -> str:
    """`byte-level BPE`, `Unigram`, ..."""
    kind = str(definition.get("model", {}).get("type") or "unknown")
    if kind == "BPE":
        text = json.dumps([definition.get(part) for part in ("pre_tokenizer", "decoder", "normalizer")])
        return "byte-level BPE" if '"ByteLevel"' in text else "BPE"
    return kind
