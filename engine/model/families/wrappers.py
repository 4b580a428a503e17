"""The text part of multimodal folders: their config.json holds that of a language model, and so do their weights.

config.json has it in the table `text_config`, with a model_type of its own. Tensors are called
`language_model.model.layers...`, or `model.language_model.layers...` with the head beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from trine.engine.log import say_once

Value = TypeVar("Value")
_TEXT = "text_config"
# Keys that may stand outside of the text part.
_SHARED = ("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "quantization_config")
# What stands before the names of a language model, and what stands there in a folder of its own.
_PREFIXES = (("language_model.model.", "model."), ("language_model.lm_head.", "lm_head."))
_PREFIXES_INSIDE = (("model.language_model.", "model."), ("lm_head.", "lm_head."))


def text_settings(hf: dict[str, Any]) -> dict[str, Any]:
    """config.json of the language model inside, said once; any other config as it is."""
    inner = hf.get(_TEXT)
    if not isinstance(inner, Mapping) or "model_type" not in inner:
        return hf
    say_once(f"of this {hf.get('model_type')} checkpoint the text part is read, a {inner['model_type']} model")
    outer = {key: hf[key] for key in _SHARED if hf.get(key) is not None}
    return {**outer, **inner}


def text_tensors(tensors: Mapping[str, Value]) -> dict[str, Value]:
    """The language model's tensors under the names they have in a folder of its own; all of any other folder."""
    for prefixes in (_PREFIXES, _PREFIXES_INSIDE):
        if any(name.startswith(prefixes[0][0]) for name in tensors):
            return {
                new + name.removeprefix(old): tensor
                for old, new in prefixes
                for name, tensor in tensors.items()
                if name.startswith(old)
            }
    return dict(tensors)
