"""What all tests share: one thread per process, no network, and the minutes each room took.

The number of threads must be fixed before torch starts: sums are split by thread, and the fast tests run as several
processes. Tests about threads ask for a number themselves.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from trine.engine.text.tokenizer import Tokenizer

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def pretended_gpu() -> Callable[[], AbstractContextManager[Any]]:
    """What gives this machine a GPU within a `with` statement; see `pretended_gpu.py`."""
    name = "pretended_gpu"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name("pretended_gpu.py"))
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    pretend: Callable[[], AbstractContextManager[Any]] = sys.modules[name].pretended_gpu
    return pretend


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print how many tests each room has and how long they took, set-up included, summed over processes."""
    seconds: dict[str, float] = defaultdict(float)
    tests: dict[str, int] = defaultdict(int)
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            room = _room(report.nodeid)
            tests[room] += outcome != "error"
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                seconds[_room(report.nodeid)] += report.duration
    if not tests:
        return
    terminalreporter.section("minutes per room")
    for room in sorted(seconds, key=lambda name: -seconds[name]):
        terminalreporter.write_line(f"{seconds[room] / 60:6.2f} min  {tests[room]:5d} tests  {room}")


def _room(nodeid: str) -> str:
    """`tests/engine/data/test_x.py::test_y` belongs to `engine/data`."""
    return "/".join(nodeid.partition("::")[0].split("/")[1:-1]) or "."


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Tokenizer:
    """A byte-level BPE of 300 ids; the end-of-text token is id 0 and there is no bos token."""
    from trine.engine.text.train_tokenizer import train_bpe

    return train_bpe(
        ["def add(first, second):\n    return first + second\n\nthe cat sat on the mat\n" * 20], vocab_size=300
    )


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Tokenizer) -> Path:
    """A Llama folder with `tiny_tokenizer`: context 64, float32, every weight far from its initial value."""
    import torch

    from trine.engine.model.checkpoint import save_model
    from trine.engine.model.config import ModelConfig
    from trine.engine.model.transformer import Transformer

    config = ModelConfig(
        family="llama",
        vocab_size=tiny_tokenizer.vocab_size,
        width=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        ffn_width=64,
        max_positions=64,
        eos_token_ids=(0,),
    )
    model = Transformer(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + name.endswith("norm.weight"))
    folder = tmp_path_factory.mktemp("tiny") / "checkpoint"
    save_model(model, folder)
    tiny_tokenizer.save(folder)
    return folder


@pytest.fixture(scope="session")
def seq2seq_folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Tokenizer) -> Callable[[str], Path]:
    """`seq2seq_folder("t5")` or "marian": a folder with context 32, every weight far from its initial value."""
    import torch

    from trine.engine.model.checkpoint import save_model
    from trine.engine.model.families.registry import new_config
    from trine.engine.model.transformer import Transformer

    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            sizes = {
                "vocab_size": tiny_tokenizer.vocab_size, "width": 32, "num_layers": 2, "num_heads": 4,
                "num_kv_heads": 4, "head_dim": 8, "ffn_width": 48, "max_positions": 32,
            }  # fmt: skip
            settings = {"eos_token_id": 0, "pad_token_id": 1, "decoder_start_token_id": 1, "bad_words_ids": [[1]]}
            model = Transformer(new_config(family, sizes=sizes, settings=settings))
            generator = torch.Generator().manual_seed(0)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    numbers = torch.randn(parameter.shape, generator=generator) * 0.3
                    parameter.copy_(numbers + name.endswith("norm.weight"))
            made[family] = tmp_path_factory.mktemp(family)
            save_model(model, made[family])
            tiny_tokenizer.save(made[family])
        return made[family]

    return make


@pytest.fixture(scope="session")
def tiny_wordpiece() -> Tokenizer:
    """A BERT tokenizer of letters and a few words: [CLS] text [SEP], and pairs with token types."""
    from string import ascii_lowercase as letters

    import tokenizers

    from trine.engine.text.tokenizer import Tokenizer

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [*special, *letters, *(f"##{letter}" for letter in letters), "the", "cat", "sat", "on", "mat", "a", "dog"]
    definition = tokenizers.Tokenizer(
        tokenizers.models.WordPiece(
            {word: number for number, word in enumerate(dict.fromkeys(words))}, unk_token="[UNK]"
        )
    )
    definition.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    definition.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    definition.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    definition.add_special_tokens(special)
    names = {f"{name.strip('[]').lower()}_token": name for name in special}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    fast = {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": inputs, "model_max_length": 64}
    return Tokenizer(definition.to_str(), settings={**fast, **names})


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory, tiny_wordpiece: Tokenizer) -> Callable[[str], Path]:
    """`encoder_folder(kind)`: a BERT folder with context 64, every weight far from its initial value.

    sentence (mean pooling, normalized, 48 tokens), bare, cross (one class), classifier (no, yes, maybe), tagger (O, X).
    """
    from dataclasses import replace

    import torch

    from trine.engine.model.checkpoint import save_model
    from trine.engine.model.families.registry import new_config
    from trine.engine.model.head_config import EmbeddingConfig, HeadConfig
    from trine.engine.model.transformer import Transformer

    made: dict[str, Path] = {}
    sizes = {"vocab_size": tiny_wordpiece.vocab_size, "width": 32, "num_layers": 2, "num_heads": 4, "ffn_width": 48}
    classes = "BertForSequenceClassification"
    settings: dict[str, dict[str, object]] = {
        "bare": {"architectures": ["BertModel"]},
        "sentence": {"architectures": ["BertModel"]},
        "cross": {"architectures": [classes], "id2label": {"0": "score"}},
        "classifier": {"architectures": [classes], "id2label": {"0": "no", "1": "yes", "2": "maybe"}},
        "tagger": {"architectures": ["BertForTokenClassification"], "id2label": {"0": "O", "1": "X"}},
    }

    def folder(kind: str) -> Path:
        if kind in made:
            return made[kind]
        config = new_config("bert", sizes={**sizes, "max_positions": 64}, settings=settings[kind])
        if kind == "sentence":
            prompts = (("query", "the "), ("document", "a "))
            embedding = EmbeddingConfig(pooling=("mean",), normalize=True, max_tokens=48, prompts=prompts)
            config = replace(config, head=HeadConfig(task="features", embedding=embedding))
        model = Transformer(config)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + name.endswith("norm.weight"))
        made[kind] = tmp_path_factory.mktemp(kind) / kind
        save_model(model, made[kind])
        tiny_wordpiece.save(made[kind])
        return made[kind]

    return folder
