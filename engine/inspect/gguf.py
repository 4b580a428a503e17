"""A GGUF file: its metadata, its tensors by type, and whether they are all there."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from trine.engine.convert.gguf_config import FREQUENCIES, config_of, name_of
from trine.engine.errors import TrineError
from trine.engine.inspect.architecture import count, describe
from trine.engine.inspect.records import Inspection, Quantization, Text, Weights
from trine.engine.model.families import FAMILIES, config_from_hf
from trine.engine.model.gguf import GgufFile, read_gguf
from trine.engine.model.transformer import Transformer
from trine.engine.model.weight_files import some_names

_TOKENS = "tokenizer.ggml."
_FLOATS = ("F32", "F16", "BF16", "F64")


def read_file(path: Path, found: Inspection) -> None:
    """Fill in what a file holds; what is wrong is added to `found.problems`."""
    try:
        file = read_gguf(path)
    except TrineError as error:
        found.problems.append(str(error))
        return
    sizes, numbers = Counter[str](), Counter[str]()
    for tensor in file.tensors.values():
        sizes[tensor.kind] += tensor.num_bytes
        numbers[tensor.kind] += 1
    found.weights = Weights(
        files={path.name: {"bytes": path.stat().st_size, "tensors": len(file.tensors)}},
        bytes_by_dtype=dict(sizes.most_common()),
        tensors_by_dtype={kind: numbers[kind] for kind, _ in sizes.most_common()},
    )
    codes = {kind: numbers[kind] for kind, _ in sizes.most_common() if kind not in _FLOATS}
    if codes:
        plain = sum(len(each.shape) > 1 and each.kind in _FLOATS for each in file.tensors.values())
        found.quantization = Quantization(format="gguf", method=None, schemes=codes, plain=plain, notes=[])
    found.text = _text(file)
    try:
        config = config_from_hf(config_of(file, "bfloat16"))
        found.architecture = describe(config)
        model = Transformer(config, device="meta")
        found.parameters = count(model)
        there = {name_of(file, name) for name in file.tensors if name != FREQUENCIES}
        wanted = {rule.stored for rule in FAMILIES[config.family].rules(config)}
        for names, what in ((wanted - there, "lacks"), (there - wanted, "holds, beside what its model has,")):
            if names:
                found.problems.append(f"{path.name} {what} {some_names(sorted(names), most=10)}")
    except TrineError as error:
        found.problems.append(str(error))


def _text(file: GgufFile) -> Text | None:
    kind, tokens = file.metadata.get(f"{_TOKENS}model"), file.metadata.get(f"{_TOKENS}tokens")
    if not isinstance(kind, str) or not isinstance(tokens, list):
        return None
    special = {}
    for role, key in (("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "padding"), ("unk_token", "unknown")):
        number = file.metadata.get(f"{_TOKENS}{key}_token_id")
        if isinstance(number, int) and 0 <= number < len(tokens):
            special[role] = {"text": str(tokens[number]), "id": number}
    template = file.metadata.get("tokenizer.chat_template")
    names = {"gpt2": "byte-level BPE", "llama": "SentencePiece BPE", "bert": "WordPiece", "t5": "Unigram"}
    return Text(
        kind=names.get(kind, kind),
        size=len(tokens),
        special=special,
        begins=[],
        ends=[],
        fingerprint=None,
        templates=["default"] if isinstance(template, str) else [],
    )
