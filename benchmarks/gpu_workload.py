"""A small piece of real work that the GPU pass and tests/gpu do on two devices: train on Python source, then generate.

Built from the model and the kernels alone, without a recipe, so that it runs where pydantic is not installed.
Shapes: B sequences, T tokens each.
"""

from __future__ import annotations

import argparse
import inspect
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from trine.engine.generate.plain import generate
from trine.engine.generate.sampling import SamplingParams
from trine.engine.model.config import ModelConfig
from trine.engine.model.init import initialize
from trine.engine.model.transformer import Transformer
from trine.engine.text.tokenizer import Tokenizer
from trine.engine.text.train_tokenizer import train_characters
from trine.kernels.cross_entropy.op import linear_cross_entropy

BATCH, LENGTH = 8, 128
PROMPTS = ("def ", "    return self", "class Argument", "import ")


@dataclass(frozen=True)
class Data:
    """A tokenizer and the ids [number of tokens] of one text."""

    tokenizer: Tokenizer
    ids_N: Tensor


@dataclass(frozen=True)
class Training:
    """What a training run left behind. `losses` are nats per token, one per step."""

    model: Transformer
    losses: list[float]
    tokens_per_second: float


def make_data() -> Data:
    """The source of `argparse`, which every Python has, by characters."""
    text = inspect.getsource(argparse)
    tokenizer = train_characters([text])
    return Data(tokenizer, torch.tensor(tokenizer.encode(text)))


def make_model(vocab_size: int, *, seed: int = 0) -> Transformer:
    """A Llama of about 0.8M parameters with grouped queries, on the CPU in float32."""
    config = ModelConfig(
        family="llama",
        vocab_size=vocab_size,
        width=128,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        ffn_width=352,
        max_positions=256,
    )
    model = Transformer(config)
    initialize(model, seed)
    return model


def make_batch(data: Data, step: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets [B, T] of a step; every step has its own windows."""
    generator = torch.Generator().manual_seed(step)
    starts_B = torch.randint(len(data.ids_N) - LENGTH - 1, (BATCH,), generator=generator)
    windows = data.ids_N[starts_B[:, None] + torch.arange(LENGTH + 1)]
    return windows[:, :-1], windows[:, 1:]


def loss_of(model: Transformer, ids_BT: Tensor, targets_BT: Tensor, compute_dtype: torch.dtype) -> Tensor:
    """Nats per token, a scalar with a graph."""
    hidden_BTC = model(ids_BT, compute_dtype=compute_dtype)
    loss_sum = linear_cross_entropy(hidden_BTC.flatten(0, 1), model.head_weight, targets_BT.flatten())
    return loss_sum / targets_BT.numel()


def train(data: Data, *, steps: int, device: torch.device, compute_dtype: torch.dtype) -> Training:
    """Train from the same weights on the same batches, whatever the device: float32 parameters, AdamW at 1e-3."""
    model = make_model(data.tokenizer.vocab_size).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    losses = []
    begin = time.perf_counter()
    for step in range(steps):
        ids_BT, targets_BT = (x.to(device) for x in make_batch(data, step))
        loss = loss_of(model, ids_BT, targets_BT, compute_dtype)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return Training(model, losses, steps * BATCH * LENGTH / (time.perf_counter() - begin))


def same_weights(first: Transformer, second: Transformer) -> bool:
    """Whether two models on one device hold the same bits."""
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def generate_greedy(model: Transformer, data: Data, *, max_tokens: int = 64) -> list[tuple[int, ...]]:
    """The most likely continuation of each prompt, as ids."""
    params = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)
    return [tuple(found.token_ids) for found in generate(model, data.tokenizer, PROMPTS, params)]
