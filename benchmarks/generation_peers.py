"""transformers as a contestant in generation, and the requests that all contestants get.

Greedy, `new_tokens` for every prompt, nothing ending early: one request after another, all in one padded batch, and its
continuous batching, where this version has it for this device.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from trine.engine.model.checkpoint import save_model
from trine.engine.model.transformer import Transformer
from trine.engine.text.tokenizer import Tokenizer
from trine.engine.text.train_tokenizer import train_bpe

Turn = Callable[[list[list[int]]], list[list[int]]]
ONE_BY_ONE = "transformers, one after another"
ONE_BATCH = "transformers, one batch"
CONTINUOUS = "transformers, continuous batching"
# Tokens of a block of its cache.
_PAGE = 256


def make_tokenizer() -> Tokenizer:
    """One of few ids; what they stand for does not matter in a timing."""
    return train_bpe(["def add(first, second):\n    return first + second\n" * 20], vocab_size=300)


def make_requests(streams: int, prompt_tokens: int, vocab_size: int) -> list[list[int]]:
    """`streams` prompts of half to all of `prompt_tokens` random ids, the same each time."""
    generator = random.Random(0)
    lengths = [generator.randint(max(1, prompt_tokens // 2), prompt_tokens) for _ in range(streams)]
    return [[generator.randrange(vocab_size) for _ in range(length)] for length in lengths]


def make_peers(model: Transformer, new_tokens: int) -> dict[str, Turn]:
    """Contestants by name, on the weights, device and dtype of `model`."""
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    with tempfile.TemporaryDirectory() as folder:
        save_model(model, Path(folder))
        # Continuous batching puts attention of its own into its model: it gets one for itself.
        theirs, continuously = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype).to(model.device).eval() for _ in range(2)
        )
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": new_tokens, "pad_token_id": 0}
    config = GenerationConfig(**options, eos_token_id=None)
    theirs.generation_config = continuously.generation_config = config

    @torch.inference_mode()
    def one_by_one(requests: list[list[int]]) -> list[list[int]]:
        found = []
        for ids in requests:
            prompt = torch.tensor([ids], device=model.device)
            out = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=config)
            found.append(out[0, len(ids) :].tolist())
        return found

    @torch.inference_mode()
    def one_batch(requests: list[list[int]]) -> list[list[int]]:
        longest = max(map(len, requests))
        prompts = torch.zeros(len(requests), longest, dtype=torch.int64)
        mask = torch.zeros_like(prompts)
        for row, ids in enumerate(requests):
            prompts[row, longest - len(ids) :] = torch.tensor(ids)
            mask[row, longest - len(ids) :] = 1
        prompts, mask = prompts.to(model.device), mask.to(model.device)
        out = theirs.generate(prompts, attention_mask=mask, generation_config=config)
        return [row[longest:].tolist() for row in out]

    def continuous(requests: list[list[int]]) -> list[list[int]]:
        # Its manager (cache, warm-up) is kept from turn to turn, as a server would keep it. The cache holds all
        # requests twice; left alone it takes nine tenths of the machine's memory.
        blocks = sum(2 + 2 * (len(ids) + new_tokens) // _PAGE for ids in requests)
        found = continuously.generate_batch(
            inputs=requests,
            generation_config=config,
            continuous_batching_config=ContinuousBatchingConfig(num_blocks=blocks),
            persistent_manager=True,
        )
        order = sorted(found, key=lambda key: int(key.rsplit("_", 1)[-1]))
        return [list(found[key].generated_tokens) for key in order]

    peers: dict[str, Turn] = {ONE_BY_ONE: one_by_one, ONE_BATCH: one_batch}
    return {**peers, CONTINUOUS: continuous} if hasattr(continuously, "generate_batch") else peers
