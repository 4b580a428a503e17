"""Tokenizers of the three kinds Trine knows the bytes of, learned from a little text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers

from trine.engine.text.tokenizer import Tokenizer
from trine.engine.text.train_tokenizer import train_bpe, train_characters, train_unigram, train_wordpiece

TEXT = """def total(values):
    \"\"\"Sum of the values, naïve: 1024 + 77.\"\"\"
    result = 0
    for value in values:
        result += value  # größer, 値, значение, 😀 and e\u0301
    return result


class Box:
\tdef __init__(self, size=10):
\t\tself._size = size
"""


@pytest.fixture(scope="session")
def bpe() -> Tokenizer:
    return train_bpe([TEXT] * 4, vocab_size=320, special_tokens=("<|endoftext|>", "<|user|>"))


@pytest.fixture(scope="session")
def characters() -> Tokenizer:
    return train_characters([TEXT])


@pytest.fixture(scope="session")
def wordpiece() -> Tokenizer:
    return train_wordpiece([TEXT] * 4, vocab_size=200, special_tokens=("<|user|>",))


@pytest.fixture(scope="session")
def unigram() -> Tokenizer:
    return train_unigram([TEXT] * 4, vocab_size=400, special_tokens=("<|endoftext|>", "<|user|>"))


@pytest.fixture(scope="session")
def byte_fallback(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """As Llama 2: spaces are "▁", one is put in front, unknown characters become bytes."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "é", "ab", "▁a", "▁ab"]
    merges = [("a", "b"), ("▁", "a"), ("▁", "ab")]
    model = models.BPE(
        vocab={name: i for i, name in enumerate(names)}, merges=merges, unk_token="<unk>", byte_fallback=True
    )
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    folder: Path = tmp_path_factory.mktemp("byte-fallback")
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": {"content": "<s>"}, "eos_token": {"content": "</s>"}, "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return Tokenizer.load(folder)
